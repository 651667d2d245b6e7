"""Pairs through the policy: prompts and frozen layers once, the vocabulary for response tokens alone.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit, ``_S`` response token, ``_P`` pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.models import packing
from rlhf.models.packing import PackedBatch, Row, compare_packing, inputs_of
from rlhf.models.token_batches import token_batches
from rlhf.models.trunk_cache import ResponseStates, response_states
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Dpo

TOKENS_AT_ONCE = 2048  # tokens, padding included, of a forward pass without gradients
_ROW = 512  # tokens of a row of several responses, or four prompts: attention costs the square of it


class Reading(NamedTuple):
    """A prompt and responses that are read behind it: a pair, or all that pairs hold of them."""

    prompt: list[int]
    responses: list[list[int]]


def reading(pair: dict[str, Any]) -> Reading:
    """A pair: the chosen response, then the rejected."""
    return Reading(pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]])


def micro_batches(readings: Sequence[Reading], budget: int, *, share: bool) -> list[list[int]]:
    """Indices of readings of similar length; a batch is at most ``budget`` tokens with its padding."""
    total = sum if share else max
    widths = [len(one.prompt) + total(map(len, one.responses)) for one in readings]
    return token_batches(widths, budget, rows=None if share else [len(one.responses) for one in readings])


def pack(readings: Sequence[Reading], pad_id: int, *, share: bool) -> PackedBatch:
    """Rows of readings, each with its responses behind one copy of its prompt, or a row a response; the
    log-probabilities of all response tokens are wanted."""
    sequences: list[Row] = []
    bins: list[list[int]] = []
    prompts: list[list[int]] = []
    for one in readings:
        first, last = len(sequences), len(sequences) + len(one.responses)
        sequences += [Row(response, [True] * len(response)) for response in one.responses]
        own = [list(range(first, last))] if share else [[index] for index in range(first, last)]
        bins += own
        prompts += [one.prompt] * len(own)
    return packing.pack(sequences, bins, pad_id, prompts)


def distinct(pairs: Sequence[dict[str, Any]]) -> tuple[list[Reading], Tensor]:
    """Every response to a prompt once, however many pairs hold it.

    Returns:
        The readings, and where the chosen and the rejected response of each pair stand among their responses,
        flat, [2, P].
    """
    places: dict[Any, int] = {}
    found: dict[Any, list[int]] = {}  # of each prompt, its responses
    texts: list[list[int]] = []
    asked: list[int] = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            prompt, response = tuple(pair["prompt_ids"]), pair[side]
            place = places.setdefault((prompt, tuple(response)), len(texts))
            if place == len(texts):
                texts.append(response)
                found.setdefault(prompt, []).append(place)
            asked.append(place)
    readings: list[Reading] = []
    order: list[int] = []
    for prompt, own in found.items():
        room = 0
        for place in sorted(own, key=lambda i: len(texts[i])):
            if room < len(texts[place]):
                readings.append(Reading(list(prompt), []))
                room = max(max(_ROW, 4 * len(prompt)) - len(prompt), len(texts[place]))
            readings[-1].responses.append(texts[place])
            room -= len(texts[place])
            order.append(place)
    flat = torch.empty(len(order), dtype=torch.long)
    flat[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
    return readings, flat[torch.tensor(asked, dtype=torch.long)].view(2, -1)


class Forward:
    """How the policy reads pairs: which rows, from where on, and with which head.

    Args:
        head: hidden states to logits.
        pad_id: the padding token.
        share: the responses of a prompt behind one copy of it.
        trunk: states of all that is read below the first adapted layer, where they are kept.
    """

    def __init__(self, head: Any, pad_id: int, *, share: bool, trunk: ResponseStates | None) -> None:
        self.head, self.pad_id, self.share, self.trunk = head, pad_id, share, trunk

    def __call__(
        self, model: Any, readings: Sequence[Reading], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of every response token, nats, the entropy it was predicted with, and the response
        that it belongs to, counted over all readings; [S] each."""
        batch = pack(readings, self.pad_id, share=self.share).to(device)
        states = {"part": "all"} if self.trunk is None else self.trunk.inputs(batch)
        logps_S, entropy_S = packing.packed_log_probs(
            model(**inputs_of(model, batch), **states), batch, self.head
        )
        return logps_S, entropy_S, batch.owners_S


def plan_forward(
    recipe: Recipe, section: Dpo, model: Any, pairs: Sequence[dict[str, Any]], head: Any, pad_id: int
) -> Forward:
    """How this model can go over these pairs without computing anything twice; warnings are printed."""
    readings, device = distinct(pairs)[0], next(model.parameters()).device
    model.eval()
    lengths = [(len(one.prompt), sum(map(len, one.responses)), len(one.responses)) for one in readings]
    few = [readings[i] for i in {column.index(max(column)) for column in zip(*lengths, strict=True)}]

    def states(share: bool) -> Tensor:
        batch = pack(few, pad_id, share=share).to(device)
        return model(**inputs_of(model, batch), part="all")[batch.rows_B, batch.columns_B]

    share = section.share_prompts
    if share and (warning := compare_packing(states, model)):
        print(f"warning: {warning}", flush=True)
        share = False
    tokens = sum(len(one.prompt) + sum(map(len, one.responses)) for one in readings)
    trunk = response_states(
        recipe, section, model, tokens, readings, few,
        lambda some: micro_batches(some, TOKENS_AT_ONCE, share=share),
        lambda batch: pack(batch, pad_id, share=share),
    )  # fmt: skip
    return Forward(head, pad_id, share=share, trunk=trunk)
