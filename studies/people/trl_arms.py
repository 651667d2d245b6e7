"""trl's RLOO and GRPO trainers on our adapter, prompts and token contract, against our saved reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from reward.model.reward_func import RewardFunc, Turns, as_reward_func
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.models.base import best_device
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Ppo
from rlhf.runs.artifacts import WEIGHTS, read_jsonl, staged_folder
from rlhf.tokenization.dialogue import Dialogue, load_dialogue
from rlhf.training.hf_trainer import ADAPTER, adapted_base
from studies.people.plan import samples

TRAINERS: dict[str, tuple[Any, Any]] = {
    "trl_rloo": (RLOOTrainer, RLOOConfig),
    "trl_grpo": (GRPOTrainer, GRPOConfig),
}


def train(recipe: Recipe, arm: str, reward_model: Path, run: Path) -> Path:
    """Train an adapter with as many responses, optimizer steps and passes as PPO's; returns its folder.

    Args:
        recipe: its ``ppo`` section gives sizes, rates, temperature and the KL coefficient.
        arm: of :data:`TRAINERS`.
        reward_model: folder of the reward model.
        run: the run's folder, whose comparisons stage is done; an adapter that is there is not made again.

    Raises:
        UserError: ``ppo.start`` names a stage.
    """
    place = run / arm / "policy"
    if (place / WEIGHTS).is_file():
        return place
    section = recipe.ppo
    if section.start in ("sft", "distill"):
        raise UserError(f"ppo.start={section.start}: the study needs the folder of that stage's adapter")
    dialogue = load_dialogue(recipe)
    backbone = adapted_base(recipe, "dpo", Path(section.start) if section.start else None)
    generation: Any = backbone.base.generation_config
    generation.eos_token_id = list(dialogue.end_ids)
    rows = [{"prompt": row["messages"]} for row in read_jsonl(run / "comparisons" / "prompts.jsonl")]
    prompts = section.batch_size // samples(recipe)  # of a step; of fewer, trl's loader makes no step at all
    rows *= -(-prompts // len(rows))
    kind, config = TRAINERS[arm]

    def tokenized(prompts: Sequence[list[dict[str, str]]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [dialogue.encode_prompt([Message(**turn) for turn in p]) for p in prompts], None, {}

    trainer = kind(
        model=backbone.model,
        reward_funcs=scored_as_ppo(as_reward_func(reward_model, best_device()), section, dialogue),
        args=config(**arguments(recipe, run / arm)),
        train_dataset=Dataset.from_list(rows),
        processing_class=dialogue.tokenizer,
    )
    trainer._tokenize_prompts = tokenized  # our token contract
    done, wanted = trainer.train().global_step, trainer.args.max_steps
    if done != wanted:
        raise RuntimeError(f"{arm}: {done} optimizer steps instead of {wanted}")
    with staged_folder(place) as staging:
        backbone.save_adapter(ADAPTER, staging)
    return place


def arguments(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Fields of trl's configurations at PPO's sizes: each rollout of ``ppo.batch_size`` responses is used in
    ``ppo.minibatches`` x ``ppo.epochs`` optimizer steps."""
    s = recipe.ppo
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": s.batch_size // s.minibatches,
        "steps_per_generation": s.minibatches,
        "num_iterations": s.epochs,
        "max_steps": s.steps * s.minibatches * s.epochs,
        "num_generations": samples(recipe),
        "max_completion_length": recipe.dialogue.max_response_tokens,
        "temperature": s.temperature,
        "beta": s.kl_coef,
        "epsilon": s.clip_range or 0.2,
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": "constant" if s.schedule == "constant" else s.schedule.partition("_")[0],
        "adam_epsilon": s.adam_epsilon,
        "max_grad_norm": s.max_grad_norm,
        "seed": recipe.seed,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "dataloader_pin_memory": False,
    }


def scored_as_ppo(reward: RewardFunc, section: Ppo, dialogue: Dialogue) -> RewardFunc:
    """A reward function with ``ppo.missing_eos``: what a response cut at the length limit scores."""

    def reward_model(
        prompts: Sequence[Turns],
        completions: Sequence[Turns],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Any,
    ) -> list[float]:
        scores = reward(prompts, completions, **columns)
        penalty, how = section.missing_eos_penalty, section.missing_eos
        for i, ids in enumerate(completion_ids):
            if how != "ignore" and not set(ids) & set(dialogue.end_ids):
                scores[i] = -penalty if how == "replace" else scores[i] - penalty
        return scores

    return reward_model
