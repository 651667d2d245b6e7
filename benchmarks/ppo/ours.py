"""Our side of the PPO benchmark: the loop of ``make ppo``, policy, value and reward on one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.harness import Figures
from benchmarks.ppo.task import PHASES, Clock, Task, dialogue_of, figures
from benchmarks.ppo.work import Method, Sizes, sizes_of
from policy.ppo.setup import score_function
from policy.ppo.trainer import PpoTrainer
from rlhf.data.comparisons import Message, Prompt
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import StageRun
from rlhf.training.metrics import Metrics


def recipe_of(task: Task, rows: int) -> Recipe:
    """The recipe that does a task.

    Args:
        task: what to do.
        rows: responses of a step.
    """
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "seed": task.seed,
            "model": {"path": task.base},
            "lora": {"rank": task.rank, "alpha": task.alpha, "layers": task.layers},
            "dialogue": {"template": "plain", "max_response_tokens": task.response_tokens},
            "data": {"comparisons": "none"},
            "ppo": {
                "reward_model": ["made here"],  # its adapter is made below, nothing is read
                "steps": task.steps,
                "batch_size": rows,
                "rollout_batch_size": rows,
                "micro_batch_size": min(task.micro_batch, rows),
                "epochs": task.epochs,
                "temperature": task.temperature,
                "learning_rate": task.learning_rate,
                "adam_epsilon": task.adam_epsilon,
                "kl_coef": task.kl_coef,
                "missing_eos": "subtract",
                "missing_eos_penalty": task.missing_eos_penalty,
                "checkpoint_every": 1_000_000,
            },
        }
    )


def backbone_of(recipe: Recipe) -> tuple[Backbone, Sizes]:
    """Policy, value and reward on one base; the value starts as a copy of the fresh reward head."""
    torch.manual_seed(recipe.seed)
    base = load_base(recipe.model)
    sizes = sizes_of(base)
    backbone = Backbone(
        base,
        recipe.lora,
        adapters=("policy", "value", "reward"),
        heads=("value", "reward"),
        trainable=("policy", "value"),
    )
    backbone.heads["value"].load_state_dict(backbone.heads["reward"].state_dict())
    warning = backbone.check_architecture()
    if warning:
        raise RuntimeError(warning)
    return backbone, sizes


def ours(task: Task, rows: list[dict[str, Any]], scratch: Path) -> Figures:
    """All steps of a task on all prompts."""
    recipe = recipe_of(task, len(rows))
    dialogue = dialogue_of(task.base, task.response_tokens)
    prompts: list[Prompt] = [(Message("user", row["text"]),) for row in rows]
    if [dialogue.encode_prompt(prompt) for prompt in prompts] != [row["ids"] for row in rows]:
        raise RuntimeError("ours: the prompts are not the token ids that theirs gets")
    backbone, sizes = backbone_of(recipe)
    run = StageRun("ppo", scratch, recipe, {}, {}, is_main=True, lock=None)
    trainer = PpoTrainer(
        backbone=backbone,
        dialogue=dialogue,
        prompts=prompts,
        reward_fn=score_function(recipe, run, backbone, dialogue),
        section=recipe.ppo,
        folder=scratch,
        seed=recipe.seed,
    )
    clock, log = Clock(), Metrics.log

    def log_and_cut(metrics: Metrics, step: int, values: dict[str, float]) -> None:
        log(metrics, step, values)
        phases = {n: values[f"time/{n}"] for n in (*PHASES, "rollout") if f"time/{n}" in values}
        clock.end_step(phases, values["response/length"] * len(rows))

    with patch.object(Metrics, "log", log_and_cut):
        clock.start()
        trainer.train()
    method = Method(
        task.epochs, task.rank, task.adapted(sizes.layers), passes=4, heads=2, adapters=3,
        cached=bool(backbone.frozen_layers),
    )  # fmt: skip
    return {
        **figures(
            clock.steps, sizes, method, rows=len(rows), prompt_tokens=sum(len(row["ids"]) for row in rows)
        ),
        "trainable_parameters": sum(p.numel() for p in backbone.parameters() if p.requires_grad),
        "trunk_kept": bool(backbone.frozen_layers),
    }
