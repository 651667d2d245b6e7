"""One child of the benchmark of the reward stage: prepare the rows, or train one side and measure it.

``python -m benchmarks.reward.sides tiny|prepare|ours|theirs TASK RESULT``; both files are JSON. Both sides
read the same token ids, which ``prepare`` has written.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

import reward.training.trainer
from benchmarks.harness import Figures, peak_bytes, resident_bytes
from benchmarks.reward.rows import (
    Wanted,
    dialogue_of,
    pairs_of,
    prepare,
    response_tokens_in,
    response_tokens_of,
)
from reward.model.batch import Example
from reward.model.model import new_reward_model
from rlhf.errors import UserError, exit_on_user_error
from rlhf.models.tiny import write_tiny_model
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import read_json, write_json
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import Dialogue, load_dialogue
from rlhf.training.metrics import read_metrics
from rlhf.training.runtime import seed_everything


@dataclass(frozen=True)
class Task:
    """What both sides do alike."""

    base: str
    """Folder of the base model; the tiny one of the tests where ``tiny``."""
    rows: str
    """File of the encoded comparisons."""
    layers: str
    """``all`` or ``top_<k>``: which layers have an adapter."""
    batch_size: int
    """Comparisons an optimiser step."""
    epochs: int = 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rank: int = 8
    alpha: int = 16
    max_tokens: int = 256
    """Longest sequence: prompt, response and closing EOS."""
    tokens_per_micro_batch: int = 4096
    """Of ours, as in a recipe."""
    their_pairs_at_once: int | None = None
    """Pairs of a forward pass of theirs; None = those of a step, which is trl's default."""
    threads: int = 2
    seed: int = 0


def recipe_of(task: Task) -> Recipe:
    """The recipe that does a task with our own stage."""
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "seed": task.seed,
            "model": {"path": task.base},
            "lora": {"rank": task.rank, "alpha": task.alpha, "layers": task.layers},
            "dialogue": {
                "template": "chat",
                "max_prompt_tokens": task.max_tokens,
                "max_response_tokens": task.max_tokens,
            },
            "data": {"comparisons": "none"},
            "reward": {
                "learning_rate": task.learning_rate,
                "schedule": task.schedule,
                "warmup_ratio": task.warmup,
                "weight_decay": task.weight_decay,
                "max_grad_norm": task.max_grad_norm,
                "epochs": task.epochs,
                "batch_size": task.batch_size,
                "tokens_per_micro_batch": task.tokens_per_micro_batch,
                "checkpoint_every": 1_000_000,
            },
        }
    )


# ------------------------------------------------------------------ measuring


class Reading(NamedTuple):
    """Clocks and work at one moment."""

    wall: float
    """Seconds."""
    cpu: float
    """Processor seconds of all threads."""
    positions: float
    """Token positions, padding included, that have gone forward through the whole decoder."""

    def since(self, before: Reading) -> Reading:
        """What has passed since an earlier reading."""
        return Reading(*(a - b for a, b in zip(self, before, strict=True)))


