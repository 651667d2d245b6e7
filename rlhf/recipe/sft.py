"""What a policy learns from rows, without a reward: demonstrations (SFT) or comparisons (DPO)."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf.recipe.shared import Training
from rlhf.recipe.types import Files, Folder, LessThanHalf, NonNegative, Positive, Rate

CHOSEN = "chosen"  # the value of sft.data that asks for the best responses of the comparisons


class Sft(Training):
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
    packing: bool = True
    """Let short sequences share a row, each blind to the others (block attention mask, positions of its own).
    It saves padding and does not change the result; an architecture that cannot falls back with a warning."""

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


class Dpo(Training):
    """Direct preference optimization (`make dpo`): a policy from the comparisons themselves, without a reward
    model and without sampling (Rafailov 2023, arXiv 2305.18290), through trl's trainer."""

    start: Folder | None = None
    """Adapter that the policy starts from, and which as it was is the reference: a folder, or `sft` or
    `distill`, that stage of this run; null = the base."""
    beta: Rate = 0.1
    """β, strength of the pull to the reference (0.1 in Rafailov 2023, appendix B)."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"] = "sigmoid"
    """`sigmoid`: eq. 7 of Rafailov 2023; `hinge`: Zhao 2023 (SLiC); `ipo`: Azar 2023, over the mean a token;
    `robust`: Chowdhury 2024, needs `label_smoothing`; `sigmoid_norm`: eq. 7 over the mean a token."""
    label_smoothing: LessThanHalf = 0.0
    """Share of the labels taken to be wrong, with `robust`."""
    pairs: Literal["all", "best"] = "all"
    """Of a ranking, every pair of unequal rank, as the reward model reads it (Ouyang 2022), or the best
    against each of the others. Ties are no pairs."""
    limit: Positive | None = None
    """Train on this many of the comparisons, drawn by the seed; null = all. A smaller number is a part of a
    larger."""
    eval_samples: Positive = 256
    """Held-out comparisons whose implicit rewards are measured, at most."""
    learning_rate: Rate = 5e-5
    """Peak of AdamW (ten times the 5e-6 that is usual for full tuning, as LoRA wants)."""
    batch_size: Positive = 16
    """Pairs an optimizer step, over all processes."""
    share_prompts: bool = True
    """Forward a prompt once for both responses (one packed row, block attention mask). Both ways give the
    same losses; an architecture that cannot pack falls back with a warning."""
    trunk_gigabytes: NonNegative = 4.0
    """Memory for the hidden states below the first adapted layer (lora.layers=top_k), which are computed once
    for the reference and all passes; where they need more, or with 0, every pass computes them anew."""

    @model_validator(mode="after")
    def _smoothing(self) -> Dpo:
        if (self.loss_type == "robust") != bool(self.label_smoothing):
            raise ValueError("loss_type robust and label_smoothing belong together: give both or neither")
        return self
