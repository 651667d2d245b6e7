"""The stages' own command lines, run in this process: so that a study does what its readers can do."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf.errors import UserError
from studies.engine.units import Unit


@contextlib.contextmanager
def log_of(unit: Unit, folder: Path) -> Iterator[None]:
    """Have what is printed inside in a log beside the unit's result."""
    log = folder / f"{unit.kind}-{unit.key}.log"
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def run_stage(module: str, words: Sequence[str]) -> None:
    """Run a stage; what is done it skips.

    Args:
        module: its package.
        words: of its command line: RECIPE [section.key=value ...].

    Raises:
        UserError: it ended with an error; its line is in the log.
    """
    before = sys.argv
    sys.argv = ["stage", *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise UserError(f"{module} ended with {end.code}: see the log of the unit") from None
    finally:
        sys.argv = before
