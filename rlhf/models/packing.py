"""Several sequences in one row, each blind to the others, and who may look at whom.

Shape suffixes: ``_N`` row, ``_T`` token, ``_S`` token whose log-probability is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.models.token_batches import token_batches

SHARED = 1  # segment that the others of a row may look back at; 0 is padding, 2 and up stand for themselves


class Row(NamedTuple):
    """A sequence and the tokens of it that are learned."""

    ids: list[int]
    counts: list[bool]
    """True = the log-probability of this token is wanted; the first token has none, whatever stands there."""


class Laid(NamedTuple):
    """Sequences as right-padded rows."""

    ids_NT: Tensor
    positions_NT: Tensor
    """Of each token in its own sequence."""
    segments_NT: Tensor
    """0 = padding, 2 and up = one sequence each."""
    rows_S: Tensor
    columns_S: Tensor
    """Row and column of the state that predicts each wanted token."""
    targets_S: Tensor
    """The wanted tokens."""
    owners_S: Tensor
    """Index of the sequence that each belongs to."""

    def to(self, device: torch.device | str) -> Laid:
        """The same on another device."""
        return Laid(*(t.to(device) for t in self))


def attention_mask(segments_NT: Tensor, dtype: torch.dtype) -> Tensor:
    """Who may look at whom.

    Rows with one segment, or one behind the shared part, need no more than the plain mask [N, T] (1 = a real
    token; causality is the model's own business). Otherwise an additive mask [N, 1, T, T] in ``dtype``,
    0 = may look: a token looks back at the shared part and at its own segment, and padding at itself, so that
    no row is all masked.
    """
    if not bool((segments_NT > SHARED + 1).any()):
        return (segments_NT > 0).long()
    query, key = segments_NT[:, :, None], segments_NT[:, None, :]
    columns = torch.arange(segments_NT.shape[1], device=segments_NT.device)
    back = columns[None, :, None] >= columns[None, None, :]
    may = back & ((key == query) | (key == SHARED))
    out = torch.zeros(may.shape, dtype=dtype, device=segments_NT.device)
    return out.masked_fill_(~may, torch.finfo(dtype).min)[:, None]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of sequences by row: the longest first, each into the first row that has room (Johnson 1973).

    A sequence that is longer than ``capacity`` has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((r for r, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = -1
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def micro_batches(lengths: Sequence[int], budget: int, *, packing: bool) -> list[list[list[int]]]:
    """Indices of sequences by row and by micro-batch; a batch is at most ``budget`` tokens with its padding.

    Args:
        lengths: tokens of each sequence, at least one.
        budget: a sequence that is longer by itself goes alone.
        packing: let short ones share a row, which is as wide as the longest of all; else a row each.
    """
    bins = first_fit(lengths, max(lengths)) if packing else [[index] for index in range(len(lengths))]
    widths = [sum(lengths[i] for i in row) for row in bins]
    return [[bins[r] for r in batch] for batch in token_batches(widths, budget, ties=bins)]


def lay(sequences: Sequence[Row], bins: Sequence[Sequence[int]], pad_id: int) -> Laid:
    """Lay sequences out as rows.

    Args:
        sequences: all of them; ``owners_S`` counts in this order.
        bins: the indices of those that share a row, for each row.
        pad_id: fills the rows up.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, segments
    wanted: list[tuple[int, int, int, int]] = []  # row, column, target, owner
    for n, members in enumerate(bins):
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        for place, index in enumerate(members):
            begin, row = len(ids), sequences[index]
            wanted += [(n, begin + t - 1, row.ids[t], index) for t in range(1, len(row.ids)) if row.counts[t]]
            ids += row.ids
            positions += range(len(row.ids))
            segments += [SHARED + 1 + place] * len(row.ids)
        rows.append((ids, positions, segments))
    longest = max(len(ids) for ids, _, _ in rows)
    fills = (pad_id, 0, 0)
    ids_NT, positions_NT, segments_NT = (
        torch.tensor([row[part] + [fills[part]] * (longest - len(row[part])) for row in rows])
        for part in range(3)
    )
    wanted_S4 = torch.tensor(wanted, dtype=torch.long).reshape(-1, 4)
    return Laid(ids_NT, positions_NT, segments_NT, *wanted_S4.T)
