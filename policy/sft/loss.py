"""Packed rows through a causal language model: log-probabilities of the learned tokens, and nothing else.

The vocabulary head runs on those tokens alone, a chunk at a time.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit, ``_B`` sequence, ``_S`` learned token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models.packing import (
    PackedBatch,
    Row,
    compare_packing,
    inputs_of,
    micro_batches,
    pack,
    packed_log_probs,
    sequence_log_probs,
)

TOKENS_AT_ONCE = 4096  # tokens, padding included, of a forward pass without gradients


def log_probs(model: Any, batch: PackedBatch, head: Any) -> tuple[Tensor, Tensor]:
    """Log-probability of every learned token, and the entropy that it was predicted with, nats, [S] each.

    model: a peft model over one with hidden states, or what DeepSpeed wraps around it.
    """
    return packed_log_probs(model(**inputs_of(model, batch), part="all"), batch, head)


@torch.no_grad()
def losses(
    model: nn.Module,
    head: Any,
    sequences: Sequence[Row],
    pad_id: int,
    *,
    packing: bool,
    tokens: int = TOKENS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Summed negative log-probability of each sequence's learned tokens, nats, and their number, [B] each."""
    device = next(model.parameters()).device
    nll_B, counts_B = torch.zeros(len(sequences)), torch.zeros(len(sequences))
    for bins in micro_batches([len(row.ids) for row in sequences], tokens, packing=packing):
        batch = pack(sequences, bins, pad_id).to(device)
        hidden_NTD = model(**inputs_of(model, batch), part="all")
        sums_B, numbers_B = sequence_log_probs(hidden_NTD, batch, head)
        nll_B -= sums_B.cpu()
        counts_B += numbers_B.cpu()
    return nll_B, counts_B


def check_packing(model: Any, sequences: Sequence[Row], pad_id: int) -> str | None:
    """A warning where the model reads some of the sequences otherwise if they share rows: the two longest,
    each with one of the two shortest."""
    by_length = sorted(sequences, key=lambda row: len(row.ids))
    some = [by_length[-1], by_length[0], by_length[-2:][0], by_length[:2][-1]]
    device = next(model.parameters()).device

    def states(share: bool) -> Tensor:
        batch = pack(some, [[0, 1], [2, 3]] if share else [[0], [1], [2], [3]], pad_id).to(device)
        hidden_NTD = model(**inputs_of(model, batch), part="all")
        rows, columns = (batch.rows_B, batch.rows_S), (batch.columns_B, batch.columns_S)
        return hidden_NTD[torch.cat(rows), torch.cat(columns)]

    return compare_packing(states, model)
