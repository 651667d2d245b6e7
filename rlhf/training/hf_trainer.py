"""What makes a stage of a Hugging Face trainer: arguments, a log, checkpoints that survive ``kill -9``.

The trainers themselves are trl's, with :class:`StepTrainer` mixed in where the stages are:
``reward/training/trainer.py``, ``policy/sft/trainer.py`` and ``policy/dpo/trainer.py``.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.base import best_device, load_base
from rlhf.models.folding import Folding
from rlhf.recipe.load import Recipe
from rlhf.recipe.shared import Training
from rlhf.runs.artifacts import Checkpoints, step_of
from rlhf.runs.folder import StageFolder
from rlhf.runs.initial_adapter import ADAPTER as POLICY
from rlhf.runs.processes import processes, rank
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.metrics import Metrics
from rlhf.training.optimizer import deepspeed_config
from rlhf.training.runtime import all_max, clear_zero3_init, gathered, join_cpu_processes
from rlhf.training.signals import StopRequest

Sums = dict[str, float]
ADAPTER = "default"  # peft's name of the one adapter that learns; its files do not carry it


def arguments(recipe: Recipe, section: Training, folder: Path, *, rate: float, seed: int) -> dict[str, Any]:
    """Fields of trl's configurations for a section of a recipe; all files go below ``folder``.

    A batch of the data loader is everything that one process adds to one optimizer step; the trainer's
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


def backward_part(accelerator: Any, loss: Tensor, *, last: bool) -> None:
    """Add a part's gradients in a Hugging Face trainer that cuts its batch itself; the last part steps.

    DeepSpeed averages over the processes, so a loss is a share of its own process's mean.
    """
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    if wrapped is None:
        accelerator.backward(loss)
        return
    engine = wrapped.engine
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss, scale_wrt_gas=False)
    if not last:
        return
    if engine.zero_optimization_stage() == 0:
        # without ZeRO the gradients are whole here, and DeepSpeed would not tell their norm
        found = [p.grad for p in engine.module.parameters() if p.grad is not None]
        engine._global_grad_norm = torch.nn.utils.get_total_norm(found)
    engine.step()
    if engine.zero_optimization_stage() == 3:
        # ZeRO-3 starts its next sum from zero only for parameters in the first backward pass of a step
        engine.optimizer.grad_partitions_flat_buffer.zero_()


