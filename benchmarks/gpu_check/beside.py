"""Ours and trl's trainers on the same work, for the parts that time them beside each other.

All train on the same prompts as often, in the same batch, length, adapter and type, with a reward model that
has a fresh head: `ours` by :func:`benchmarks.ppo.sides.ours` (PPO, or RLOO where a prompt has several
responses), `theirs` by trl 1.12's ``PPOTrainer``, `rloo` by the installed trl's ``RLOOTrainer``. Nothing here
has been run on a GPU yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.harness import Figures
from benchmarks.ppo import sides
from benchmarks.ppo.task import Clock, Method, Task, classifier_of, dialogue_of, figures, sizes_of
from rlhf.models.base import best_device
from rlhf.models.lora import lora_config
from rlhf.runs.artifacts import read_json
from rlhf.training.runtime import seed_everything


class Watch(TrainerCallback):
    """Cuts their training into steps of ours, each of several optimizer steps."""

    def __init__(self, updates: int, prompt_tokens: int) -> None:
        self.clock, self.updates, self.prompt_tokens, self.seen = Clock(), updates, prompt_tokens, 0.0

    def on_train_begin(self, *rest: Any, **options: Any) -> None:
        """The clock starts."""
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """One optimizer step has ended."""
        if state.global_step % self.updates == 0:
            self.clock.end_step({}, state.num_input_tokens_seen - self.seen - self.prompt_tokens)
            self.seen = state.num_input_tokens_seen


def rloo(task: Task, rows: list[Figures], scratch: Path) -> Figures:
    """All steps of a task on all prompts by ``RLOOTrainer``; ``task.samples`` rows are one prompt of its."""
    from trl import RLOOConfig, RLOOTrainer

    from benchmarks.gold.trl_now import arguments

    recipe, dialogue = task.recipe(len(rows)), dialogue_of(task.base, task.response_tokens)
    seed_everything(task.seed)
    policy = AutoModelForCausalLM.from_pretrained(task.base, dtype=getattr(torch, task.dtype))
    scorer = classifier_of(task.base, dialogue, task.dtype).to(best_device())
    sizes, lora, micro = sizes_of(policy), lora_config(recipe.lora, policy), recipe.ppo.micro_batch_size

    @torch.no_grad()
    def score(ids: list[list[int]], completion_ids: list[list[int]], **rest: Any) -> list[float | None]:
        whole = [torch.tensor(a + b, device=scorer.device) for a, b in zip(ids, completion_ids, strict=True)]
        padded_BT = pad_sequence(whole, batch_first=True, padding_value=dialogue.pad_id)
        mask_BT = pad_sequence([torch.ones_like(row) for row in whole], batch_first=True)
        return list(scorer(input_ids=padded_BT, attention_mask=mask_BT).logits[:, 0].tolist())

    tokens = sum(len(row["ids"]) for row in rows)
    parts = {name: len(rows) // micro for name in ("gradient_accumulation_steps", "steps_per_generation")}
    shape = {"per_device_train_batch_size": micro, "num_generations": task.samples, **parts}
    watch = Watch(task.epochs, tokens)
    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=score,
        args=RLOOConfig(**{**arguments(recipe, scratch), **shape}),
        train_dataset=Dataset.from_list([{**row, "prompt": row["text"]} for row in rows[:: task.samples]]),
        processing_class=dialogue.tokenizer,
        peft_config=lora,
        callbacks=[watch],
    )
    trainer.train()
    method = Method(task.epochs, recipe.lora.rank, sizes.layers, passes=3, heads=2, adapters=1, value=False)
    return figures(watch.clock.steps, sizes, method, rows=len(rows), prompt_tokens=tokens)


SIDES: dict[str, Callable[..., Figures]] = {"ours": sides.ours, "theirs": sides.theirs, "rloo": rloo}


def run(folder: Path, names: Sequence[str], samples: int, *, quick: bool) -> dict[str, Figures]:
    """Run sides, one after the other, over the model and the prompts in a folder.

    Args:
        folder: with ``rows.json``, ``samples`` responses to a prompt, and a bfloat16 model.
        names: of :data:`SIDES`.
        samples: 1 = PPO, more = RLOO.
        quick: one measured step and short responses.
    """
    rows = read_json(folder / "rows.json")["rows"]
    task = Task(str(folder), "", "all", 4 if quick else 64, epochs=2, steps=2 if quick else 4,
                micro_batch=min(8, len(rows)), value="lora", dtype="bfloat16", samples=samples)  # fmt: skip
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = SIDES[name](task, rows, Path(scratch))
    return found
