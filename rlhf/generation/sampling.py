"""Sampling with a key-value cache, from random numbers that belong to the row: the one decoding loop.

Every row brings its own uniforms, drawn from (seed, purpose, step, row). So the tokens of a row do not depend
on which process samples it, on what was sampled before or beside it, or on a restart.

Shape suffixes: ``_B`` response row, ``_U`` different prompt, ``_L`` row still in the batch, ``_P`` prompt
token, ``_R`` response token, ``_T`` token (prompt, response, closing column), ``_D`` hidden unit, ``_V``
vocabulary entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.generation.kv_cache import Decoding, PrefixStates, TrunkRecord, distinct
from rlhf.models.backbone import Backbone, layers_of
from rlhf.models.kernels.onednn import packed_weights
from rlhf.models.log_probs import logits_head
from rlhf.models.masks import action_mask, ended, left_pad


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
    lengths_B: Tensor
    """Number of sampled ids of each response, EOS included."""
    trunk_BTD: Tensor | None = None
    """Hidden states of the frozen trunk for prompt, response and the EOS that closes an open response, 0
    where nothing is; only on demand."""


class StopStrings(NamedTuple):
    """Strings that end a response."""

    strings: tuple[str, ...]
    """At least one."""
    decode: Callable[[Sequence[int]], str]
    """Token ids to text."""

    def reached(self, ids_LR: Tensor, going_L: Tensor) -> Tensor:
        """Which of the rows that are going have a stop string at the end of their tokens so far, [L]."""
        # a string of n bytes has at most n tokens; a few more, because the first ones may be half a letter
        tail_LR = ids_LR[:, -max(len(s.encode()) for s in self.strings) - 4 :]
        tails = [
            self.decode(ids) if going else ""
            for ids, going in zip(tail_LR.tolist(), going_L.tolist(), strict=True)
        ]
        return torch.tensor([any(s in tail for s in self.strings) for tail in tails], device=ids_LR.device)


def truncate(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop strings."""
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


class SamplingParams(NamedTuple):
    """How tokens are sampled, and when a response ends."""

    temperature: float
    """Divides the logits; 0 = greedy decoding."""
    eos_ids: frozenset[int]
    """Tokens that end a response."""
    top_p: float = 1.0
    """Probability mass to sample from; 1 = the whole distribution."""
    stop: StopStrings | None = None
    """Strings that end a response."""
    pad_id: int = 0
    """Fills the rest of a response."""


class LogitsAsStates(nn.Module):
    """A model whose decoder and head cannot be called apart: its logits take the place of hidden states.

    The vocabulary head that belongs to it is the identity.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._known = set(inspect.signature(model.forward).parameters)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """Logits of the last token as ``last_hidden_state``, [B, 1, V]."""
        if "position_ids" not in self._known:
            inputs.pop("position_ids", None)
        if "logits_to_keep" in self._known:
            inputs["logits_to_keep"] = 1
        return SimpleNamespace(last_hidden_state=self.model(**inputs).logits[:, -1:])


class ModelParts(NamedTuple):
    """The parts of a model that the decoding loop calls."""

    model: PreTrainedModel
    """All of it."""
    decoder: nn.Module
    """Tokens to hidden states."""
    head: Callable[[Tensor], Tensor]
    """Hidden states to logits."""

    @classmethod
    def of(cls, model: PreTrainedModel, *, whole: bool = False) -> ModelParts:
        """Decoder and head of a model; with ``whole`` the model's logits in place of hidden states."""
        if whole:
            return cls(model, LogitsAsStates(model), nn.Identity())
        return cls(model, model.get_decoder(), logits_head(model))


def uniforms(seed: int, purpose: str, step: int, rows: Sequence[int], width: int) -> Tensor:
    """Random numbers in [0, 1) for each row, a function of the arguments alone, [len(rows), width]."""
    tag = int.from_bytes(purpose.encode()[:8], "big")
    drawn = [np.random.default_rng([seed % 2**63, tag, step, row]).random(width) for row in rows]
    return torch.from_numpy(np.stack(drawn))


