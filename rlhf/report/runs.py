"""The runs that RUNS names, by name or by folder."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from rlhf.errors import UserError
from rlhf.runs.stage import RUNS


def named_runs() -> list[Path]:
    """Folders of the runs in the environment's RUNS, each once; none where it names none.

    Raises:
        UserError: there is no such run.
    """
    return [folder_of(name) for name in dict.fromkeys(os.environ.get("RUNS", "").split())]


def folder_of(name: str) -> Path:
    """The folder of a run.

    Raises:
        UserError: there is no such run.
    """
    folder = next((place for place in (RUNS / name, Path(name)) if place.is_dir()), None)
    if folder is None:
        there = sorted(path.name for path in RUNS.glob("*") if path.is_dir())
        near = difflib.get_close_matches(name, there, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"runs here: {', '.join(there) or 'none'}"
        raise UserError(f"no run {name} in {RUNS}/: {remedy}")
    return folder
