"""A run in progress as a page on loopback: ``[RUNS="a b"] [PORT=n] python -m rlhf.watch RECIPE ...``.

Serves what `make report` would write, renewed as metrics arrive, until Ctrl-C. The run may have begun or not,
be finished or damaged; nothing of it is changed.
"""

from __future__ import annotations

import os

from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.report.runs import named_runs
from rlhf.runs.stage import RUNS
from rlhf.web.server import Server, port_of


def main() -> None:
    """The `watch` target."""
    port = port_of(os.environ.get("PORT", ""))
    folders = named_runs() or [RUNS / from_command_line().name]
    from rlhf.watch.live import Live

    server = Server(Live(folders).routes(), port)
    print(f"watching {', '.join(map(str, folders))}: open {server.url}", flush=True)
    print("Ctrl-C ends this, and not the run", flush=True)
    server.run()
    print("no longer watching; the run is as it was", flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
