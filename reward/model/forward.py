"""Packed rows through a reward model: scores and log-probabilities of whole batches, and of whole sets.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit, ``_B`` example, ``_K`` response of an example,
``_S`` place that is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reward.model.batch import Example, Packed, as_example, micro_batches, pack
from rlhf.models.log_probs import token_log_probs
from rlhf.models.packing import attention_mask
from rlhf.models.trunk_cache import TrunkCache
from rlhf.training.progress import progress

TOKENS_AT_ONCE = 4096  # tokens, padding included, of one scoring batch
_LOGITS_AT_ONCE = 2048  # positions whose vocabulary logits are in memory at once
_PACKING_TOLERANCE = 1e-3  # between packed and separate scores, in units of their size


def forward_packed(model: Any, packed: Packed, trunk: TrunkCache | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states [N, T, D] and one score a response [B, K]; 0 where there is no response."""
    mask_BK = packed.mask_BK
    hidden: dict[str, Any] = {}
    if trunk is not None:
        states_NTD = trunk.states(packed.index_N.tolist(), packed.ids_NT)
        hidden = {"cut": trunk.cut, "hidden_NTD": states_NTD}
    hidden_NTD, scores_S = model(
        **inputs_of(model, packed),
        **hidden,
        rows_S=packed.rows_BK[mask_BK],
        columns_S=packed.columns_BK[mask_BK],
    )
    scores_BK = torch.zeros(mask_BK.shape, dtype=scores_S.dtype, device=scores_S.device)
    return hidden_NTD, scores_BK.index_put(mask_BK.nonzero(as_tuple=True), scores_S)


def inputs_of(model: Any, packed: Packed) -> dict[str, Tensor]:
    """What the base reads of a packed batch."""
    return {
        "input_ids": packed.ids_NT,
        "attention_mask": attention_mask(packed.segments_NT, dtype_of(model)),
        "position_ids": packed.positions_NT,
    }


def dtype_of(model: Any) -> torch.dtype:
    """Type of the base's weights."""
    inside = getattr(model, "module", model)
    return inside.base_model.model.dtype


def response_log_probs(hidden_NTD: Tensor, packed: Packed, vocabulary: nn.Module) -> tuple[Tensor, Tensor]:
    """Summed log-probability of the wanted responses and the number of their tokens, [B, K] each.

    Both are 0 for responses that were not wanted. ``vocabulary`` maps hidden states to logits.
    """
    states_1SD = hidden_NTD[packed.states_2S[0], packed.states_2S[1]][None]
    logps_S = token_log_probs(
        states_1SD, vocabulary, packed.targets_S[None], temperature=1.0, chunk=_LOGITS_AT_ONCE
    )[0][0]
    shape = packed.mask_BK.shape
    zeros = torch.zeros(shape.numel(), dtype=logps_S.dtype, device=logps_S.device)
    sums = zeros.index_add(0, packed.owners_S, logps_S)
    counts = zeros.index_add(0, packed.owners_S, torch.ones_like(logps_S))
    return sums.view(shape), counts.view(shape)


@torch.no_grad()
def score_examples(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    *,
    share: bool = True,
    tokens: int = TOKENS_AT_ONCE,
    vocabulary: nn.Module | None = None,
    trunk: TrunkCache | None = None,
) -> tuple[Tensor, ...]:
    """Raw head output of every response, flat and in order, [sum of K], float32 on the CPU.

    With ``vocabulary`` also the responses' summed log-probabilities and their token counts, shaped alike.
    """
    device = next(model.parameters()).device
    first = [0]
    for example in examples:
        first.append(first[-1] + len(example["responses"]))
    parts = 1 if vocabulary is None else 3
    out = torch.zeros(parts, first[-1])
    for batch in progress("score", micro_batches(examples, tokens, share=share)):
        some = [examples[i] for i in batch]
        packed = pack(some, pad_id, share=share, wanted="none" if vocabulary is None else "all").to(device)
        hidden_NTD, scores_BK = forward_packed(model, packed, trunk)
        found = [scores_BK]
        if vocabulary is not None:
            found += response_log_probs(hidden_NTD, packed, vocabulary)
        for b, index in enumerate(batch):
            k = len(examples[index]["responses"])
            for part, values_BK in enumerate(found):
                out[part, first[index] : first[index] + k] = values_BK[b, :k].float().cpu()
    return tuple(out)


def scores_of(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Raw head output of closed token rows, [len(rows)], in their order, float32 on the CPU."""
    return score_examples(model, [as_example(row) for row in rows], pad_id, share=False)[0]


def check_packing(model: nn.Module, examples: Sequence[Example], pad_id: int) -> str | None:
    """Compare packed with separate rows on a few real examples; returns a warning where they differ.

    An architecture may ignore a four-dimensional mask or positions of its own; its rows then stay separate.
    """
    some = sorted(examples, key=lambda e: len(e["responses"]), reverse=True)[:2]
    try:
        packed, separate = (score_examples(model, some, pad_id, share=share)[0] for share in (True, False))
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return f"this architecture does not take packed rows ({reason}); prompts are not shared"
    gap = float((packed - separate).abs().max())
    exact = dtype_of(model) == torch.float32
    if gap > _PACKING_TOLERANCE * (1 if exact else 100) * max(1.0, float(separate.abs().max())):
        return f"packed rows score differently with this architecture (by {gap:.2g}); prompts are not shared"
    return None
