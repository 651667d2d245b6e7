"""Sampling responses with a key-value cache, from random numbers that belong to the row.

Every row brings its own uniforms, drawn from (seed, purpose, step, row). So what a row says does not depend
on which process samples it, on what was sampled before, or on a restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf.backbone import Backbone
from rlhf.sequences import left_pad, positions_from_mask


class Sampled(NamedTuple):
    """Responses of one batch of prompts."""

    prompt_ids_BP: Tensor
    """Left-padded prompts."""
    prompt_mask_BP: Tensor
    """True = a real prompt token."""
    response_ids_BR: Tensor
    """Sampled ids up to and including EOS, then padding; always the full width R."""
    log_probs_BR: Tensor
    """Log-probs of the sampled ids under the sampling distribution; 0 after EOS."""


def uniforms(seed: int, purpose: str, step: int, rows: Sequence[int], width: int) -> Tensor:
    """Random numbers in [0, 1) for each row, a function of the arguments alone, [len(rows), width]."""
    tag = int.from_bytes(purpose.encode()[:8], "big")
    drawn = [np.random.default_rng([seed % 2**63, tag, step, row]).random(width) for row in rows]
    return torch.from_numpy(np.stack(drawn))


def pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution, and its log-prob.

    One uniform a row instead of one exponential a token: cheaper than ``torch.multinomial`` over a large
    vocabulary. The sum is taken in float64, so that rounding does not favour late tokens.
    """
    log_probs_BV = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
    cumulative_BV = log_probs_BV.double().exp_().cumsum_(dim=-1)
    target_B1 = (uniform_B.to(cumulative_BV) * cumulative_BV[:, -1])[:, None]
    picked_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    picked_B1.clamp_(max=logits_BV.shape[-1] - 1)
    return picked_B1[:, 0], log_probs_BV.gather(-1, picked_B1)[:, 0]


@torch.no_grad()
def sample(
    backbone: Backbone,
    role: str,
    prompts: Sequence[Sequence[int]],
    uniform_BR: Tensor,
    *,
    eos_id: int,
    pad_id: int,
    temperature: float,
    any_process: Callable[[bool], bool] = bool,
) -> Sampled:
    """Sample one response a prompt from the whole distribution (no top-k, no top-p).

    Args:
        backbone: the model.
        role: ``policy``, ``reference`` or another adapter.
        prompts: token ids of each prompt.
        uniform_BR: one uniform a token; R is the length limit.
        eos_id: the id that ends a response.
        pad_id: fills the rest.
        temperature: divides the logits.
        any_process: whether any process still has unfinished rows; under ZeRO-3 all processes must take
            the same number of steps.

    Returns:
        Responses and the log-probs that they were sampled with.
    """
    device = backbone.device
    ids_BP, mask_BP = (t.to(device) for t in left_pad([list(p) for p in prompts], pad_id))
    rows, limit = uniform_BR.shape
    uniform_BR = uniform_BR.to(device)
    response_BR = torch.full((rows, limit), pad_id, dtype=torch.long, device=device)
    log_probs_BR = torch.zeros(rows, limit, device=device)
    padded = not bool(mask_BP.all())

    backbone.activate(role)
    decoder, head = backbone.decoder, backbone.base.get_output_embeddings()
    cache: Any = DynamicCache(config=backbone.base.config.get_text_config())
    hidden = decoder(
        input_ids=ids_BP,
        attention_mask=mask_BP.long(),
        position_ids=positions_from_mask(mask_BP),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    position_B = mask_BP.sum(-1)
    mask_BT = mask_BP
    going_B = torch.ones(rows, dtype=torch.bool, device=device)
    for t in range(limit):
        token_B, log_prob_B = pick(head(hidden[:, -1]), uniform_BR[:, t], temperature)
        response_BR[:, t] = torch.where(going_B, token_B, pad_id)
        log_probs_BR[:, t] = log_prob_B * going_B
        going_B = going_B & (token_B != eos_id)
        if t + 1 == limit or not any_process(bool(going_B.any())):
            break
        mask_BT = torch.cat([mask_BT, torch.ones_like(going_B)[:, None]], dim=1)
        hidden = decoder(
            input_ids=response_BR[:, t : t + 1],
            attention_mask=_additive(mask_BT, hidden.dtype) if padded else None,
            position_ids=(position_B + t)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return Sampled(ids_BP, mask_BP, response_BR, log_probs_BR)


def _additive(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention mask of one new token a row, [B, 1, 1, T], ready to be added: 0 or the lowest number.

    Handed over ready-made because the attention kernel would otherwise convert it anew in every layer.
    """
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask_BT.shape, dtype=dtype, device=mask_BT.device).masked_fill(~mask_BT, lowest)[
        :, None, None
    ]
