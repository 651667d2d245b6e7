"""``trl.DPOTrainer`` on pairs in the template of all stages; checkpoints that survive ``kill -9``.

Shape suffixes: ``_B`` pair, ``_T`` token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rlhf.models.backbone import Backbone
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Dpo
from rlhf.runs.processes import processes
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.hf_trainer import StepTrainer, Sums, arguments

Pair = dict[str, Any]
_SHOWN = {  # our names of trl's metrics, all means over the pairs of a micro-batch
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
}


def training_arguments(recipe: Recipe, section: Dpo, folder: Path) -> DPOConfig:
    """trl's arguments for the recipe's section; every file that the trainer writes goes below ``folder``."""
    return DPOConfig(
        **arguments(recipe, section, folder, rate=section.learning_rate, seed=recipe.seed),
        beta=section.beta,
        loss_type=[section.loss_type],
        label_smoothing=section.label_smoothing,
        disable_dropout=True,
    )


def width(pair: Pair) -> int:
    """Tokens of the longer sequence of a pair."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def batches(pairs: Sequence[Pair], tokens: int) -> Iterator[list[int]]:
    """Indices of the pairs, like lengths together, at most so many tokens at once, padding included."""
    order = sorted(range(len(pairs)), key=lambda i: width(pairs[i]))
    part: list[int] = []
    for index in order:
        if part and 2 * (len(part) + 1) * width(pairs[index]) > tokens:
            yield part
            part = []
        part.append(index)
    if part:
        yield part


class DpoTrainer(StepTrainer, DPOTrainer):
    """Trains on pairs that were encoded before; a step's loss is trl's, the mean over all its pairs.

    The reference is the policy as it starts. Its log-probabilities are computed once, before the first step
    (:meth:`log_probs`), and stand beside the pairs (:meth:`refer_to`): trl's second forward pass and its copy
    of the adapter are not needed.

    Args:
        pad_id: the padding token.
        options: what :class:`rlhf.training.hf_trainer.StepTrainer` and :class:`trl.DPOTrainer` take.
    """

    prefix = "dpo"
    shown: ClassVar = {"dpo/loss": ".3f", "dpo/accuracy": ".2f"}

    def __init__(self, *, pad_id: int, **options: Any) -> None:
        self._collate = DataCollatorForPreference(pad_token_id=pad_id)
        super().__init__(stage="dpo", **options)
        model: Any = self.model
        model.delete_adapter("ref")
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # encoded by our template

    def refer_to(self, chosen_B: Sequence[float], rejected_B: Sequence[float]) -> None:
        """Put the reference's log-probabilities of the responses, nats, beside the training pairs."""
        columns: Any = self.train_dataset
        for name, values in (("ref_chosen_logps", chosen_B), ("ref_rejected_logps", rejected_B)):
            columns = columns.add_column(name, list(values))
        self.train_dataset = columns

    @torch.no_grad()
    def log_probs(self, pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
        """Log-probability of each chosen and each rejected response by the policy as it is, nats, float32."""
        model: Any = self.model
        device = self.args.device
        model.eval()
        found_2B = torch.zeros(2, len(pairs))
        for part in batches(pairs, self._budget):
            batch = {k: v.to(device) for k, v in self._collate([pairs[i] for i in part]).items()}
            counts_BT = batch.pop("completion_mask")
            labels = batch["input_ids"].masked_fill(counts_BT == 0, -100)
            outputs = model(**batch, labels=labels, fused_lm_head=True, use_cache=False)
            found_2B[:, part] = outputs.log_probs.sum(dim=1).view(2, -1).float().cpu()
        return found_2B[0].tolist(), found_2B[1].tolist()

    def micro_batches(self, examples: list[Pair]) -> list[dict[str, Any]]:
        """Micro-batches of a step's pairs, each with its share in the mean over all pairs of the step."""
        total = torch.tensor(float(len(examples)), device=self.args.device)
        if processes() > 1:
            dist.all_reduce(total)
        share = float(total) / processes()  # DeepSpeed averages over the processes
        parts = batches(examples, self._budget)
        return [{"pairs": [examples[i] for i in part], "share": len(part) / share} for part in parts]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """A micro-batch's share of the mean loss over the pairs of the step."""
        batch = {k: v.to(self.args.device) for k, v in self._collate(inputs["pairs"]).items()}
        loss: Tensor = self._compute_loss(model, batch, False)
        seen = self._metrics["train"]
        found = {name: seen[theirs][-1] for name, theirs in _SHOWN.items()}
        seen.clear()
        number = len(inputs["pairs"])
        self.add(inputs["weight"] * number, loss=loss.detach(), pairs=1.0, **found)
        return loss * inputs["share"]

    @staticmethod
    def metrics_of(sums: Sums) -> dict[str, float]:
        """Means over the pairs of a step: loss, implicit rewards, their margin, how often it is positive."""
        return {name: sums[name] / max(1.0, sums["pairs"]) for name in ("loss", *_SHOWN)}


def new_trainer(
    recipe: Recipe,
    section: Dpo,
    dialogue: Dialogue,
    backbone: Backbone,
    pairs: Sequence[Pair],
    *,
    folder: Path,
    on_checkpoint: Callable[[], None] = lambda: None,
) -> DpoTrainer:
    """A trainer of a backbone's adapter, in place; once it knows the reference, ``fit`` takes all steps left.

    Args:
        recipe: the whole recipe.
        section: its ``dpo`` section.
        dialogue: tokenizer and template.
        backbone: the base with the adapter at its start.
        pairs: encoded pairs (:func:`policy.dpo.data.encode`).
        folder: where checkpoints and ``metrics.jsonl`` go.
        on_checkpoint: called behind every checkpoint.
    """
    return DpoTrainer(
        section=section,
        folder=folder,
        on_checkpoint=on_checkpoint,
        pad_id=dialogue.pad_id,
        model=backbone.model,
        args=training_arguments(recipe, section, folder / "checkpoints"),
        train_dataset=Dataset.from_list([{k: v for k, v in pair.items() if k != "index"} for pair in pairs]),
        processing_class=dialogue.tokenizer,
    )
