"""Context distillation.

Askell 2021: "A General Language Assistant as a Laboratory for Alignment", arXiv 2112.00861; its recipe is
spelled out in Bai 2022, arXiv 2204.05862, A.1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf.recipe.types import (
    Files,
    Folder,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Section,
    UnitInterval,
)


class DistillData(Section):
    """What is distilled on, and the teacher's words about it."""

    texts: Files = []
    """Generic texts: .txt files (their lines joined), or rows with a `text` field; globs and `hub:` names as
    in data.comparisons. They stand behind the prompt in a user turn that was just opened."""
    questions: Files = []
    """Comparisons (files as in data.comparisons): the prompt and its best response as a conversation; empty =
    the training comparisons of this run."""
    text_share: UnitInterval = 0.5
    """Share of the sequences that are generic texts (half: Bai 2022, A.1)."""
    sequences: Positive = 1000
    """Sequences in all, held-out ones included, drawn by the seed; a source that has fewer gives all."""
    max_tokens: Positive = 256
    """Longest sequence behind the prompt, in tokens; texts are cut into windows, conversations cut off."""
    held_out: Fraction = 0.1
    """Share of the texts and of the questions that is held out, whole texts and prompts at a time."""
    teacher: str | None = None
    """Folder or hub id of a model with the same tokenizer that teaches under the prompt; null = the base."""
    teacher_cache: str | None = None
    """Folder where the teacher's words are kept, for runs that share them; null = this run's own. They are
    used again wherever nothing that they depend on has changed."""
    top_k: Positive = 50
    """Most likely tokens of the teacher that are stored at each place; all others are one class (Bai 2022,
    A.1: 50)."""
    shard_sequences: Positive = 32
    """Sequences in a file of the teacher's words; a kill loses at most one file."""


class Distill(DistillData):
    """Context distillation (`make distill`): the prompted model teaches the unprompted one (Askell 2021)."""

    method: Literal["lora", "full"] = "lora"
    """Train an adapter of the recipe's shape, or all weights (saved as a model of its own)."""
    start: Folder | None = None
    """Folder of the adapter to start from, or `sft`: that stage of this run; null = the base."""
    epochs: Positive = 1
    """Passes over the sequences."""
    batch_size: Positive = 32
    """Sequences an optimizer step (Bai 2022, A.1: 32)."""
    learning_rate: Rate | None = None
    """Rate at the first step behind the warm-up, linear to 0 from there; null = 0.05 of
    model.pretraining_learning_rate (Bai 2022, A.1)."""
    warmup_steps: Natural = 0
    """Steps in which the rate rises linearly from a tenth; they have to be fewer than all."""
    max_grad_norm: Rate = 1.0
    """Global gradient-norm clip."""
    tokens_per_micro_batch: Positive = 2048
    """Tokens in memory at once, padding included; it does not change the result."""
    trunk_gigabytes: NonNegative = 4.0
    """Memory for the hidden states below the first adapted layer (lora.layers=top_k), which are computed
    once; where they need more, or with 0, every pass computes them anew."""
    full_kl_sequences: Natural = 16
    """Held-out sequences on which the KL over the whole vocabulary is measured beside; 0 = none."""
    checkpoint_every: Positive = 10
    """Optimizer steps between checkpoints."""

    @model_validator(mode="after")
    def _halves(self) -> Distill:
        if self.text_share > 0 and not self.texts:
            raise ValueError("texts is empty: name files with generic texts, or set text_share=0")
        if self.text_share == 0 and self.texts:
            raise ValueError("texts are not used with text_share=0: remove one of them")
        if self.text_share == 1 and self.questions:
            raise ValueError("questions are not used with text_share=1: remove one of them")
        return self
