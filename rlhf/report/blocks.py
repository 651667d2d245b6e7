"""What a section of a page is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhf.markdown import number, value
from rlhf.report.gather import Run

_BEFORE_AFTER = (  # key of an evaluation's summary, label, format
    ("gold", "gold score", ".3f"),
    ("judge", "held-out reward model", ".3f"),
    ("test", "test model (never a reward)", ".3f"),
    ("reward", "reward model (the training proxy)", ".3f"),
    ("response_length", "response length, tokens", ".1f"),
    ("eos_rate", "share that ended itself", ".3f"),
    ("entropy", "entropy, nats a token", ".2f"),
    ("distinct_1", "distinct-1", ".3f"),
    ("distinct_2", "distinct-2", ".3f"),
)
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


def before_after(summary: dict[str, Any]) -> list[list[str]]:
    """Label, before, after, difference and its interval of every figure that an evaluation's summary has."""
    rows = []
    for key, label, form in _BEFORE_AFTER:
        if found := summary.get(key):
            change = value({"mean": found["diff"], "ci95": found["ci95"]}, form)
            rows.append([label, *(number(found[side], form) for side in ("before", "after")), *change])
    return rows
