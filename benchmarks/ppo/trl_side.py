"""Their side of the PPO benchmark: ``PPOTrainer`` of the last trl release that has it, as it comes.

Only its clock is ours: two functions of its module are wrapped to see where a phase ends.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.harness import Figures, weights_dtype
from benchmarks.ppo.task import Clock, Method, Task, classifier_of, dialogue_of, figures, now, sizes_of
from rlhf.errors import UserError
from rlhf.models.lora import lora_config
from rlhf.models.masks import action_mask
from rlhf.recipe.load import Recipe
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.runtime import seed_everything


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
        self.generated = now()
        self.tokens = int(action_mask(whole[:, queries.shape[1] :], self.eos_id).sum())
        return whole, logits

    def forward(self, *rest: Any, **options: Any) -> Any:
        """Runs the model; the first one with gradients begins the update."""
        if self.updating is None and torch.is_grad_enabled():  # scoring runs without gradients
            self.updating = now()
        return self._forward(*rest, **options)

    def on_train_begin(self, *rest: Any, **options: Any) -> None:
        """The clock starts."""
        self.clock.start()

    def on_step_end(self, *rest: Any, **options: Any) -> None:
        """A step ends."""
        if self.generated is None or self.updating is None:
            raise RuntimeError("theirs: a step has ended without generating or without updating")
        began, ended = self.clock.wall, now()
        phases = {
            "generate": self.generated - began,
            "score": self.updating - self.generated,
            "update": ended - self.updating,
        }
        self.clock.end_step(phases, self.tokens)
        self.generated = self.updating = None


def policy_of(path: str, dialogue: Dialogue, dtype: str = "float32") -> Any:
    """The base as the policy that its trainer gets."""
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    policy.generation_config.pad_token_id = dialogue.pad_id
    return policy


def train(
    recipe: Recipe,
    dialogue: Dialogue,
    rows: list[list[int]],
    models: tuple[Any, Any, Any],
    lora: LoraConfig,
    watch: Watch,
    *,
    at_once: int,
    scratch: Path,
    get_reward: Any = ppo_trainer.get_reward,
    autocast: bool = False,
) -> Any:
    """Run the trainer with the numbers of a recipe.

    Args:
        recipe: its ``ppo`` section, ``seed`` and length of a response.
        dialogue: the token contract.
        rows: token ids of the prompts.
        models: policy, value and reward.
        lora: adapter of the policy.
        watch: is called at the end of every phase.
        at_once: responses that go through an update at once.
        scratch: folder for what the trainer writes.
        get_reward: how value and reward read a response.
        autocast: products in bfloat16 over float32 weights (`bf16` of its configuration).

    Returns:
        Its policy and value.
    """
    policy, value, reward = models
    dialogue.tokenizer.padding_side = "left"
    dataset = Dataset.from_list([{"input_ids": ids} for ids in rows])
    ppo = recipe.ppo
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(scratch),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=ppo.batch_size // at_once,
            local_rollout_forward_batch_size=ppo.batch_size,
            num_mini_batches=ppo.minibatches,
            num_ppo_epochs=ppo.epochs,
            total_episodes=ppo.batch_size * ppo.steps,
            response_length=recipe.dialogue.max_response_tokens,
            temperature=ppo.temperature,
            missing_eos_penalty=ppo.missing_eos_penalty if ppo.missing_eos == "subtract" else None,
            kl_coef=ppo.kl_coef,
            kl_estimator=ppo.kl_estimator,
            cliprange=ppo.clip_range,
            cliprange_value=ppo.value_clip_range,
            vf_coef=ppo.value_coef,
            gamma=ppo.gamma,
            lam=ppo.lam,
            whiten_rewards=ppo.whiten_rewards,
            learning_rate=ppo.learning_rate,
            lr_scheduler_type=ppo.schedule,
            adam_epsilon=ppo.adam_epsilon,
            seed=recipe.seed,
            stop_token="eos",
            use_cpu=not torch.cuda.is_available(),
            bf16=autocast,
            gradient_checkpointing=False,
            num_sample_generations=0,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=dialogue.tokenizer,
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
    number, micro = len(rows), min(task.micro_batch, len(rows))
    if number % micro:
        raise UserError(f"--their-micro-batch {micro}: use a divisor of {number}, the batch")
    recipe, dialogue = task.recipe(number), dialogue_of(task.base, task.response_tokens)
    seed_everything(task.seed)
    dtype = weights_dtype(task.dtype)
    policy = policy_of(task.base, dialogue, dtype)
    sizes, lora = sizes_of(policy), lora_config(recipe.lora, policy)
    value, reward = (classifier_of(task.base, dialogue, dtype) for _ in range(2))
    value.score.load_state_dict(reward.score.state_dict())
    full = task.value == "full"
    if not full:
        inject_adapter_in_model(lora_config(recipe.lora, policy, "SEQ_CLS"), value)
        value.score.requires_grad_(True)
    watch, ids = Watch(dialogue.end_id), [row["ids"] for row in rows]
    learners = train(
        recipe,
        dialogue,
        ids,
        (policy, value, reward),
        lora,
        watch,
        at_once=micro,
        scratch=scratch,
        autocast=task.dtype == "autocast",
    )
    method = Method(
        task.epochs, recipe.lora.rank, recipe.lora.top_k or sizes.layers, passes=3, heads=1,
        adapters=0 if full else 1, full_value=full,
    )  # fmt: skip
    return {
        **figures(watch.clock.steps, sizes, method, rows=number, prompt_tokens=sum(map(len, ids))),
        "trainable_parameters": sum(p.numel() for p in learners.parameters() if p.requires_grad),
        "value": task.value,
    }