class StepTrainer:
    """Mixed in before a Hugging Face trainer: a step in micro-batches by tokens, our log and checkpoints.

    One batch of the data loader is one optimizer step of this process; :meth:`micro_batches` cuts it, and the
    adapter is folded into its weights meanwhile. Checkpoints count by manifest and rename.

    Args:
        section: the recipe's section, for the sizes.
        stage: ``sft``, ``reward``, ``pmp`` or ``dpo``; stands in the printed lines.
        folder: of the stage's run; ``metrics.jsonl`` and checkpoints go there.
        on_checkpoint: called behind every checkpoint.
        member: number of this training among those of the stage, whose steps follow each other in the log.
        members: how many trainings the stage has.
        options: what the trainer takes.
    """

    prefix: ClassVar[str]
    """First part of the names of all metrics."""
    shown: ClassVar[dict[str, str]]
    """Metrics that the progress bar shows, with their formats."""
    _staging: str | None = None

    def __init__(
        self,
        *,
        section: Training,
        stage: str,
        folder: Path,
        on_checkpoint: Callable[[], None] = lambda: None,
        member: int = 0,
        members: int = 1,
        **options: Any,
    ) -> None:
        self._budget = section.tokens_per_micro_batch
        self._stage, self._folder, self._on_checkpoint = stage, folder, on_checkpoint
        self._steps = section.epochs * -(-len(options["train_dataset"]) // section.batch_size)
        self._member, self._members = member, members
        below = folder / "checkpoints"
        self._checkpoints = Checkpoints(below / f"member-{member}" if members > 1 else below)
        self._seen: Sums = defaultdict(float)
        self._log = StepLog(self.prefix, self._seen, self.metrics_of, member * self._steps)
        learning = [p for p in options["model"].parameters() if p.requires_grad]
        exact = [p.data for p in learning]
        super().__init__(  # type: ignore[call-arg]
            data_collator=lambda examples: {"examples": examples}, callbacks=[self._log], **options
        )
        for parameter, data in zip(learning, exact, strict=True):
            parameter.data = data  # trl rounds what learns over a quantized base to bfloat16
        trainer: Any = self
        trainer.remove_callback(PrinterCallback)
        self._folding = Folding(trainer.model)

    def micro_batches(self, examples: Any) -> list[dict[str, Any]]:
        """Micro-batches of a step's examples, at least one, as ``compute_loss`` takes them."""
        raise NotImplementedError

    @staticmethod
    def metrics_of(sums: Sums) -> dict[str, float]:
        """Metrics of a step, from the sums of all processes over its micro-batches."""
        raise NotImplementedError

    def add(self, weight: float, **values: Any) -> None:
        """Add a micro-batch's values to the sums of the step."""
        for name, value in values.items():
            self._seen[name] += weight * float(value)

    def fit(self) -> None:
        """Take all steps; an interrupted training goes on from its newest checkpoint.

        Raises:
            UserError: the checkpoint is incomplete.
            SystemExit: somebody asked for a stop (SIGINT, SIGTERM, SIGHUP); a checkpoint has been written.
        """
        trainer: Any = self
        checkpoint, is_main = self._checkpoints.newest(), rank() == 0
        done = step_of(checkpoint)
        if checkpoint and is_main:
            print(f"{self._stage}: going on after step {done} of {self._steps}", flush=True)
        metrics = Metrics(
            self._folder,
            total=self._steps * self._members,
            done=self._member * self._steps + done,
            shown=self.shown,
            description=self._stage,
            active=is_main,
        )
        self._log.metrics = metrics
        resume = resumable(checkpoint / f"checkpoint-{done}") if checkpoint else None
        stop = StopRequest()
        trainer.add_callback(StopCallback(stop))
        with stop.listening(), contextlib.closing(metrics):
            trainer.train(resume_from_checkpoint=resume)
        if all_max(int(stop.asked), trainer.args.device) and trainer.state.global_step < self._steps:
            kept = f"saved after step {trainer.state.global_step} of {self._steps}"
            stop.leave(self._stage, kept, is_main=is_main)
        if trainer.state.global_step != trainer.state.max_steps:
            raise RuntimeError(f"trained {trainer.state.global_step} of {trainer.state.max_steps} steps")

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients of one optimizer step, a micro-batch at a time; returns the step's loss, detached.

        A process that is done goes on with weight 0 until the last one is: ZeRO-3's passes are collective.
        """
        trainer: Any = self
        model, examples = args[0], args[1]["examples"]
        model.train()
        parts, device = self.micro_batches(examples), trainer.args.device
        number = all_max(len(parts), device)
        total = torch.zeros((), device=device)
        with self._folding.folded(ADAPTER):
            for index in range(number):
                part, weight = (parts[index], 1.0) if index < len(parts) else (parts[0], 0.0)
                loss = weight * trainer.compute_loss(model, part | {"weight": weight})
                backward_part(trainer.accelerator, loss, last=index == number - 1)
                total += loss.detach()
        return total

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
    """Hands each optimizer step's figures to our own log, once there is one (``metrics``).

    Args:
        prefix: first part of the figures' names.
        sums: what the trainer has added up over the step on this process; emptied when logged.
        figures: from the sums of all processes to figures.
        before: optimizer steps that the log holds of earlier trainings of the stage.
    """

    metrics: Metrics

    def __init__(
        self, prefix: str, sums: Sums, figures: Callable[[Sums], dict[str, float]], before: int
    ) -> None:
        self.prefix, self.sums, self.figures, self.before = prefix, sums, figures, before

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """The trainer's call after each optimizer step, and once at the end."""
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
            self.before + state.global_step, {f"{self.prefix}/{name}": v for name, v in values.items()}
        )
        self.sums.clear()


class StopCallback(TrainerCallback):
    """Ends a training after the step in which any process was asked to stop, with a checkpoint."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer's call after each optimizer step."""
        if all_max(int(self.stop.asked), args.device) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def adapted_base(
    recipe: Recipe, stage: str, start: Path | None = None, say: Callable[[str], None] = print
) -> Backbone:
    """The base with the one adapter that will learn, as it starts.

    start: folder of the adapter that it starts from; None = the base. say: gets a line that the user reads,
    with the name of the stage.
    """
    clear_zero3_init()
    torch.manual_seed(recipe.seed)
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=[ADAPTER], trainable=[ADAPTER])
    if start:
        say(f"{stage}: starts from {start} ({backbone.load_adapter(ADAPTER, start)} tensors)")
    backbone.check_architecture()
    backbone.activate(ADAPTER)
    backbone.to(best_device())
    return backbone


def save_policy(backbone: Backbone, dialogue: Dialogue, run: StageFolder) -> None:
    """Save the adapter that has learned, and the tokenizer, as a stage's policy; all processes must call
    it."""
    with gathered(list(backbone.parameters_of(ADAPTER).values())):
        if run.is_main:
            backbone.save_adapter(ADAPTER, run.folder / POLICY)
            dialogue.tokenizer.save_pretrained(str(run.folder / POLICY))
    if processes() > 1:
        dist.barrier()


def resumable(folder: Path) -> str:
    """A trainer's checkpoint, seen to hold what a trainer would silently start anew.

    Raises:
        UserError: optimizer, schedule or random state is missing, or another number of processes wrote it.
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
