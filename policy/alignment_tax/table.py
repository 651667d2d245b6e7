"""What ``tax.json`` says, put together from the outcomes; no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from policy.alignment_tax.comparison import task_figures
from policy.alignment_tax.models import ModelVariant, tokenizer_hash, variant_hash
from rlhf.evals.outcome import Outcome
from rlhf.recipe.load import Recipe
from rlhf.recipe.stored import modernized
from rlhf.recipe.tax import Tax
from rlhf.runs.stage import input_hashes

Outcomes = dict[str, dict[str, Outcome]]
"""By task, by variant."""
PER_TOKEN = ("nats_per_token", "perplexity of lm_loss")
"""What models with other tokens do not share."""
_SCORE = ("judge", "reward_model", "prompts", "samples_per_prompt", "temperature")
_SHOWN = ("torch", "transformers", "lm-eval")


def table_of(
    recipe: Recipe, section: Tax, variants: Sequence[ModelVariant], outcomes: Outcomes
) -> dict[str, Any]:
    """Everything that ``tax.json`` says but for cost and picture."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "reference": section.reference,
        "variants": [
            {
                "name": variant.name,
                "what": variant.what,
                "base": variant.base,
                "adapters": [list(adapter) for adapter in variant.adapters],
                "prompted": variant.prompted,
                "sha256": variant_hash(variant, recipe),
            }
            for variant in variants
        ],
        "tasks": [task_figures(by_variant, section.reference) for by_variant in outcomes.values()],
        "reward_model_hhh": None,
        "groups_shown": section.groups_shown,
        "evaluate": score_settings(recipe) if section.score else None,
        "notes": notes_of(recipe, section, variants),
        "files": {name: input_hashes(task.files) for name, task in section.tasks.items()},
        "versions": {name: importlib.metadata.version(name) for name in _SHOWN if _installed(name)},
    }


def score_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of the section `evaluate` that the task `score` uses."""
    return {key: value for key, value in recipe.evaluate.model_dump(mode="json").items() if key in _SCORE}


def same_score_settings(noted: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a ``tax.json``, of an earlier version perhaps, was made with the settings that a recipe has."""
    former = modernized({"evaluate": noted})["evaluate"]
    return {key: former.get(key) for key in _SCORE} == score_settings(recipe)


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def notes_of(recipe: Recipe, section: Tax, variants: Sequence[ModelVariant]) -> list[str]:
    """What a reader must know of the variants."""
    notes = [
        "the intervals are over items: every arm is one training run, and how far another seed of the same "
        "training would be from it is not in them"
    ]
    reference = next(variant for variant in variants if variant.name == section.reference)
    foreign = [variant.name for variant in variants if tokenizer_hash(variant) != tokenizer_hash(reference)]
    if foreign:
        notes.append(
            f"{', '.join(foreign)}: another tokenizer than {reference.name}; figures per token "
            f"({', '.join(PER_TOKEN)}) are not comparable with it, those per byte, word and answer are"
        )
    if any(variant.prompted for variant in variants):
        notes.append(
            f"prompted arms read {recipe.hhh_prompt} before every item; the prompts of `score` follow it as "
            "a new turn"
        )
    return notes
