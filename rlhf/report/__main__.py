"""A run as one page of HTML: ``[RUNS="a b"] python -m rlhf.report RECIPE [section.key=value ...]``.

Writes ``runs/<name>/report.html``, or one page of the runs that RUNS names, by name or by folder, below
``runs/``; prints its path. A run that is unfinished or damaged has a page too, which says so.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.runs.stage import RUNS


def main() -> None:
    """The `report` target."""
    named = os.environ.get("RUNS", "").split()
    folders = [_folder(name) for name in dict.fromkeys(named or [from_command_line().name])]
    from rlhf.report.gather import gather
    from rlhf.report.page import write_page

    one = len(folders) == 1
    file = folders[0] / "report.html" if one else RUNS / f"report-{'-'.join(f.name for f in folders)}.html"
    write_page([gather(folder) for folder in folders], file)
    print(file, flush=True)


def _folder(name: str) -> Path:
    folder = next((place for place in (RUNS / name, Path(name)) if place.is_dir()), None)
    if folder is None:
        there = sorted(path.name for path in RUNS.glob("*") if path.is_dir())
        near = difflib.get_close_matches(name, there, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"runs here: {', '.join(there) or 'none'}"
        raise UserError(f"no run {name} in {RUNS}/: {remedy}")
    return folder


if __name__ == "__main__":
    exit_on_user_error(main)
