"""Their side of the PPO benchmark: ``PPOTrainer`` of the last trl release that has it, as it comes.

Only its clock is ours: two functions of its module are wrapped to see where a phase ends.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.harness import Figures
from benchmarks.ppo.task import Clock, Task, dialogue_of, figures
from benchmarks.ppo.work import Method, Sizes, sizes_of
from rlhf.errors import UserError
from rlhf.models.masks import action_mask
from rlhf.training.runtime import seed_everything

VERSION = "1.12.0"


def check_release() -> None:
    """Theirs must be the release that is meant.

    Raises:
        RuntimeError: it is another one.
    """
    if trl.__version__ != VERSION:
        raise RuntimeError(f"theirs runs trl {trl.__version__}, {VERSION} is wanted")


class Watch(TrainerCallback):
    """Ends of steps by the trainer's own callback, ends of phases by its functions."""

    def __init__(self, eos_id: int) -> None:
        self.clock, self.eos_id = Clock(), eos_id
        self.generated: float | None = None
        self.updating: float | None = None
        self.tokens = 0
        self._generate, self._forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def batch_generation(self, model: Any, queries: Any, *rest: Any, **options: Any) -> Any:
        """Samples; a phase ends behind it."""
        whole, logits = self._generate(model, queries, *rest, **options)
        self.generated = time.perf_counter()
        self.tokens = int(action_mask(whole[:, queries.shape[1] :], self.eos_id).sum())
        return whole, logits

    def forward(self, *rest: Any, **options: Any) -> Any:
        """Runs the model; the first one with gradients begins the update."""
        if self.updating is None and torch.is_grad_enabled():  # scoring runs without gradients
            self.updating = time.perf_counter()
        return self._forward(*rest, **options)

    def on_train_begin(self, *rest: Any, **options: Any) -> None:
        """The clock starts."""
        self.clock.start()

    def on_step_end(self, *rest: Any, **options: Any) -> None:
        """A step ends."""
        if self.generated is None or self.updating is None:
            raise RuntimeError("theirs: a step has ended without generating or without updating")
        began, now = self.clock.wall, time.perf_counter()
        phases = {
            "generate": self.generated - began,
            "score": self.updating - self.generated,
            "update": now - self.updating,
        }
        self.clock.end_step(phases, self.tokens)
        self.generated = self.updating = None


def lora_of(task: Task, sizes: Sizes, kind: str) -> LoraConfig:
    """The same adapter as ours."""
    layers = range(sizes.layers)[-task.adapted(sizes.layers) :]
    return LoraConfig(
        r=task.rank,
        lora_alpha=task.alpha,
        lora_dropout=0.0,
        target_modules=sorted({m.name for m in sizes.linears}),
        layers_to_transform=list(layers),
        task_type=kind,
    )


def _classifier(task: Task, pad_id: int) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        task.base, num_labels=1, dtype=torch.float32, pad_token_id=pad_id
    )


def train(
    settings: dict[str, Any],
    rows: list[list[int]],
    models: tuple[Any, Any, Any],
    tokenizer: Any,
    lora: LoraConfig,
    watch: Watch,
    get_reward: Any = ppo_trainer.get_reward,
) -> Any:
    """Run the trainer.

    Args:
        settings: of ``PPOConfig``, beside those that make it run on a CPU and leave nothing behind.
        rows: token ids of the prompts.
        models: policy, value and reward.
        tokenizer: pads on the left.
        lora: adapter of the policy.
        watch: is told of every phase.
        get_reward: how value and reward read a response.

    Returns:
        Its policy and value.
    """
    policy, value, reward = models
    dataset = Dataset.from_list([{"input_ids": ids} for ids in rows])
    trainer = PPOTrainer(
        args=PPOConfig(
            stop_token="eos",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_sample_generations=0,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=lora,
        callbacks=[watch],
    )
    with patch.multiple(
        ppo_trainer, batch_generation=watch.batch_generation, forward=watch.forward, get_reward=get_reward
    ):
        trainer.train()
    return trainer.model


def theirs(task: Task, rows: list[dict[str, Any]], scratch: Path) -> Figures:
    """All steps of a task on all prompts."""
    check_release()
    number, micro = len(rows), min(task.micro_batch, len(rows))
    if number % micro:
        raise UserError(f"--their-micro-batch {micro}: use a divisor of {number}, the batch")
    dialogue = dialogue_of(task.base, task.response_tokens)
    tokenizer = dialogue.tokenizer
    tokenizer.padding_side = "left"
    seed_everything(task.seed)
    policy = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.float32)
    policy.generation_config.pad_token_id = dialogue.pad_id
    sizes = sizes_of(policy)
    value, reward = _classifier(task, dialogue.pad_id), _classifier(task, dialogue.pad_id)
    value.score.load_state_dict(reward.score.state_dict())
    if task.value == "lora":
        inject_adapter_in_model(lora_of(task, sizes, "SEQ_CLS"), value)
        value.score.requires_grad_(True)
    watch = Watch(dialogue.eos_id)
    settings = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": number // micro,
        "local_rollout_forward_batch_size": number,
        "num_mini_batches": 1,
        "num_ppo_epochs": task.epochs,
        "total_episodes": number * task.steps,
        "response_length": task.response_tokens,
        "temperature": task.temperature,
        "missing_eos_penalty": task.missing_eos_penalty,
        "kl_coef": task.kl_coef,
        "learning_rate": task.learning_rate,
        "adam_epsilon": task.adam_epsilon,
        "seed": task.seed,
    }
    learners: nn.Module = train(
        settings,
        [row["ids"] for row in rows],
        (policy, value, reward),
        tokenizer,
        lora_of(task, sizes, "CAUSAL_LM"),
        watch,
    )
    full = task.value == "full"
    method = Method(
        task.epochs, task.rank, task.adapted(sizes.layers), passes=3, heads=1, adapters=0 if full else 1,
        full_value=full,
    )  # fmt: skip
    return {
        **figures(
            watch.clock.steps, sizes, method, rows=number, prompt_tokens=sum(len(row["ids"]) for row in rows)
        ),
        "trainable_parameters": sum(p.numel() for p in learners.parameters() if p.requires_grad),
        "value": task.value,
    }
