"""A saved reward model as trl's online trainers take one: a function of prompts and completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from reward.model.model import TextRewardModel
from rlhf.data.comparisons import Message, Prompt

Turns = str | Sequence[dict[str, Any]]
"""A text, or messages {role, content}."""


class RewardFunc(Protocol):
    """What ``reward_funcs`` of ``trl.RLOOTrainer`` and ``trl.GRPOTrainer`` takes."""

    __name__: str

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[Turns], **columns: Any) -> list[float]:
        """Scores, higher is better, one a completion."""


def as_reward_func(
    folder: str | Path, device: torch.device | str = "cpu", *, trust_remote_code: bool = False
) -> RewardFunc:
    """A saved reward model for ``reward_funcs``; it reads text with its own tokenizer and lengths.

    Args:
        folder: a reward model of ours, ``runs/NAME/reward/model``.
        device: where it runs.
        trust_remote_code: run Python code that comes with its base.

    Raises:
        UserError: the folder holds no reward model of ours, or one without a score.
    """
    model = TextRewardModel(Path(folder), device, trust_remote_code=trust_remote_code)

    def reward_model(prompts: Sequence[Turns], completions: Sequence[Turns], **_columns: Any) -> list[float]:
        asked = [_prompt(turns) for turns in prompts]
        said = [turns if isinstance(turns, str) else turns[-1]["content"] for turns in completions]
        with torch.no_grad():
            return [float(x) for x in model.score(asked, said)]

    return reward_model


def _prompt(turns: Turns) -> Prompt:
    if isinstance(turns, str):
        return (Message("user", turns),)
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)
