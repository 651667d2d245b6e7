"""Comparisons to padded batches in which all responses of one prompt stand together.

Shape suffixes: ``_B`` comparison, ``_K`` response of a comparison, ``_N`` response row, ``_T`` token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.comparisons import Comparison
from rlhf.dialogue import Dialogue
from rlhf.sequences import right_pad


class RankedBatch(NamedTuple):
    """A few comparisons; each of their N responses is one row, forwarded once."""

    ids_NT: Tensor
    """Right-padded prompt + response + EOS."""
    mask_NT: Tensor
    """True = a real token."""
    rows_BK: Tensor
    """Row of each response; 0 where there is none."""
    ranks_BK: Tensor
    """0 = best, equal = tie."""
    mask_BK: Tensor
    """True = a real response."""


def encode(comparisons: Sequence[Comparison], dialogue: Dialogue) -> list[dict[str, Any]]:
    """Each comparison as ``{"responses": token rows, "ranks": ranks}``, the rows closed with EOS."""
    rows = []
    for comparison in comparisons:
        prompt = dialogue.encode_prompt(comparison.prompt)
        responses = [dialogue.close(prompt, dialogue.encode_response(r)) for r in comparison.responses]
        rows.append({"responses": responses, "ranks": list(comparison.ranks)})
    return rows


def layout(examples: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Where each response of some encoded comparisons stands: rows, ranks and mask, [B, K] each."""
    widest = max(len(e["ranks"]) for e in examples)
    rows_BK = torch.zeros(len(examples), widest, dtype=torch.long)
    ranks_BK = torch.zeros_like(rows_BK)
    mask_BK = torch.zeros_like(rows_BK, dtype=torch.bool)
    first = 0
    for b, example in enumerate(examples):
        k = len(example["ranks"])
        rows_BK[b, :k] = torch.arange(first, first + k)
        ranks_BK[b, :k] = torch.tensor(example["ranks"])
        mask_BK[b, :k] = True
        first += k
    return rows_BK, ranks_BK, mask_BK


def collate(examples: Sequence[dict[str, Any]], pad_id: int) -> RankedBatch:
    """Pad the responses of a few encoded comparisons into one batch."""
    ids_NT, mask_NT = right_pad([r for e in examples for r in e["responses"]], pad_id)
    return RankedBatch(ids_NT, mask_NT, *layout(examples))


def token_batches(rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Indices of rows of similar length, each batch at most ``budget`` tokens with its padding."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    batches: list[list[int]] = []
    for index in order:
        if not batches or len(rows[index]) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(index)
    return batches