class Watch:
    """Readings after every optimiser step, taken by hooks that are the same for both sides.

    Args:
        model: a sequence classifier with adapters, loaded.
    """

    def __init__(self, model: Any) -> None:
        layers = model.base_model.model.base_model.layers
        self._positions = 0
        self._layers = len(layers)
        for layer in layers:
            layer.register_forward_pre_hook(self._count)
        self._hook = register_optimizer_step_post_hook(lambda *_: self.steps.append(self.read()))
        self.steps: list[Reading] = []
        self.trunk = Reading(0.0, 0.0, 0.0)
        """What went into states that were computed before the first step."""
        self.resident = resident_bytes()
        self.start = self.read()

    def _count(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden: Tensor = inputs[0]
        self._positions += hidden.shape[0] * hidden.shape[1]

    def read(self) -> Reading:
        """Now."""
        return Reading(time.perf_counter(), time.process_time(), self._positions / self._layers)

    def figures(self, comparisons: int, batch_size: int) -> Figures:
        """The measurement of a finished training.

        Steady is everything behind the first optimiser step, and as large a share of the trunk: states below
        the first adapted layer are training time even where they are computed before the first step.

        Args:
            comparisons: trained on, over all epochs.
            batch_size: comparisons of the first step, which steady leaves out.
        """
        self._hook.remove()
        last, first = self.steps[-1], self.steps[0]
        steady, whole = last.since(first), last.since(self.start)
        counted = comparisons - batch_size
        share = counted / comparisons
        cost = Reading(*(a + share * b for a, b in zip(steady, self.trunk, strict=True)))
        between = itertools.pairwise([self.start, *self.steps])
        return {
            "comparisons": comparisons,
            "comparisons_steady": counted,
            "steps": len(self.steps),
            "step_s": [b.wall - a.wall for a, b in between],
            "trunk_s": self.trunk.wall,
            "steady_s": cost.wall,
            "steady_cpu_s": cost.cpu,
            "whole_s": whole.wall,
            "whole_cpu_s": whole.cpu,
            "comparisons_per_s": counted / cost.wall,
            "s_per_comparison": cost.wall / counted,
            "cpu_s_per_comparison": cost.cpu / counted,
            "whole_s_per_comparison": whole.wall / comparisons,
            "positions_per_comparison": cost.positions / counted,
            "resident_before_bytes": self.resident,
            "peak_bytes": peak_bytes(),
        }


def trainable(model: nn.Module) -> int:
    """Number of weights that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------ the two sides


def ours(task: Task, rows: list[Example], scratch: Path) -> Figures:
    """The training of the reward stage as ``make reward`` does it, from a fresh model to its last step."""
    recipe = recipe_of(task)
    dialogue = load_dialogue(recipe)
    model = new_reward_model(recipe, dialogue)
    learns = trainable(model)
    run = StageRun("reward", scratch, recipe, {}, {}, is_main=True, lock=None)
    packed: list[Example] = []  # what has gone through the training, in its order
    watch = Watch(model)

    def build_trunk(*args: Any, **options: Any) -> Any:
        before = watch.read()
        trunk = build(*args, **options)
        watch.trunk = watch.read().since(before)
        return trunk

    def pack_and_note(examples: Sequence[Example], *args: Any, **options: Any) -> Any:
        packed.extend(examples)
        return pack(examples, *args, **options)

    build, pack = reward.training.trainer.build_trunk, reward.training.trainer.pack
    with (
        patch("reward.training.trainer.build_trunk", build_trunk),
        patch("reward.training.trainer.pack", pack_and_note),
    ):
        plan = reward.training.trainer.plan_forward(recipe, recipe.reward, model, rows, dialogue)
        reward.training.trainer.train_preference_model(
            recipe, recipe.reward, dialogue, model, rows, plan, folder=run.folder
        )
    return {
        **watch.figures(len(packed), task.batch_size),
        "prompts_shared": plan.share,
        "trunk_kept": plan.trunk is not None,
        "response_tokens": response_tokens_of(packed) // task.epochs,
        "trainable_parameters": learns,
        "losses": [line["reward/loss"] for line in read_metrics(scratch)],
    }


class _Watched(RewardTrainer):
    """Keeps the loss of every pass; everything else is the trainer's own."""

    def __init__(self, **options: Any) -> None:
        self.losses: list[Tensor] = []
        super().__init__(**options)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        self.losses.append(loss.detach())
        return loss


def theirs(task: Task, rows: list[Example], scratch: Path) -> Figures:
    """``trl.RewardTrainer`` as it comes, on the pairs of the same comparisons."""
    dialogue = dialogue_of(task.base, task.max_tokens)
    seed_everything(task.seed)
    model = get_peft_model(*_their_model(task, dialogue))
    learns = trainable(model)
    pairs = list(pairs_of(rows))
    each = len(pairs) // len(rows)  # pairs of a comparison
    at_once = task.their_pairs_at_once or task.batch_size * each
    parts, rest = divmod(task.batch_size * each, at_once)
    if rest:
        raise UserError(f"--their-pairs-at-once {at_once}: use a divisor of {task.batch_size * each}, a step")
    watch = Watch(model)
    trainer = _Watched(
        model=model,
        args=RewardConfig(
            output_dir=str(scratch),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=parts,
            num_train_epochs=task.epochs,
            learning_rate=task.learning_rate,
            lr_scheduler_type=task.schedule,
            warmup_steps=task.warmup,
            weight_decay=task.weight_decay,
            max_grad_norm=task.max_grad_norm,
            max_length=task.max_tokens,
            seed=task.seed,
            data_seed=task.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=dialogue.tokenizer,
    )
    trainer.train()
    taken: Any = trainer.train_dataset
    losses = torch.stack(trainer.losses).split(parts)
    return {
        **watch.figures(task.epochs * len(taken) // each, task.batch_size),
        "pairs_at_once": at_once,
        "response_tokens": response_tokens_in(taken),
        "trainable_parameters": learns,
        "losses": [float(step.mean()) for step in losses],
    }


def _their_model(task: Task, dialogue: Dialogue) -> tuple[Any, LoraConfig]:
    base = AutoModelForSequenceClassification.from_pretrained(
        task.base, num_labels=1, dtype=torch.float32, pad_token_id=dialogue.pad_id
    )
    linear = {name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    layers = base.config.num_hidden_layers
    top = range(layers) if task.layers == "all" else range(layers)[-int(task.layers.removeprefix("top_")) :]
    config = LoraConfig(
        r=task.rank,
        lora_alpha=task.alpha,
        target_modules=sorted(linear - {"score"}),
        layers_to_transform=list(top),
        task_type="SEQ_CLS",
        modules_to_save=["score"],
    )
    return base, config


def main() -> None:
    """The child."""
    kind, task_file, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    values = json.loads(task_file.read_text(encoding="utf-8"))
    if kind == "tiny":
        write_tiny_model(Path(values["base"]))
        write_json(result, {})
        return
    if kind == "prepare":
        write_json(result, {"rows": prepare(Wanted(**values))})
        return
    task = Task(**values)
    torch.set_num_threads(task.threads)
    side = {"ours": ours, "theirs": theirs}[kind]
    rows = read_json(Path(task.rows))["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        figures = side(task, rows, Path(scratch))
    found, expected = figures["response_tokens"], response_tokens_of(rows)
    if found != expected:
        raise RuntimeError(f"{kind}: {found} response tokens went through the training, of {expected}")
    figures |= {"first_loss": figures["losses"][0], "final_loss": figures["losses"][-1]}
    figures |= {"threads": torch.get_num_threads(), "task": {**asdict(task), "rows": "", "base": ""}}
    write_json(result, figures)


if __name__ == "__main__":
    exit_on_user_error(main)
