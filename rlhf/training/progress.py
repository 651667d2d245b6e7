"""How far long work is: one kind of bar for all stages.

A bar goes to the standard output of the first process, shows itself only when the work has taken some
seconds, and in a file, where nothing can be overwritten, writes a new line seldom.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from rlhf.runs.processes import rank

_PATIENCE = 5.0  # seconds of silence before a bar shows itself
_REFRESH, _REFRESH_IN_FILES = 1.0, 30.0  # seconds


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
    return tqdm(items, **(house | options))
