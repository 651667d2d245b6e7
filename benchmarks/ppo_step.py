"""Processor seconds of a recipe's first PPO step by its parts, and where they go.

    OMP_NUM_THREADS=1 python -m benchmarks.ppo_step [--profile] RECIPE [section.key=value ...]

The reward model is a random adapter of the base, so that no stage has to run before. Processor seconds of one
thread leave out what other programs on the machine take.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from policy.ppo import rollout
from policy.ppo.rollout import Responses
from policy.ppo.setup import new_backbone
from policy.ppo.trainer import PpoTrainer
from policy.ppo.update import Updater
from rlhf.data.prompts import read_prompts
from rlhf.errors import CommandLine, exit_on_user_error
from rlhf.models.base import load_base
from rlhf.recipe.load import load
from rlhf.runs.dtype import settled
from rlhf.runs.stage import RUNS
from rlhf.tokenization.dialogue import load_dialogue

_PARTS: dict[str, tuple[Any, str]] = {
    "sampling": (rollout, "_sampled"),
    "log-probs and values": (rollout, "_scored_by_roles"),
    "update": (Updater, "__call__"),
}
_ROWS = 16  # of the profile's table


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """The same function, which adds its processor seconds to a name's."""

    def call(*args: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return function(*args, **options)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - began

    return call


def main() -> None:
    """The command line."""
    parser = CommandLine(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="print torch.profiler's table of operators")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    recipe = load(chosen.recipe, [*chosen.overrides, "ppo.steps=1"])
    recipe = settled(recipe, RUNS / recipe.name)
    prompts, _ = read_prompts(recipe.data.prompts, on_bad_rows=recipe.data.on_bad_rows)
    torch.manual_seed(recipe.seed)
    backbone = new_backbone(load_base(recipe.model), recipe.lora, recipe.ppo, rewards=["reward"])
    torch.nn.init.normal_(backbone.heads["reward"].weight, std=0.05)  # type: ignore[arg-type]

    def score(said: Responses) -> Tensor:
        with backbone.folded("reward"):
            scores_B: Tensor = backbone("reward", said.ids_BT, said.mask_BT, said.hidden_BTD)
            return scores_B

    seconds: dict[str, float] = {}
    for name, (holder, attribute) in _PARTS.items():
        setattr(holder, attribute, timed(getattr(holder, attribute), seconds, name))
    profiler = profile(activities=[ProfilerActivity.CPU]) if chosen.profile else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PpoTrainer(
            backbone=backbone,
            dialogue=load_dialogue(recipe),
            prompts=prompts,
            reward_fn=score,
            section=recipe.ppo,
            folder=folder,
            seed=recipe.seed,
        )
        with profiler:
            timed(trainer.train, seconds, "whole step")()
    print(f"{recipe.model.dtype}: " + ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items()))
    if isinstance(profiler, profile):
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=_ROWS))


if __name__ == "__main__":
    exit_on_user_error(main)
