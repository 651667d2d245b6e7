"""Hidden states below the first adapted layer, kept by what was read: a prompt, or a response behind it.

The comparisons of a pool, such as votes over thirty arguments, hold each response a dozen times; its states
are computed once and laid out for whatever rows ask for them. What else was in its row then changes them by
rounding only.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reward.model.batch import PackedComparisons
from rlhf.models.packing import SHARED

Piece = tuple[tuple[int, ...], tuple[int, ...] | None]
"""A prompt's ids, and those of a response behind it; None = the prompt itself."""


class ResponseStates:
    """States that enter layer ``cut``, the first adapted one, on the CPU."""

    def __init__(self, cut: int) -> None:
        self.cut = cut
        self.pieces: dict[Piece, Tensor] = {}  # [T, D]

    def add(self, packed: PackedComparisons, states_NTD: Tensor) -> None:
        """Keep what a packed batch holds and has not been seen; what has been seen stays as it was."""
        for n, piece, begin, end in _pieces(packed):
            if piece not in self.pieces:
                self.pieces[piece] = states_NTD[n, begin:end].cpu().clone()

    def of(self, packed: PackedComparisons) -> Tensor:
        """The states of a packed batch, [N, T, D], 0 at padding, on its device.

        Raises:
            KeyError: it holds what was never added.
        """
        first = next(iter(self.pieces.values()))
        out_NTD = first.new_zeros(*packed.ids_NT.shape, first.shape[-1])
        for n, piece, begin, end in _pieces(packed):
            out_NTD[n, begin:end] = self.pieces[piece]
        return out_NTD.to(packed.ids_NT.device)


def _pieces(packed: PackedComparisons) -> Iterator[tuple[int, Piece, int, int]]:
    """Row, piece, and the columns from which to which it stands."""
    for n, (ids, segments) in enumerate(zip(packed.ids_NT.tolist(), packed.segments_NT, strict=True)):
        numbers, sizes = torch.unique_consecutive(segments, return_counts=True)
        begin, prompt = 0, ()
        for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
            end = begin + size
            part = tuple(ids[begin:end])
            if number == SHARED:
                prompt = part
                yield n, (prompt, None), begin, end
            elif number > SHARED:
                yield n, (prompt, part), begin, end
            begin = end
