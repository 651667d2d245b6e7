"""``trl.SFTTrainer`` on packed rows in the template of all stages; checkpoints that survive ``kill -9``.

Shape suffix: ``_S`` learned token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from policy.sft.loss import log_probs
from rlhf.models.folding import Folding
from rlhf.models.packing import Row, lay, micro_batches
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Sft
from rlhf.runs.artifacts import Checkpoints
from rlhf.runs.stage import processes
from rlhf.training.hf_trainer import Checkpointing, StepLog, Sums, accumulate, arguments
from rlhf.training.metrics import Metrics

ADAPTER = "default"  # peft's name of the one adapter that learns; its files do not carry it


def training_arguments(recipe: Recipe, section: Sft, folder: Path) -> SFTConfig:
    """trl's arguments for the recipe's section; every file that the trainer writes goes below ``folder``."""
    options = arguments(recipe, section, folder, rate=section.learning_rate, seed=recipe.seed)
    return SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})


class SftTrainer(Checkpointing, SFTTrainer):
    """Trains on sequences that were encoded before; a step's loss is the mean over all its learned tokens.

    trl packs by flattening a batch into one row, which on CPUs, without flash attention, would let sequences
    see each other: here rows are packed under a block mask (``rlhf.models.packing``), a step at a time, so
    that packing changes no result.

    Args:
        checkpoints: where this training keeps its checkpoints.
        metrics: where each step's figures go.
        on_checkpoint: called behind every checkpoint.
        section: the sizes.
        pad_id: the padding token.
        packing: whether sequences share rows.
        head: the frozen map from hidden states to logits.
        options: what :class:`trl.SFTTrainer` takes; the data set has the fields of
        :class:`rlhf.models.packing.Row`.
    """

    def __init__(
        self,
        *,
        checkpoints: Checkpoints,
        metrics: Metrics,
        on_checkpoint: Callable[[], None] = lambda: None,
        section: Sft,
        pad_id: int,
        packing: bool,
        head: Any,
        **options: Any,
    ) -> None:
        self._checkpoints, self._on_checkpoint = checkpoints, on_checkpoint
        self._budget = section.tokens_per_micro_batch
        self._pad_id = pad_id
        self._packing = packing
        self._head = head
        self._seen: dict[str, float] = defaultdict(float)
        disable_dropout_in_model(options["model"])
        learning = [p for p in options["model"].parameters() if p.requires_grad]
        exact = [p.data for p in learning]
        super().__init__(
            data_collator=lambda examples: {"examples": examples},
            callbacks=[StepLog(metrics, "sft", self._seen, figures)],
            **options,
        )
        for parameter, data in zip(learning, exact, strict=True):
            parameter.data = (
                data  # trl rounds adapters over a quantised base to bfloat16; here they are float32
            )
        self.remove_callback(PrinterCallback)
        trained: Any = self.model
        self._folding = Folding(trained)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients of one optimiser step, a micro-batch at a time; returns the step's loss."""
        model, inputs = args[0], args[1]
        model.train()
        rows = [Row(example["ids"], example["counts"]) for example in inputs["examples"]]
        parts = micro_batches([len(row.ids) for row in rows], self._budget, packing=self._packing)
        share = self._tokens_of_all(rows) / processes()  # DeepSpeed averages over the processes

        def loss_of(bins: Any, weight: float) -> Tensor:
            batch = {"rows": rows, "bins": bins, "tokens": share, "weight": weight}
            loss: Tensor = self.compute_loss(model, batch)
            return loss

        with self._folding.folded(ADAPTER):
            return accumulate(self, parts, loss_of)

    def _tokens_of_all(self, rows: list[Row]) -> float:
        """Learned tokens of the step, over all processes."""
        tokens = torch.tensor(float(sum(sum(row.counts[1:]) for row in rows)), device=self.args.device)
        if processes() > 1:
            dist.all_reduce(tokens)
        return max(1.0, float(tokens))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """A micro-batch's share of the mean negative log-probability over the learned tokens of the step."""
        laid = lay(inputs["rows"], inputs["bins"], self._pad_id)
        logps_S, entropy_S = log_probs(model, laid.to(self.args.device), self._head)
        sums: dict[str, Any] = {
            "nll": -logps_S.detach().sum(),
            "entropy": entropy_S.sum(),
            "learned": logps_S.numel(),
            "tokens": (laid.segments_NT > 0).sum(),
            "places": laid.segments_NT.numel(),
        }
        for name, value in sums.items():
            self._seen[name] += inputs["weight"] * float(value)
        return -logps_S.sum() / inputs["tokens"]


def figures(sums: Sums) -> dict[str, float]:
    """What the log says of a step, from the sums of all processes."""
    learned = max(1.0, sums["learned"])
    return {
        "loss": sums["nll"] / learned,
        "entropy": sums["entropy"] / learned,
        "learned_tokens": sums["learned"],
        "filled": sums["tokens"] / sums["places"],  # share of the places of all rows that is not padding
    }
