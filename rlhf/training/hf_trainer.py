"""What makes a stage of a Hugging Face trainer: arguments, a log, checkpoints that survive ``kill -9``.

The trainers themselves are trl's, subclassed where the stages are: ``reward/training/trainer.py`` and
``policy/sft/trainer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import PreferenceTraining, Sft
from rlhf.runs.artifacts import Checkpoints
from rlhf.runs.stage import processes, rank
from rlhf.training.metrics import Metrics
from rlhf.training.runtime import all_max, backward_part, deepspeed_config, join_cpu_processes

Sums = dict[str, float]


def arguments(
    recipe: Recipe, section: PreferenceTraining | Sft, folder: Path, *, rate: float, seed: int
) -> dict[str, Any]:
    """Fields of trl's configurations for a section of a recipe; all files go below ``folder``.

    A batch of the data loader is everything that one process adds to one optimiser step; the trainer's
    ``training_step`` cuts it into micro-batches by tokens.
    """
    cpu = not torch.cuda.is_available()
    own = section.batch_size // processes()
    config = deepspeed_config(recipe.distributed, batch=own, clip=section.max_grad_norm)
    joined = join_cpu_processes(recipe.distributed)
    return {
        "accelerator_config": {"use_configured_state": joined},
        "ddp_timeout": int(60 * recipe.distributed.timeout_minutes),
        "output_dir": str(folder),
        "per_device_train_batch_size": own,
        "num_train_epochs": section.epochs,
        "learning_rate": rate,
        "lr_scheduler_type": section.schedule,
        "warmup_steps": section.warmup_ratio,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "steps",
        "save_steps": section.checkpoint_every,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": cpu and processes() == 1,  # with it accelerate ignores DeepSpeed; the launcher says cpu
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,  # the loader hands over lists, not tensors
        "deepspeed": config if processes() > 1 else None,
    }


def accumulate(trainer: Any, parts: Sequence[Any], loss_of: Callable[[Any, float], Tensor]) -> Tensor:
    """Gradients of one optimiser step, a micro-batch at a time; returns the sum of the losses, detached.

    A process that is done goes on with weight 0 until the last one is: ZeRO-3's passes are collective.

    Args:
        trainer: the Hugging Face trainer, for its accelerator and device.
        parts: this process's micro-batches, at least one.
        loss_of: a micro-batch's share of the loss; it gets the weight too, for what it counts.
    """
    device = trainer.args.device
    number = all_max(len(parts), device)
    total = torch.zeros((), device=device)
    for index in range(number):
        part, weight = (parts[index], 1.0) if index < len(parts) else (parts[0], 0.0)
        loss = weight * loss_of(part, weight)
        backward_part(trainer.accelerator, loss, last=index == number - 1)
        total += loss.detach()
    return total


class Checkpointing:
    """Mixed in before a Hugging Face trainer: its checkpoints count by manifest and rename.

    The trainer sets ``_checkpoints`` and ``_on_checkpoint`` before its parents' ``__init__``.
    """

    _checkpoints: Checkpoints
    _on_checkpoint: Callable[[], None]
    _staging: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the trainer write into a staging folder, then make it a checkpoint by manifest and rename."""
        trainer: Any = self
        is_main = rank() == 0
        if is_main:
            self._checkpoints.clean()
        trainer.accelerator.wait_for_everyone()  # nobody writes into a folder that is about to be cleaned
        step = trainer.state.global_step
        with self._checkpoints.writing(step, commits=is_main) as staging:
            self._staging = str(staging)
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._staging = None
            trainer.accelerator.wait_for_everyone()
        trainer.accelerator.wait_for_everyone()
        if is_main:
            self._on_checkpoint()


class StepLog(TrainerCallback):
    """Hands each optimiser step's figures to our own log.

    Args:
        metrics: the log.
        stage: first part of the figures' names.
        sums: what the trainer has added up over the step on this process; emptied when logged.
        figures: from the sums of all processes to figures.
        before: optimiser steps that the log holds of earlier trainings of the stage.
    """

    def __init__(
        self,
        metrics: Metrics,
        stage: str,
        sums: Sums,
        figures: Callable[[Sums], dict[str, float]],
        before: int = 0,
    ) -> None:
        self.metrics = metrics
        self.stage = stage
        self.sums = sums
        self.figures = figures
        self.before = before

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """The trainer's call after each optimiser step, and once at the end."""
        if not logs or "learning_rate" not in logs or not self.sums:
            return
        names = sorted(self.sums)  # the same on every process
        sums = torch.tensor([self.sums[n] for n in names], dtype=torch.float64, device=args.device)
        if processes() > 1:
            dist.all_reduce(sums)
        values = self.figures(dict(zip(names, sums.tolist(), strict=True)))
        values |= {
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs.get("grad_norm") or 0.0),
        }
        self.metrics.log(
            self.before + state.global_step, {f"{self.stage}/{name}": v for name, v in values.items()}
        )
        self.sums.clear()


def resumable(folder: Path) -> str:
    """A trainer's checkpoint, seen to hold what a trainer would silently start anew.

    Raises:
        UserError: optimiser, schedule or random state is missing, or another number of processes wrote it.
    """
    if processes() == 1:
        needed = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    else:
        needed = ["latest", "scheduler.pt", *(f"rng_state_{rank}.pth" for rank in range(processes()))]
    missing = [name for name in needed if not (folder / name).is_file()]
    written = len(list(folder.glob("rng_state_*.pth"))) or 1
    if written != processes():
        raise UserError(
            f"{folder}: {written} processes wrote it, and {processes()} cannot go on from it: "
            f"use PROCS={written}, or remove {folder.parent.parent} to start again"
        )
    if missing:
        raise UserError(
            f"{folder}: the optimizer state is incomplete ({missing[0]} is missing); "
            f"remove {folder.parent} to go on from the one before"
        )
    return str(folder)
