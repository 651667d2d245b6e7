"""Packed rows through a causal language model: log-probabilities of the learned tokens, and nothing else.

The vocabulary head runs on those tokens alone, a chunk at a time.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit, ``_B`` sequence, ``_S`` learned token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.backbone import Backbone
from rlhf.models.log_probs import token_log_probs
from rlhf.models.packing import Laid, Row, attention_mask, lay, micro_batches
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import processes

TOKENS_AT_ONCE = 4096  # tokens, padding included, of a forward pass without gradients
_LOGITS_AT_ONCE = 2**24  # logits in memory at once, 64 MiB in float32
_TOLERANCE = 1e-3  # between packed and separate log-probabilities, nats


class GivesStates:
    """Mixed into a causal language model: its last hidden states where a laid-out batch says.

    Called as anybody calls it, the model is what it was. With ``rows_S`` it returns the states [S, D] at rows
    ``rows_S`` and columns ``columns_S``, and computes no logits.
    """

    def forward(
        self, input_ids: Tensor | None = None, *, rows_S: Tensor | None = None, **options: Any
    ) -> Any:
        """See the class."""
        if rows_S is None:
            return super().forward(input_ids=input_ids, **options)  # type: ignore[misc]
        inside: Any = self
        hidden_NTD = inside.get_decoder()(
            input_ids=input_ids,
            attention_mask=options["attention_mask"],
            position_ids=options["position_ids"],
            use_cache=False,
        ).last_hidden_state
        return hidden_NTD[rows_S, options["columns_S"]]


def gives_states(base: PreTrainedModel) -> PreTrainedModel:
    """Teach a loaded language model to give states; its weights and saved form stay the same."""
    kind = type(base)
    base.__class__ = type(f"Stating{kind.__name__}", (GivesStates, kind), {})
    return base


def vocabulary_head(recipe: Recipe, backbone: Backbone) -> Any:
    """The frozen map from hidden states to logits, a copy where ZeRO-3 will take the model's own apart."""
    head = backbone.base.get_output_embeddings()
    apart = processes() > 1 and recipe.distributed.zero_stage == 3
    return copy.deepcopy(head).requires_grad_(False) if apart else head


def log_probs(model: Any, laid: Laid, head: Any) -> tuple[Tensor, Tensor]:
    """Log-probability of every learned token, and the entropy that it was predicted with, nats, [S] each.

    model: a peft model over one that gives states, or what DeepSpeed wraps around it.
    """
    inside = getattr(model, "module", model)
    states_SD = model(
        input_ids=laid.ids_NT,
        attention_mask=attention_mask(laid.segments_NT, inside.base_model.model.dtype),
        position_ids=laid.positions_NT,
        rows_S=laid.rows_S,
        columns_S=laid.columns_S,
    )
    chunk = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    both = token_log_probs(states_SD[None], head, laid.targets_S[None], temperature=1.0, chunk=chunk)
    return both[0][0], both[1][0]


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
        laid = lay(sequences, bins, pad_id)
        logps_S = log_probs(model, laid.to(device), head)[0].float().cpu()
        nll_B.index_add_(0, laid.owners_S, -logps_S)
        counts_B.index_add_(0, laid.owners_S, torch.ones_like(logps_S))
    return nll_B, counts_B


def check_packing(model: Any, head: Any, sequences: Sequence[Row], pad_id: int) -> str | None:
    """Compare packed with separate rows on a few real sequences; returns a warning where they differ.

    An architecture may ignore a four-dimensional mask or positions of its own; its rows then stay separate.
    """
    short = sorted(sequences, key=lambda row: len(row.ids))[:4]  # those that share a row
    some = (list(short) * 4)[:4]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            packed, separate = (
                log_probs(model, lay(some, bins, pad_id).to(device), head)[0]
                for bins in ([[0, 1], [2, 3]], [[0], [1], [2], [3]])
            )
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return f"this architecture does not take packed rows ({reason}); every sequence has a row of its own"
    gap = float((packed - separate).abs().max())
    exact = model.base_model.model.dtype == torch.float32
    if not gap <= _TOLERANCE * (1 if exact else 100):
        return f"packed rows differ with this architecture (by {gap:.2g} nats a token): nothing is packed"
    return None
