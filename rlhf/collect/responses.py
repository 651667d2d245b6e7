"""Responses to rank: sampled from the base and from saved policies, all on one base in memory.

Several policies make comparisons more diverse than the newest one alone (Bai et al. 2022, "Training a Helpful
and Harmless Assistant", arXiv:2204.05862, section 4.5). What is sampled depends on the seed, the purpose and
the row, not on a restart or on what is sampled beside it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rlhf.data.comparisons import Prompt
from rlhf.generation.sampling import sample, uniforms
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.base import best_device, load_base
from rlhf.recipe.load import Recipe
from rlhf.recipe.types import BASE
from rlhf.runs.folder import StageFolder
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.progress import progress


class Batch(NamedTuple):
    """Prompts that were sampled together."""

    first: int
    """Row of the first one."""
    prompts: Sequence[Prompt]
    responses: list[list[str]]
    """K texts a prompt; one may be empty, or stand twice."""
    writers: list[list[str]]
    """Who wrote each: `base` or a folder."""


def deal(policies: Sequence[str], prompts: int, responses: int, seed: int) -> list[list[str]]:
    """Who writes each of K responses to each prompt.

    All get equally many (one more or less), in an order that is shuffled anew each time all have had one, so
    that each meets each other. More prompts go on from the same beginning.
    """
    rng, hand, dealt = random.Random(f"{seed}:policies"), list[str](), list[str]()
    while len(dealt) < prompts * responses:
        hand = rng.sample(list(policies), len(policies))
        dealt += hand
    return [dealt[i * responses : (i + 1) * responses] for i in range(prompts)]


def sampled_responses(
    recipe: Recipe,
    run: StageFolder,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    *,
    policies: Sequence[str],
    responses: int,
    temperature: float,
    prompts_per_batch: int,
    purpose: str,
    first: int = 0,
) -> Iterator[Batch]:
    """Sample K responses a prompt; a finished batch survives an interruption.

    Args:
        recipe: says the base, the adapters' shape and the seed.
        run: the folder of the stage; finished batches lie in its ``parts`` folder.
        dialogue: the token contract.
        prompts: one row each.
        policies: `base` or folders of saved adapters (:func:`rlhf.runs.initial_adapter.policy_files`).
        responses: K.
        temperature: of the sampling.
        prompts_per_batch: sampled together.
        purpose: sets these random numbers apart from others of the seed; also names the progress.
        first: row of the first prompt, so that a part comes out as it would within the whole.

    Raises:
        UserError: an adapter does not fit the base.
    """
    backbone = functools.cache(partial(_backbone, recipe, policies))  # not loaded where all batches are there
    writers = deal(policies, first + len(prompts), responses, recipe.seed)[first:]

    def texts(start: int, end: int) -> list[list[str]]:
        encoded = [dialogue.encode_prompt(p) for p in prompts[start:end] for _ in range(responses)]
        by = [writer for row in writers[start:end] for writer in row]
        found = [""] * len(encoded)
        for writer in dict.fromkeys(by):
            own = [i for i, other in enumerate(by) if other == writer]
            rows = [(first + start) * responses + i for i in own]
            sampled = sample(
                backbone(),
                _role(writer, policies),
                [encoded[i] for i in own],
                uniforms(recipe.seed, purpose, 0, rows, dialogue.max_response_tokens),
                eos_id=dialogue.end_ids,
                pad_id=dialogue.pad_id,
                temperature=temperature,
            )
            for i, ids in zip(own, sampled.response_ids_BR.tolist(), strict=True):
                found[i] = dialogue.decode(ids)
        return [found[i : i + responses] for i in range(0, len(found), responses)]

    label = "comparisons" if purpose == "collect" else purpose
    starts = range(0, len(prompts), prompts_per_batch)
    for number, start in enumerate(progress(label, starts, leave=True)):
        end = min(start + prompts_per_batch, len(prompts))
        kept = run.remember(f"{number:05d}", partial(texts, start, end))
        yield Batch(first + start, prompts[start:end], kept, writers[start:end])


def _role(writer: str, policies: Sequence[str]) -> str:
    return REFERENCE if writer == BASE else f"policy{policies.index(writer)}"


def _backbone(recipe: Recipe, policies: Sequence[str]) -> Backbone:
    folders = {_role(p, policies): Path(p) for p in policies if p != BASE}
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=[*folders] or ["policy"])
    for role, folder in folders.items():
        backbone.load_adapter(role, folder)
    backbone.check_architecture()
    return backbone.to(best_device())
