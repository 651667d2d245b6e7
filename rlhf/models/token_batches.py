"""Batches by a token budget: items of similar width together, padding counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_batches(
    widths: Sequence[int],
    budget: int,
    *,
    rows: Sequence[int] | None = None,
    longest_first: bool = False,
    ties: Sequence[Any] | None = None,
) -> list[list[int]]:
    """Indices of items in batches of at most ``budget`` tokens; an item that is wider goes alone.

    A batch costs its widest row times its number of rows. The result depends on the arguments alone, so that
    a resumed run has the same batches.

    Args:
        widths: tokens of the widest row of each item.
        budget: tokens of a batch, padding included.
        rows: rows of each item; None = one each.
        longest_first: begin with the widest, so that the peak of memory comes first.
        ties: order of items of one width; None = as they stand.
    """

    def key(index: int) -> tuple[Any, ...]:
        width = -widths[index] if longest_first else widths[index]
        return (width, index) if ties is None else (width, ties[index], index)

    batches: list[list[int]] = []
    widest = count = 0
    for index in sorted(range(len(widths)), key=key):
        more = 1 if rows is None else rows[index]
        widest = max(widest, widths[index])
        if not batches or widest * (count + more) > budget:
            batches.append([])
            widest, count = widths[index], 0
        batches[-1].append(index)
        count += more
    return batches
