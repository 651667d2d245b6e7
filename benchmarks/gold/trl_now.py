"""``RLOOTrainer`` and ``GRPOTrainer`` of the installed trl on our prompts, adapter shape and reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.gold.marks import Marks
from benchmarks.gold.plan import GENERATIONS, schedule_of
from benchmarks.harness import Figures, peak_bytes
from reward.model.ensemble import member_folders
from reward.model.reward_func import as_reward_func
from rlhf.data.comparisons import Message
from rlhf.models.lora import lora_config
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import read_jsonl
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.runtime import seed_everything

TRAINERS: dict[str, tuple[Any, Any]] = {
    "rloo": (RLOOTrainer, RLOOConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
}


class Watch(TrainerCallback):
    """Ends a step of ours, which is several optimizer steps of theirs."""

    def __init__(self, marks: Marks, updates: int) -> None:
        self.marks, self.updates = marks, updates

    def on_train_begin(self, *rest: Any, **options: Any) -> None:
        """The clock starts."""
        self.marks.start()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **options: Any) -> None:
        """One optimizer step has ended."""
        if state.global_step % self.updates == 0:
            self.marks.end_step(lambda folder: model.save_pretrained(str(folder)))


def arguments(recipe: Recipe, scratch: Path) -> dict[str, Any]:
    """Fields of their configuration for as many samples, and updates a sample, as ours.

    A generation batch is ``per_device_train_batch_size`` x ``steps_per_generation`` responses, in groups of
    ``num_generations`` to one prompt, and is gone through ``num_iterations`` times. ``beta`` is the price of
    KL: in the reward, summed over a response (RLOO), or in the loss by the k3 estimator (GRPO).
    """
    ppo = recipe.ppo
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": ppo.batch_size // ppo.minibatches,
        "steps_per_generation": ppo.minibatches,
        "num_iterations": ppo.epochs,
        "max_steps": ppo.steps * ppo.minibatches * ppo.epochs,
        "num_generations": GENERATIONS,
        "max_completion_length": recipe.dialogue.max_response_tokens,
        "mask_truncated_completions": False,
        "temperature": ppo.temperature,
        "beta": ppo.kl_coef,
        "epsilon": ppo.clip_range,
        "learning_rate": ppo.learning_rate,
        "lr_scheduler_type": schedule_of(recipe),
        "adam_epsilon": ppo.adam_epsilon,
        "max_grad_norm": ppo.max_grad_norm,
        "seed": recipe.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # the weights have the recipe's type, there is no autocast
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def train(recipe: Recipe, run: Path, folder: Path, every: int, side: str) -> Figures:
    """Train an adapter by one of :data:`TRAINERS`; its marks go to a folder.

    Args:
        recipe: with a type of weights, and the seed.
        run: folder of the run, whose reward stage is done.
        folder: for the adapters.
        every: steps from mark to mark.
        side: ``rloo`` or ``grpo``.
    """
    dialogue, ppo = load_dialogue(recipe), recipe.ppo
    seed_everything(recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=getattr(torch, recipe.model.dtype))
    model.generation_config.eos_token_id = list(dialogue.end_ids)
    rows = [{"prompt": row["messages"]} for row in read_jsonl(run / "comparisons" / "prompts.jsonl")]
    rows *= -(-ppo.batch_size // len(rows))  # their loader makes no step of fewer prompts than it takes
    marks = Marks(folder, every, ppo.steps)
    kind, config = TRAINERS[side]
    trainer = kind(
        model=model,
        reward_funcs=as_reward_func(member_folders(run / "reward")[0]),
        args=config(**arguments(recipe, folder / "trainer")),
        train_dataset=Dataset.from_list(rows),
        processing_class=dialogue.tokenizer,
        peft_config=lora_config(recipe.lora, model),
        callbacks=[Watch(marks, ppo.minibatches * ppo.epochs)],
    )

    def tokenized(prompts: Sequence[list[dict[str, str]]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [dialogue.encode_prompt([Message(**turn) for turn in p]) for p in prompts], None, {}

    trainer._tokenize_prompts = tokenized  # the template is ours
    trainer.train()
    return {"marks": marks.done(), "peak_bytes": peak_bytes()}
