"""The fields of a recipe: what each means, its unit, its default and where the default comes from.

A recipe is strict: an unknown key, a wrong type or a combination that cannot work is an error before torch
is imported. The sentence under a field is its documentation.
"""

from __future__ import annotations

import re

from pydantic import field_validator, model_validator

from rlhf.schema.contract import SAMPLED, Data, Dialogue, Distributed, Lora, Model
from rlhf.schema.evaluate import Evaluate
from rlhf.schema.fields import Section
from rlhf.schema.ppo import Ppo
from rlhf.schema.preferences import Card, Collect, Pmp, PreferenceTraining, Reward

__all__ = [
    "SAMPLED",
    "Card",
    "Collect",
    "Data",
    "Dialogue",
    "Distributed",
    "Evaluate",
    "Lora",
    "Model",
    "Pmp",
    "Ppo",
    "PreferenceTraining",
    "Recipe",
    "Reward",
    "Section",
]


class Recipe(Section):
    """One experiment: the contract shared by all stages, then one section a stage."""

    name: str
    """The run's folder: runs/<name>."""
    seed: int = 0
    """The one seed of all randomness."""
    model: Model
    lora: Lora = Lora()
    dialogue: Dialogue = Dialogue()
    data: Data
    collect: Collect = Collect()
    pmp: Pmp | None = None
    reward: Reward = Reward()
    card: Card = Card()
    ppo: Ppo = Ppo()
    evaluate: Evaluate = Evaluate()
    distributed: Distributed = Distributed()

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("a run name has letters, digits, dots, dashes and underscores only")
        return value

    @model_validator(mode="after")
    def _needs(self) -> Recipe:
        if self.data.sampled and not (self.data.prompts and self.data.held_out_prompts):
            raise ValueError(
                "data.comparisons=sampled needs data.prompts and data.held_out_prompts to sample from"
            )
        if self.evaluate.judge == "vader" and self.evaluate.reward_model:
            raise ValueError("evaluate.reward_model is only used with evaluate.judge=reward; remove one")
        return self
