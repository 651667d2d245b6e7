"""``trl.RewardTrainer`` taught k-way rankings, and checkpoints that survive ``kill -9``."""

from __future__ import annotations

from typing import Any

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
from trl import RewardConfig, RewardTrainer

from reward.batches import RankedBatch, collate
from reward.loss import ranked_loss
from rlhf.metrics import Metrics
from rlhf.recipe import Recipe
from rlhf.runtime import deepspeed_config, join_cpu_processes
from rlhf.stage import StageRun, processes


def training_arguments(recipe: Recipe, run: StageRun) -> RewardConfig:
    """trl's arguments for a recipe; every file that the trainer writes goes below the stage's folder."""
    section, cpu = recipe.reward, not torch.cuda.is_available()
    config = deepspeed_config(recipe.distributed, batch=section.micro_batch_size, clip=section.max_grad_norm)
    joined = join_cpu_processes(recipe.distributed)
    return RewardConfig(
        accelerator_config={"use_configured_state": joined},
        ddp_timeout=int(60 * recipe.distributed.timeout_minutes),
        output_dir=str(run.folder / "checkpoints"),
        per_device_train_batch_size=section.micro_batch_size,
        gradient_accumulation_steps=section.batch_size // (section.micro_batch_size * processes()),
        num_train_epochs=section.epochs,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=section.warmup,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="steps",
        save_steps=section.checkpoint_every,
        logging_strategy="steps",
        logging_steps=1,
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=cpu and processes() == 1,  # with it accelerate ignores DeepSpeed; the launcher says cpu
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        max_length=None,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        deepspeed=config if processes() > 1 else None,
    )


class RankedRewardTrainer(RewardTrainer):
    """Trains on whole comparisons: each response forwarded once, all pairs of a prompt one batch element.

    Args:
        run: the open stage, which keeps the checkpoints.
        metrics: where each step's figures go.
        pad_id: the padding token.
        options: what :class:`trl.RewardTrainer` takes.
    """

    def __init__(self, *, run: StageRun, metrics: Metrics, pad_id: int, **options: Any) -> None:
        self._run = run
        self._seen = {"loss": 0.0, "correct": 0.0, "pairs": 0.0, "comparisons": 0.0}
        self._staging: str | None = None
        super().__init__(
            data_collator=lambda examples: collate(examples, pad_id)._asdict(),
            callbacks=[_Log(metrics, self._seen)],
            **options,
        )
        self.remove_callback(PrinterCallback)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # encoded by reward.batches, in the one template of all stages

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            setattr(self, "_signature_columns", ["responses", "ranks"])  # noqa: B010 (typed as None by its parent)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """InstructGPT eq. 1: the mean over comparisons of the mean over their pairs."""
        batch = RankedBatch(**inputs)
        scores_N = model(input_ids=batch.ids_NT, attention_mask=batch.mask_NT.long(), use_cache=False).logits
        scores_BK = scores_N.squeeze(-1)[batch.rows_BK]
        loss, correct, pairs = ranked_loss(
            scores_BK, batch.ranks_BK, batch.mask_BK, normaliser=len(batch.ranks_BK)
        )
        size = len(batch.ranks_BK)
        for name, value in (
            ("loss", float(loss.detach()) * size),
            ("correct", float(correct)),
            ("pairs", float(pairs)),
            ("comparisons", size),
        ):
            self._seen[name] += value
        return (loss, {"scores": scores_BK}) if return_outputs else loss

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let the trainer write into a staging folder, then make it a checkpoint by manifest and rename."""
        if self._run.is_main:
            self._run.checkpoints.clean()
        self.accelerator.wait_for_everyone()  # nobody writes into a folder that is about to be cleaned
        with self._run.checkpoints.writing(self.state.global_step, commits=self._run.is_main) as staging:
            self._staging = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()
        self._run.note_clock()


class _Log(TrainerCallback):
    """Hands each optimiser step's figures to our own log."""

    def __init__(self, metrics: Metrics, seen: dict[str, float]) -> None:
        self.metrics = metrics
        self.seen = seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "learning_rate" not in logs or not self.seen["comparisons"]:
            return
        sums = torch.tensor(list(self.seen.values()), dtype=torch.float64, device=args.device)
        if processes() > 1:
            dist.all_reduce(sums)
        seen = dict(zip(self.seen, sums.tolist(), strict=True))
        values = {
            "reward/loss": seen["loss"] / seen["comparisons"],
            "reward/pair_accuracy": seen["correct"] / max(1.0, seen["pairs"]),
            "reward/learning_rate": logs["learning_rate"],
            "reward/grad_norm": float(logs.get("grad_norm") or 0.0),
        }
        self.metrics.log(state.global_step, values)
        self.seen.update(dict.fromkeys(self.seen, 0.0))