def top_p_logits(logits_BV: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling: -inf for all but the most probable tokens whose mass reaches ``top_p``.

    The most probable token always stays. Of tokens with equal logits at the edge the earlier ones of the
    vocabulary stay. Holtzman et al. 2020 (arXiv 1904.09751).
    """
    if top_p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = sorted_BV.double().softmax(dim=-1)
    out_BV = mass_BV.cumsum(dim=-1) - mass_BV >= top_p  # what comes before it has the mass already
    out_BV[:, 0] = False
    return logits_BV.masked_fill(torch.zeros_like(out_BV).scatter(-1, order_BV, out_BV), float("-inf"))


def pick(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution, and its log-prob; temperature 0 is greedy.

    One uniform a row instead of one exponential a token: cheaper than ``torch.multinomial`` over a large
    vocabulary. The sum is taken in float64, so that rounding does not favor late tokens.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=-1), torch.zeros_like(logits_BV[:, 0], dtype=torch.float32)
    log_probs_BV = torch.log_softmax(top_p_logits(logits_BV.float() / temperature, top_p), dim=-1)
    cumulative_BV = log_probs_BV.double().exp_().cumsum_(dim=-1)
    target_B1 = (uniform_B.to(cumulative_BV) * cumulative_BV[:, -1])[:, None]
    picked_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    picked_B1.clamp_(max=logits_BV.shape[-1] - 1)
    return picked_B1[:, 0], log_probs_BV.gather(-1, picked_B1)[:, 0]


def sample(
    backbone: Backbone,
    role: str,
    prompts: Sequence[Sequence[int]],
    uniform_BR: Tensor,
    *,
    eos_id: int | Sequence[int],
    pad_id: int,
    temperature: float,
    any_process: Callable[[bool], bool] = bool,
    keep_trunk: bool = False,
    on_token: Callable[[Tensor], bool] | None = None,
) -> Sampled:
    """Sample one response a prompt under a role (``policy``, ``reference`` or another adapter).

    Its adapter is folded into the weights meanwhile. ``keep_trunk`` returns the frozen trunk's hidden states
    too, where there is a trunk and a plain cache; the number of steps then differs between processes: not
    under ZeRO-3. All else as in :func:`generate`.
    """
    backbone.activate(role)
    ends = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
    params = SamplingParams(temperature, ends, pad_id=pad_id)
    # behind another end than EOS there is one more token to read
    trunk_layers = backbone.frozen_layers if keep_trunk and len(ends) == 1 else 0
    with backbone.folded(role):
        return generate(
            ModelParts.of(backbone.base),
            prompts,
            uniform_BR,
            params,
            any_process=any_process,
            trunk_layers=trunk_layers,
            on_token=on_token,
        )


@torch.no_grad()
def generate(
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    uniform_BR: Tensor,
    params: SamplingParams,
    *,
    prefix: PrefixStates = (),
    any_process: Callable[[bool], bool] = bool,
    trunk_layers: int = 0,
    on_token: Callable[[Tensor], bool] | None = None,
) -> Sampled:
    """Sample one response a prompt.

    Equal prompts are read once. Rows that have ended leave the batch when they are a quarter of it. Neither
    changes a token.

    Args:
        parts: the model.
        prompts: token ids of each prompt, at least one each.
        uniform_BR: one uniform a token; R is the length limit.
        params: temperature, top-p and what ends a response.
        prefix: keys and values of a text that stands before every prompt; empty = none.
        any_process: whether any process still has unfinished rows; under ZeRO-3 all processes must take
            the same number of steps.
        trunk_layers: return the hidden states below this layer too, where the cache is plain; 0 = do not.
        on_token: called after every token with the ids so far [B, t]; False ends all responses there.

    Returns:
        Responses and the log-probs that they were sampled with.
    """
    decoder, pad_id, eos = parts.decoder, params.pad_id, sorted(params.eos_ids)
    uniform_BR = uniform_BR.to(device := next(parts.model.parameters()).device)
    rows, limit = uniform_BR.shape
    ids_BP, mask_BP = (t.to(device) for t in left_pad([list(p) for p in prompts], pad_id))
    response_BR = torch.full((rows, limit), pad_id, dtype=torch.long, device=device)
    log_probs_BR = torch.zeros(rows, limit, device=device)
    lengths_B = torch.zeros(rows, dtype=torch.long, device=device)
    eos_E = torch.tensor(eos, dtype=torch.long, device=device)

    width = ids_BP.shape[1]
    decoding = Decoding(
        decoder,
        parts.model.config.get_text_config(),
        width + limit + 1,
        prefix,
        additive_mask=not isinstance(decoder, LogitsAsStates),
    )
    cut = trunk_layers if decoding.plain else 0
    different, of = distinct(prompts)
    first_U = torch.tensor([of.index(number) for number in range(len(different))], device=device)
    of_B = torch.tensor(of, device=device)
    with TrunkRecord(decoder, cut) as trunk:
        hidden_LD = decoding.start(ids_BP[first_U], mask_BP[first_U])[:, -1]
        trunk.start(of_B, width + limit + 1)
        if len(different) < rows:
            decoding.select(of_B)
            hidden_LD = hidden_LD[of_B]
        row_L = torch.arange(rows, device=device)
        going_L = torch.ones(rows, dtype=torch.bool, device=device)
        with packed_weights(parts.model, rows):
            for t in range(limit):
                picked_L, log_prob_L = pick(
                    parts.head(hidden_LD), uniform_BR[row_L, t], params.temperature, params.top_p
                )
                token_L = torch.where(going_L, picked_L, pad_id)
                response_BR[row_L, t] = token_L
                log_probs_BR[row_L, t] = log_prob_L * going_L
                lengths_B[row_L] += going_L
                going_L = going_L & ~torch.isin(token_L, eos_E)
                if params.stop is not None:
                    going_L = going_L & ~params.stop.reached(response_BR[row_L, : t + 1], going_L)
                stopped = on_token is not None and not on_token(response_BR[:, : t + 1])
                going = 0 if stopped else int(going_L.sum())
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
                    decoding.step(torch.full_like(token_L, eos[0]))
                    trunk.note(row_L, width + limit)
    trunk_BTD = _masked(trunk.states_BTD, mask_BP, response_BR, eos)
    return Sampled(ids_BP, mask_BP, response_BR, log_probs_BR, lengths_B, trunk_BTD)


def _masked(states_BTD: Tensor | None, mask_BP: Tensor, response_BR: Tensor, eos: list[int]) -> Tensor | None:
    """The recorded states, 0 where neither prompt nor response nor a closing EOS is."""
    if states_BTD is None:
        return None
    open_B1 = ~ended(response_BR, eos)[:, None]
    real_BT = torch.cat([mask_BP, action_mask(response_BR, eos), open_B1], dim=1)
    return states_BTD.masked_fill_(~real_BT[..., None], 0)
