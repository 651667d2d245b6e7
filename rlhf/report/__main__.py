"""A run as one page of HTML: ``[RUNS="a b"] python -m rlhf.report RECIPE [section.key=value ...]``.

Writes ``runs/<name>/report.html``, or one page of the runs that RUNS names, by name or by folder, below
``runs/``; prints its path. A run that is unfinished or damaged has a page too, which says so.
"""

from __future__ import annotations

from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.report.runs import folder_of, named_runs
from rlhf.runs.stage import RUNS


def main() -> None:
    """The `report` target."""
    folders = named_runs() or [folder_of(from_command_line().name)]
    from rlhf.report.gather import gather
    from rlhf.report.page import write_page

    one = len(folders) == 1
    file = folders[0] / "report.html" if one else RUNS / f"report-{'-'.join(f.name for f in folders)}.html"
    write_page([gather(folder) for folder in folders], file)
    print(file, flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
