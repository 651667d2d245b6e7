"""Sampling responses with a key-value cache, from random numbers that belong to the row.

Every row brings its own uniforms, drawn from (seed, purpose, step, row). So what a row says does not depend
on which process samples it, on what was sampled before or beside it, or on a restart.

Shape suffixes: ``_B`` response row, ``_U`` different prompt, ``_L`` row still in the batch, ``_P`` prompt
token, ``_R`` response token, ``_T`` token (prompt, response, closing column), ``_D`` hidden unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.generation.kv_cache import Decoding, TrunkRecord, distinct
from rlhf.models.backbone import Backbone, layers_of
from rlhf.models.folding import folded_weights
from rlhf.models.masks import action_mask, ended, left_pad
from rlhf.models.onednn import packed_weights


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
    trunk_BTD: Tensor | None = None
    """Hidden states of the frozen trunk for prompt, response and the EOS that closes an open response, 0
    where nothing is; only on demand."""


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
    keep_trunk: bool = False,
) -> Sampled:
    """Sample one response a prompt from the whole distribution (no top-k, no top-p).

    Equal prompts are read once. Rows that have ended leave the batch when they are a quarter of it. The
    role's adapter is folded into the weights meanwhile. None of this changes what a row says.

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
        keep_trunk: return the frozen trunk's hidden states too, where there is a trunk and a plain cache.
            The number of steps then differs between processes: not under ZeRO-3.

    Returns:
        Responses and the log-probs that they were sampled with.
    """
    device = backbone.device
    uniform_BR = uniform_BR.to(device)
    rows, limit = uniform_BR.shape
    ids_BP, mask_BP = (t.to(device) for t in left_pad([list(p) for p in prompts], pad_id))
    response_BR = torch.full((rows, limit), pad_id, dtype=torch.long, device=device)
    log_probs_BR = torch.zeros(rows, limit, device=device)

    backbone.activate(role)
    decoder, head = backbone.decoder, backbone.base.get_output_embeddings()
    width = ids_BP.shape[1]
    decoding = Decoding(decoder, backbone.base.config.get_text_config(), width + limit + 1)
    cut = backbone.frozen_layers if keep_trunk and decoding.plain else 0
    different, of = distinct(prompts)
    first_U = torch.tensor([of.index(number) for number in range(len(different))], device=device)
    of_B = torch.tensor(of, device=device)
    with backbone.folded(role), TrunkRecord(decoder, cut) as trunk:
        hidden_LD = decoding.start(ids_BP[first_U], mask_BP[first_U])[:, -1]
        trunk.start(of_B, width + limit + 1)
        if len(different) < rows:
            decoding.select(of_B)
            hidden_LD = hidden_LD[of_B]
        row_L = torch.arange(rows, device=device)
        going_L = torch.ones(rows, dtype=torch.bool, device=device)
        with packed_weights(backbone.base, rows, folded_weights):
            for t in range(limit):
                picked_L, log_prob_L = pick(head(hidden_LD), uniform_BR[row_L, t], temperature)
                token_L = torch.where(going_L, picked_L, pad_id)
                response_BR[row_L, t] = token_L
                log_probs_BR[row_L, t] = log_prob_L * going_L
                going_L = going_L & (token_L != eos_id)
                going = int(going_L.sum())
                if t + 1 == limit or not any_process(going > 0):
                    break
                hidden_LD = decoding.step(token_L)
                trunk.note(row_L, width + t)
                if 4 * going <= 3 * len(row_L):
                    # one row stays for the sake of other processes, which wait for this one in every step
                    stay = going_L.nonzero()[:, 0] if going else row_L.new_zeros(1)
                    decoding.select(stay)
                    hidden_LD, row_L, going_L = hidden_LD[stay], row_L[stay], going_L[stay]
        if cut:  # the last token has not been fed, nor the EOS behind a response that is still open
            with layers_of(decoder, "trunk", cut):
                decoding.step(token_L)
                trunk.note(row_L, width + t)
                if going:
                    decoding.step(torch.full_like(token_L, eos_id))
                    trunk.note(row_L, width + limit)
    if trunk.states_BTD is not None:
        open_B1 = ~ended(response_BR, eos_id)[:, None]
        real_BT = torch.cat([mask_BP, action_mask(response_BR, eos_id), open_B1], dim=1)
        trunk.states_BTD.masked_fill_(~real_BT[..., None], 0)
    return Sampled(ids_BP, mask_BP, response_BR, log_probs_BR, trunk.states_BTD)
