"""Packed comparisons through a reward model: scores and log-probabilities of batches and of whole sets.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit, ``_R`` response, flat and in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reward.model.batch import (
    Example,
    PackedComparisons,
    Wanted,
    as_example,
    distinct,
    micro_batches,
    pack,
    width,
)
from rlhf.models.packing import compare_packing, inputs_of, sequence_log_probs
from rlhf.models.trunk_cache import ResponseStates
from rlhf.training.progress import progress

TOKENS_AT_ONCE = 4096  # tokens, padding included, of one scoring batch


def forward_packed(
    model: Any, packed: PackedComparisons, trunk: ResponseStates | None = None
) -> tuple[Tensor, Tensor]:
    """Last hidden states [N, T, D] and one score a response [R]."""
    hidden = {"part": "all"} if trunk is None else trunk.inputs(packed)
    places = {name: getattr(packed, name) for name in ("rows_B", "columns_B", "starts_B")}
    return model(**inputs_of(model, packed), **hidden, **places)


@torch.no_grad()
def read_examples(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    read: Callable[[PackedComparisons, Tensor, Tensor], Tensor],
    *,
    share: bool,
    trunk: ResponseStates | None = None,
    wanted: Wanted = "none",
    tokens: int = TOKENS_AT_ONCE,
    name: str = "score",
) -> Tensor:
    """One row a response, flat and in order, float32 on the CPU: what ``read`` makes of the packed examples,
    their last hidden states [N, T, D] and their scores [R]; what several examples hold is read once."""
    examples, places_R = distinct(examples, tokens)
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}  # of each example
    for batch in progress(name, micro_batches(examples, tokens, share=share)):
        packed = pack([examples[i] for i in batch], pad_id, share=share, wanted=wanted).to(device)
        rows = read(packed, *forward_packed(model, packed, trunk)).float().cpu()
        sizes = [len(examples[i]["responses"]) for i in batch]
        found.update(zip(batch, rows.split(sizes), strict=True))
    return torch.cat([found[i] for i in range(len(examples))])[places_R]


def score_examples(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    *,
    share: bool = True,
    tokens: int = TOKENS_AT_ONCE,
    vocabulary: nn.Module | None = None,
    trunk: ResponseStates | None = None,
) -> tuple[Tensor, ...]:
    """Raw head output of every response, flat and in order, [sum of K], float32 on the CPU.

    With ``vocabulary`` also the responses' summed log-probabilities and their token counts, shaped alike.
    """

    def read(packed: PackedComparisons, hidden_NTD: Tensor, scores_R: Tensor) -> Tensor:
        more = () if vocabulary is None else sequence_log_probs(hidden_NTD, packed, vocabulary)
        return torch.stack([scores_R, *more], dim=1)

    if not examples:
        return (torch.zeros(0),) * 3
    wanted: Wanted = "none" if vocabulary is None else "all"
    options: Any = {"share": share, "trunk": trunk, "wanted": wanted, "tokens": tokens}
    return read_examples(model, examples, pad_id, read, **options).unbind(dim=1)


def scores_of(model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Tensor:
    """Raw head output of prompts with a closed response each, [len(rows)], in order, float32 on the CPU."""
    examples = [as_example(response, prompt) for prompt, response in rows]
    return score_examples(model, examples, pad_id, share=False)[0]


def check_packing(model: nn.Module, examples: Sequence[Example], pad_id: int) -> str | None:
    """A warning where the model reads the most awkward examples otherwise if their prompts are shared."""
    some = awkward(distinct(examples, TOKENS_AT_ONCE).examples)
    return compare_packing(
        lambda share: read_examples(model, some, pad_id, last_states, share=share, name="packing"), model
    )


def last_states(packed: PackedComparisons, hidden_NTD: Tensor, _: Tensor) -> Tensor:
    """The states that scores are read from, [R, D]."""
    return hidden_NTD[packed.rows_B, packed.columns_B]


def awkward(examples: Sequence[Example]) -> list[Example]:
    """Those of the examples in which a wrong mask shows: the longest row with and without the prompt shared,
    the longest shared prompt, the most responses, and the shortest response."""
    sizes = [
        (
            width(e, True),
            width(e, False),
            len(e["prompt"]) * (len(e["responses"]) > 1),
            len(e["responses"]),
            -min(map(len, e["responses"])),
        )
        for e in examples
    ]
    found = {column.index(max(column)) for column in zip(*sizes, strict=True)}
    return [examples[i] for i in sorted(found)]
