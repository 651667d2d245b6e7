"""What ``tax.json`` says, put together from the outcomes; no torch."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from policy.alignment_tax.comparison import task_figures
from policy.alignment_tax.models import Arm, arm_hash, tokenizer_hash
from rlhf.evals.outcome import Outcome
from rlhf.recipe.load import Recipe
from rlhf.recipe.tax import Tax
from rlhf.runs.stage import input_hashes

Outcomes = dict[str, dict[str, Outcome]]
"""By task, by arm."""
PER_TOKEN = ("nats_per_token", "perplexity of lm_loss")
"""What models with other tokens do not share."""
_SHOWN = ("torch", "transformers", "lm-eval")


def table_of(recipe: Recipe, section: Tax, arms: Sequence[Arm], outcomes: Outcomes) -> dict[str, Any]:
    """Everything that ``tax.json`` says but for cost and picture."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "reference": section.reference,
        "arms": [
            {
                "name": arm.name,
                "what": arm.what,
                "base": arm.base,
                "adapters": [list(adapter) for adapter in arm.adapters],
                "prompted": arm.prompted,
                "sha256": arm_hash(arm, recipe),
            }
            for arm in arms
        ],
        "tasks": [task_figures(by_arm, section.reference) for by_arm in outcomes.values()],
        "reward_model_hhh": None,
        "groups_shown": section.groups_shown,
        "evaluate": score_settings(recipe) if section.score else None,
        "notes": notes_of(recipe, section, arms),
        "files": {name: input_hashes(task.files) for name, task in section.tasks.items()},
        "versions": {name: importlib.metadata.version(name) for name in _SHOWN if _installed(name)},
    }


def score_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of the section `evaluate` that the task `score` uses."""
    keys = ("judge", "reward_model", "prompts", "samples", "temperature")
    return {key: value for key, value in recipe.evaluate.model_dump(mode="json").items() if key in keys}


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def notes_of(recipe: Recipe, section: Tax, arms: Sequence[Arm]) -> list[str]:
    """What a reader must know of the arms."""
    notes = [
        "the intervals are over items: every arm is one training run, and how far another seed of the same "
        "training would be from it is not in them"
    ]
    reference = next(arm for arm in arms if arm.name == section.reference)
    foreign = [arm.name for arm in arms if tokenizer_hash(arm) != tokenizer_hash(reference)]
    if foreign:
        notes.append(
            f"{', '.join(foreign)}: another tokenizer than {reference.name}; figures per token "
            f"({', '.join(PER_TOKEN)}) are not comparable with it, those per byte, word and answer are"
        )
    if any(arm.prompted for arm in arms):
        notes.append(
            f"prompted arms read {recipe.hhh_prompt} before every item; the prompts of `score` follow it as "
            "a new turn"
        )
    return notes
