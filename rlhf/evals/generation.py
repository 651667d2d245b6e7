"""Writing continuations with a key-value cache behind a fixed text whose states are computed once.

What a row says is a function of (seed, number of the row): neither the rows beside it nor the batch size
changes it beyond rounding.

Shape suffixes: ``_B`` row, ``_L`` row still in the batch, ``_P`` context token, ``_T`` token so far, ``_D``
hidden unit, ``_V`` vocabulary entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.evals.scoring import States
from rlhf.generation.kv_cache import Decoding, distinct
from rlhf.generation.sampling import pick, uniforms
from rlhf.models.folding import folded_weights
from rlhf.models.masks import left_pad, positions_from_mask
from rlhf.models.onednn import packed_weights


class Rules(NamedTuple):
    """How tokens are chosen, and when a row ends."""

    max_new_tokens: int
    """Longest continuation."""
    temperature: float
    """Divides the logits; 0 = always the most probable token."""
    top_p: float
    """Mass of the nucleus; 1 = the whole distribution."""
    seed: int
    """Of the random numbers."""
    ends: frozenset[int]
    """Tokens that end a row."""
    stop: tuple[str, ...]
    """Texts that end a row; cut off with all that follows."""


class Whole(nn.Module):
    """A model in one piece, where its parts cannot be trusted: its logits stand for hidden states.

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


class Parts(NamedTuple):
    """What of a model is needed to write."""

    model: nn.Module
    """All of it."""
    decoder: nn.Module
    """Tokens to hidden states."""
    head: Callable[[Tensor], Tensor]
    """Hidden states to logits."""
    config: Any
    """Configuration of the text model."""

    @classmethod
    def of(cls, model: PreTrainedModel, *, in_one_piece: bool) -> Parts:
        """The parts of a model, or all of it in the place of its decoder."""
        config = model.config.get_text_config()
        if in_one_piece:
            return cls(model, Whole(model), nn.Identity(), config)
        return cls(model, model.get_decoder(), model.get_output_embeddings(), config)


class Behind(Decoding):
    """Rows that are decoded together, each behind a copy of the same cached states.

    Args:
        parts: the model.
        room: tokens of a row, cached ones included, that there will be at most.
        states: of the text before every row; empty = none.
        rows: number of rows.
    """

    def __init__(self, parts: Parts, room: int, states: States, rows: int) -> None:
        super().__init__(parts.decoder, parts.config, room)
        self._ready_made = self._ready_made and not isinstance(parts.decoder, Whole)
        device = next(parts.model.parameters()).device
        length = states[0][0].shape[2] if states else 0
        if states:
            for layer, (keys, values) in zip(self._cache.layers, states, strict=True):
                layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        self._mask_BT = torch.ones(rows, length, dtype=torch.bool, device=device)
        self._position_B = torch.full((rows,), length, device=device)

    def start(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        """Feed left-padded contexts (mask: True = a real token); returns hidden states [B, P, D]."""
        self._mask_BT = torch.cat([self._mask_BT, mask_BP], dim=1)
        positions_BP = self._position_B[:, None] + positions_from_mask(mask_BP)
        self._position_B = self._position_B + mask_BP.sum(-1)
        return self._run(ids_BP, self._mask_BT.long(), positions_BP)


def nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Shut out all but the most probable tokens whose mass reaches ``top_p``.

    Returns the logits with -inf for the others; the most probable token always stays. Of tokens with equal
    logits at the edge the earlier ones of the vocabulary stay. Holtzman et al. 2020 (arXiv 1904.09751).
    """
    if top_p >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = sorted_BV.double().softmax(dim=-1)
    out_BV = mass_BV.cumsum(dim=-1) - mass_BV >= top_p  # what comes before it has the mass already
    out_BV[:, 0] = False
    return logits_BV.masked_fill(torch.zeros_like(out_BV).scatter(-1, order_BV, out_BV), float("-inf"))


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stops."""
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


@torch.no_grad()
def write(
    parts: Parts,
    rows: Sequence[Sequence[int]],
    numbers: Sequence[int],
    rules: Rules,
    decode: Callable[[Sequence[int]], str],
    states: States,
) -> list[str]:
    """Continue one batch of rows.

    Args:
        parts: the model.
        rows: token ids of each row behind the states, at least one each; equal ones are read once.
        numbers: each row's number, which its random numbers belong to.
        rules: how tokens are chosen.
        decode: token ids to text.
        states: of the text before every row; empty = none.

    Returns:
        What each row says, up to what ended it.
    """
    device, limit = next(parts.model.parameters()).device, rules.max_new_tokens
    uniform_BT = uniforms(rules.seed, "evaluate", 0, numbers, limit).to(device)
    different, of = distinct(rows)
    ids_BP, mask_BP = (x.to(device) for x in left_pad(different, 0))
    cached = states[0][0].shape[2] if states else 0
    decoding = Behind(parts, cached + ids_BP.shape[1] + limit + 1, states, len(different))
    hidden_LD = decoding.start(ids_BP, mask_BP)[:, -1]
    if len(different) < len(rows):
        of_B = torch.tensor(of, device=device)
        decoding.select(of_B)
        hidden_LD = hidden_LD[of_B]
    said: list[list[int]] = [[] for _ in rows]
    row_L, open_L = list(range(len(rows))), [True] * len(rows)
    with packed_weights(parts.model, len(rows), folded_weights):
        for t in range(limit):
            token_L = _choose(parts.head(hidden_LD).float(), uniform_BT[row_L, t], rules)
            for place, (row, token) in enumerate(zip(row_L, token_L.tolist(), strict=True)):
                if open_L[place]:
                    open_L[place] = _add(said[row], token, rules, decode)
            going = [place for place, is_open in enumerate(open_L) if is_open]
            if not going or t + 1 == limit:
                break
            hidden_LD = decoding.step(token_L)
            if 4 * len(going) <= 3 * len(row_L):
                stay_L = torch.tensor(going, device=device)
                decoding.select(stay_L)
                hidden_LD = hidden_LD[stay_L]
                row_L, open_L = [row_L[place] for place in going], [True] * len(going)
    return [cut(decode(tokens), rules.stop) for tokens in said]


def _choose(logits_LV: Tensor, uniform_L: Tensor, rules: Rules) -> Tensor:
    if rules.temperature == 0:
        return logits_LV.argmax(dim=-1)
    return pick(nucleus(logits_LV / rules.temperature, rules.top_p), uniform_L, 1.0)[0]


def _add(said: list[int], token: int, rules: Rules, decode: Callable[[Sequence[int]], str]) -> bool:
    """Add a token to what a row has said; whether the row goes on."""
    if token in rules.ends:
        return False
    said.append(token)
    # a stop of n bytes has at most n tokens; a few more, because the first ones may be half a letter
    tail = decode(said[-max(len(s.encode()) for s in rules.stop) - 4 :]) if rules.stop else ""
    return not any(s in tail for s in rules.stop)
