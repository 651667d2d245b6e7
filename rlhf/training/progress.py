"""How far long work is: one kind of bar for all stages.

A bar goes to the standard output of the first process, shows itself only when the work has taken some
seconds, with the time that is left, and in a file, where nothing can be overwritten, writes a new line
seldom. The bar of a stage's main work leaves in the stage's folder how far it is, for `make watch`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf.runs.artifacts import write_json
from rlhf.runs.processes import rank
from rlhf.runs.stage import OPEN, PROGRESS

_PATIENCE = 5.0  # seconds of silence before a bar shows itself
_REFRESH, _REFRESH_IN_FILES = 1.0, 30.0  # seconds
_NOTED = 2.0  # seconds between two notes on the disk


class _Bar(tqdm):
    """A bar that leaves on the disk how far it is.

    Args:
        note: the file.
    """

    def __init__(self, *args: Any, note: Path | None = None, **options: Any) -> None:
        self._note, self._first, self._noted = note, options.get("initial") or 0, 0.0
        self._began = time.time()
        super().__init__(*args, **options)
        self._leave()

    def update(self, n: float | None = 1) -> bool | None:
        """Move on by n."""
        shown = super().update(n)
        self._leave()
        return shown

    def _leave(self) -> None:
        if self._note is None or self.disable or time.monotonic() < self._noted + _NOTED:
            return
        self._noted = time.monotonic()
        if not self._note.parent.is_dir():
            return
        found = {"what": self.desc.removesuffix(": "), "done": self.n, "total": self.total}
        with contextlib.suppress(OSError):  # work does not end for that
            write_json(self._note, {**found, "first": self._first, "began": self._began, "at": time.time()})


def progress(
    description: str, items: Iterable[Any] | None = None, *, total: int | None = None, **options: Any
) -> tqdm:
    """A bar; iterate over it, or move it on with ``update(n)`` inside ``with``.

    Args:
        description: left of the bar.
        items: what to go through, if it is to be iterated over.
        total: how much there is to do; None = the number of items.
        options: of tqdm, in the place of the house's: ``leave=True, delay=0`` for the main work of a stage.
    """
    folder = OPEN.get() if options.get("leave") else None
    house: dict[str, Any] = {
        "desc": description,
        "total": total,
        "file": sys.stdout,
        "dynamic_ncols": True,
        "mininterval": _REFRESH if sys.stdout.isatty() else _REFRESH_IN_FILES,
        "delay": _PATIENCE,
        "leave": False,
        "disable": rank() != 0,
    }
    return _Bar(items, note=folder and folder / PROGRESS, **(house | options))
