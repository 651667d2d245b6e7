"""A page on which people rank responses: ``[PORT=n] [TO=tool] python -m rlhf.rank RECIPE [key=value ...]``.

Serves the page on loopback until Ctrl-C; every answer is a row of ``runs/<name>/rank/comparisons.jsonl``,
which `data.comparisons` reads. With TO (`label-studio`, `argilla`) it writes tasks for that tool instead.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from rlhf.errors import UserError, exit_on_user_error
from rlhf.rank.export import TOOLS, write_tasks
from rlhf.rank.session import Session
from rlhf.rank.store import ANSWERS, Store
from rlhf.recipe.load import from_command_line
from rlhf.runs.artifacts import write_atomically
from rlhf.runs.lock import locked
from rlhf.runs.stage import RUNS
from rlhf.web.server import Routes, Server, port_of

_ADDRESS = ".address.json"  # so that a page in a browser finds the server after a restart


def main() -> None:
    """The `rank` target."""
    recipe = from_command_line()
    section, folder = recipe.rank, RUNS / recipe.name / "rank"
    port, tool = port_of(os.environ.get("PORT", "")), os.environ.get("TO", "")
    if tool and tool not in TOOLS:
        raise UserError(f"TO={tool}: name {' or '.join(TOOLS)}")
    from rlhf.rank.candidates import candidates
    from rlhf.rank.pages import lines, owner_path, routes, summary

    with locked(folder):
        items = candidates(recipe)
        if tool:
            for line in write_tasks(tool, items, folder, section.instructions):
                print(line, flush=True)
            return
        store = Store(folder / ANSWERS)
        session = Session(items, store, overlap=section.annotators, seed=recipe.seed)
        owner = owner_path()
        server = _server(routes(session, recipe.name, section.instructions, owner), folder, port)
        print(f"{len(items)} prompts; answers go to {store.path}", flush=True)
        print(f"rank at       {server.url}", flush=True)
        print(f"the owner at  {server.url}{owner}", flush=True)
        print("Ctrl-C ends it; the same command goes on", flush=True)
        server.run()
        for line in lines(summary(session)):
            print(line, flush=True)
        if store.path.exists():
            print(f'train on them: make reward SET="name=... data.comparisons={store.path}"', flush=True)


def _server(served: Routes, folder: Path, port: int) -> Server:
    """The server, at its former address where that is free and no other port is asked for."""
    former, token, server = 0, "", None
    with contextlib.suppress(
        OSError, ValueError, LookupError, TypeError, UserError
    ):  # or it is a new address
        kept = json.loads((folder / _ADDRESS).read_bytes())
        former, token = port_of(str(kept["port"])), str(kept["token"])
    if former and not port:
        with contextlib.suppress(UserError):
            server = Server(served, former, token)
    server = server or Server(served, port, token)
    file = folder / _ADDRESS
    file.touch(mode=0o600)
    write_atomically(file, json.dumps({"port": server.port, "token": server.token}))
    file.chmod(0o600)
    return server


if __name__ == "__main__":
    exit_on_user_error(main)
