"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf.recipe.types import Files, Folder, NonNegative, Positive, Rate, Section, UnitInterval

CHOSEN = "chosen"  # the value of sft.data that asks for the best responses of the comparisons


class Sft(Section):
    """Supervised fine-tuning (`make sft`), from which `ppo`, `pmp`, `reward` and `distill` can start."""

    data: Files = [CHOSEN]
    """`chosen`: the best response of every training comparison; or chats: files, globs or
    `hub:NAME[:CONFIG][@SPLIT]` with messages, a prompt and a completion, or comparisons."""
    start: Folder | None = None
    """Folder of an adapter to go on from; null = a fresh one."""
    loss_on: Literal["response", "assistant", "all"] = "response"
    """Which tokens are learned: the last answer with its EOS, every answer of the assistant, or all."""
    limit: Positive | None = None
    """Train on this many of the demonstrations, drawn by the seed; null = all. A smaller number is a part of
    a larger."""
    eval_samples: Positive = 256
    """Held-out demonstrations whose loss is measured before and after, at most."""
    learning_rate: Rate = 2e-4
    """Peak of AdamW (2e-4 in QLoRA, Dettmers 2023, and in LoRA, Hu 2021, for GPT-2)."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after the warm-up (cosine in InstructGPT, Ouyang 2022)."""
    warmup_ratio: UnitInterval = 0.05
    """Share of the optimizer steps with rising learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Rate = 1.0
    """Global gradient-norm clip."""
    epochs: Positive = 1
    """Passes over the demonstrations."""
    batch_size: Positive = 16
    """Demonstrations an optimizer step, over all processes; the loss is the mean over their learned
    tokens."""
    tokens_per_micro_batch: Positive = 2048
    """Tokens in memory at once, padding included, a process; it does not change the result."""
    packing: bool = True
    """Let short sequences share a row, each blind to the others (block attention mask, positions of its own).
    It saves padding and does not change the result; an architecture that cannot falls back with a warning."""
    checkpoint_every: Positive = 10
    """Optimiser steps between checkpoints."""

    @property
    def chosen(self) -> bool:
        """Whether the demonstrations are the best responses of the run's own comparisons."""
        return self.data == [CHOSEN]

    @model_validator(mode="after")
    def _usable(self) -> Sft:
        if not self.data:
            raise ValueError(f"data names nothing: write {CHOSEN}, or files with chats")
        if CHOSEN in self.data and not self.chosen:
            raise ValueError(f"data: {CHOSEN} stands alone; a file of that name is ./{CHOSEN}")
        if self.start in ("sft", "distill"):
            raise ValueError("start is a folder here: fine-tuning comes before the other stages")
        return self
