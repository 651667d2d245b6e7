"""What a section of a page is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlhf.report.gather import Run

Source = tuple[Run, str]
"""A run and a file in its folder."""


@dataclasses.dataclass
class Block:
    """A table or a figure, with the files that hold it."""

    title: str = ""
    sources: Sequence[Source] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    svg: str = ""
    text: str = ""
    marked: frozenset[int] = frozenset()
    """Rows in which the runs differ."""


@dataclasses.dataclass
class Section:
    """A part of the page under a heading."""

    key: str
    title: str
    blocks: list[Block]
