"""The evaluation of the policy."""

from __future__ import annotations

from typing import Literal

from rlhf.schema.fields import Positive, Rate, Section


class Evaluate(Section):
    """Before against after on held-out prompts, paired."""

    judge: Literal["vader", "reward"] = "reward"
    """Who scores the responses: a gold judge, or a reward model."""
    reward_model: str | None = None
    """Folder of the reward model that judges; null = this run's own (then the score is the trained proxy)."""
    prompts: Positive = 128
    """Held-out prompts."""
    samples: Positive = 1
    """Responses a prompt."""
    temperature: Rate = 1.0
    """Sampling temperature of both sides."""
    batch_size: Positive = 32
    """Responses generated together."""
    pairs_shown: Positive = 10
    """Sample pairs in the summary."""
