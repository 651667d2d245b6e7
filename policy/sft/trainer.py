"""``trl.SFTTrainer`` on packed rows in the template of all stages; checkpoints that survive ``kill -9``.

Shape suffix: ``_S`` learned token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from policy.sft.loss import log_probs
from rlhf.models.backbone import Backbone
from rlhf.models.base import vocabulary_head
from rlhf.models.packing import Row, micro_batches, pack
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Sft
from rlhf.runs.processes import processes
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.hf_trainer import StepTrainer, Sums, arguments


def training_arguments(recipe: Recipe, section: Sft, folder: Path) -> SFTConfig:
    """trl's arguments for the recipe's section; every file that the trainer writes goes below ``folder``."""
    options = arguments(recipe, section, folder, rate=section.learning_rate, seed=recipe.seed)
    return SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})


class SftTrainer(StepTrainer, SFTTrainer):
    """Trains on sequences that were encoded before; a step's loss is the mean over all its learned tokens.

    trl packs by flattening a batch into one row, which on CPUs, without flash attention, would let sequences
    see each other: here rows are packed under a block mask (``rlhf.models.packing``), a step at a time, so
    that packing changes no result.

    Args:
        pad_id: the padding token.
        packing: whether sequences share rows.
        head: the frozen map from hidden states to logits.
        options: what :class:`rlhf.training.hf_trainer.StepTrainer` and :class:`trl.SFTTrainer` take; the data
            set has the fields of :class:`rlhf.models.packing.Row`.
    """

    prefix = "sft"
    shown: ClassVar = {"sft/loss": ".3f"}

    def __init__(self, *, pad_id: int, packing: bool, head: Any, **options: Any) -> None:
        self._pad_id, self._packing, self._head = pad_id, packing, head
        disable_dropout_in_model(options["model"])
        super().__init__(stage="sft", **options)

    def micro_batches(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Micro-batches of a step's sequences, each with the learned tokens that its mean is over."""
        rows = [Row(example["ids"], example["counts"]) for example in examples]
        tokens = torch.tensor(float(sum(sum(row.counts[1:]) for row in rows)), device=self.args.device)
        if processes() > 1:
            dist.all_reduce(tokens)
        share = max(1.0, float(tokens)) / processes()  # DeepSpeed averages over the processes
        parts = micro_batches([len(row.ids) for row in rows], self._budget, packing=self._packing)
        return [{"rows": rows, "bins": bins, "tokens": share} for bins in parts]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """A micro-batch's share of the mean negative log-probability over the learned tokens of the step."""
        batch = pack(inputs["rows"], inputs["bins"], self._pad_id)
        logps_S, entropy_S = log_probs(model, batch.to(self.args.device), self._head)
        self.add(
            inputs["weight"],
            nll=-logps_S.detach().sum(),
            entropy=entropy_S.sum(),
            learned=logps_S.numel(),
            tokens=(batch.segments_NT > 0).sum(),
            places=batch.segments_NT.numel(),
        )
        return -logps_S.sum() / inputs["tokens"]

    @staticmethod
    def metrics_of(sums: Sums) -> dict[str, float]:
        """Mean loss and entropy over the learned tokens of a step, nats; the share that is not padding."""
        learned = max(1.0, sums["learned"])
        return {
            "loss": sums["nll"] / learned,
            "entropy": sums["entropy"] / learned,
            "learned_tokens": sums["learned"],
            "filled": sums["tokens"] / sums["places"],
        }


def new_trainer(
    recipe: Recipe,
    section: Sft,
    dialogue: Dialogue,
    backbone: Backbone,
    rows: Sequence[Row],
    *,
    packing: bool,
    folder: Path,
    on_checkpoint: Callable[[], None] = lambda: None,
) -> SftTrainer:
    """A trainer of a backbone's adapter, in place; its ``fit`` takes all steps that are left.

    Args:
        recipe: the whole recipe.
        section: its ``sft`` section.
        dialogue: tokenizer and template.
        backbone: the base with the adapter at its start (:func:`policy.sft.run.new_backbone`).
        rows: encoded demonstrations.
        packing: whether sequences share rows.
        folder: where checkpoints and ``metrics.jsonl`` go.
        on_checkpoint: called behind every checkpoint.
    """
    return SftTrainer(
        section=section,
        folder=folder,
        on_checkpoint=on_checkpoint,
        pad_id=dialogue.pad_id,
        packing=packing,
        head=vocabulary_head(recipe, backbone.base),
        model=backbone.model,
        args=training_arguments(recipe, section, folder / "checkpoints"),
        train_dataset=Dataset.from_list([row._asdict() for row in rows]),
        processing_class=dialogue.tokenizer,
    )
