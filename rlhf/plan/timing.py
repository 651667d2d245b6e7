"""How long a step takes, from one measured micro-batch of each kind; the model has to be in place."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf.errors import UserError
from rlhf.generation.sampling import sample, uniforms
from rlhf.models.backbone import Backbone
from rlhf.models.base import best_device, load_base
from rlhf.plan.lengths import lengths_of
from rlhf.recipe.load import Recipe
from rlhf.runs.dtype import settled
from rlhf.runs.stage import RUNS

_FEW = 4  # tokens that are sampled to time one


class Pace(NamedTuple):
    """Seconds, measured."""

    training: float
    """Of a token, forward and backward through the adapted layers."""
    passing: float
    """Of a token, forward without gradients."""
    token: float
    """Of one more token of all rows of a rollout batch."""


def timed(recipe: Recipe) -> str:
    """A line about the time of a step of PPO and of the reward stage.

    Raises:
        UserError: the model is not in place.
    """
    if not Path(recipe.model.path, "config.json").expanduser().is_file():
        raise UserError(
            f"time=true measures a micro-batch, and {recipe.model.path} is not in place: run `make model "
            "RECIPE=...` first"
        )
    recipe = settled(recipe, RUNS / recipe.name)
    prompt = lengths_of(recipe).prompt
    pace = measured(recipe, prompt)
    ppo = step_seconds(recipe, pace, prompt)
    return (
        f"time: about {ppo:.1f} s a step of PPO, {ppo * recipe.ppo.steps / 60:.0f} min for all "
        f"{recipe.ppo.steps}; {1e3 * pace.training:.2f} ms a token to train, {1e3 * pace.passing:.2f} to "
        f"read, {pace.token:.2f} s to sample one for {recipe.ppo.rollout_batch_size} rows (one process)"
    )


def step_seconds(recipe: Recipe, pace: Pace, prompt: int) -> float:
    """Seconds of a PPO step of one process: sampling, a pass of every role, and the epochs of policy and
    value."""
    section, response = recipe.ppo, recipe.dialogue.max_response_tokens
    tokens = section.batch_size * (prompt + response + 1)
    own = section.has_value and section.value == "adapter"
    roles = 2 + own + len(section.named_models) + (recipe.reward.scorers if section.own_reward else 0)
    if section.ensemble == "average":  # one adapter reads for all members
        roles -= recipe.reward.members - 1
    sampling = -(-section.batch_size // section.rollout_batch_size) * response * pace.token
    return sampling + tokens * (roles * pace.passing + section.epochs * (1 + own) * pace.training)


def measured(recipe: Recipe, prompt: int) -> Pace:
    """Load the base with one adapter and time a micro-batch of each kind, the second of two."""
    section, response = recipe.ppo, recipe.dialogue.max_response_tokens
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["policy"], trainable=["policy"])
    backbone.check_architecture()
    device = best_device()
    backbone.to(device)
    vocabulary = int(backbone.base.config.get_text_config().vocab_size)
    width = prompt + response + 1
    ids_BT = torch.arange(section.micro_batch_size * width, device=device).view(-1, width) % vocabulary
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    hidden_BTD = backbone.trunk(ids_BT, mask_BT)

    def forward() -> Any:
        return backbone("policy", ids_BT, mask_BT, hidden_BTD, start=prompt)[0]

    def train() -> None:
        forward().sum().backward()

    @torch.no_grad()
    def read() -> None:
        forward()

    def draw() -> None:
        rows = range(section.rollout_batch_size)
        prompts = [[(7 * row + i) % vocabulary for i in range(prompt)] for row in rows]
        options: dict[str, Any] = {"eos_id": vocabulary, "pad_id": 0, "temperature": 1.0}
        for number in counts:
            began = time.monotonic()
            sample(backbone, "policy", prompts, uniforms(0, "plan", 0, rows, number), **options)
            counts[number] = time.monotonic() - began

    counts = {1: 0.0, 1 + _FEW: 0.0}
    with backbone.folded("policy"):
        trained, passed = (_second(work) / ids_BT.numel() for work in (train, read))
        draw()
    first, more = counts.values()
    return Pace(trained, passed, max(0.0, more - first) / _FEW)


def _second(work: Callable[[], None]) -> float:
    """Seconds of a piece of work, at its second run."""
    seconds = 0.0
    for _ in range(2):
        began = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
    return seconds
