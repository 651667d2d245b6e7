"""``trl.DPOTrainer`` on pairs in the template of all stages; checkpoints that survive ``kill -9``.

Shape suffixes: ``_P`` pair, ``_R`` response, ``_B`` response of a micro-batch, the chosen ones first,
``_T`` token, ``_S`` response token of all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from policy.dpo.forward import TOKENS_AT_ONCE, Forward, distinct, micro_batches, plan_forward, reading
from rlhf.models.backbone import Backbone
from rlhf.models.base import vocabulary_head
from rlhf.models.packing import with_hidden_states
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Dpo
from rlhf.runs.processes import processes
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.hf_trainer import ADAPTER, StepTrainer, Sums, arguments

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


class DpoTrainer(StepTrainer, DPOTrainer):
    """Trains on pairs that were encoded before; a step's loss is trl's, the mean over all its pairs.

    The reference is the policy as it starts. Its log-probabilities are computed once, before the first step
    (:meth:`log_probs`), and stand beside the pairs (:meth:`refer_to`): trl's second forward pass and its copy
    of the adapter are not needed. The log-probabilities that trl makes its loss of come from ``forward``, for
    the response tokens alone.

    Args:
        forward: how the policy reads pairs.
        options: what :class:`rlhf.training.hf_trainer.StepTrainer` and :class:`trl.DPOTrainer` take.
    """

    prefix = "dpo"
    shown: ClassVar = {"dpo/loss": ".3f", "dpo/accuracy": ".2f"}

    def __init__(self, *, forward: Forward, **options: Any) -> None:
        self._forward = forward
        self._collate = DataCollatorForPreference(pad_token_id=forward.pad_id)
        super().__init__(stage="dpo", **options)
        model: Any = self.model
        model.delete_adapter("ref")
        self.precompute_ref_logps = True
        self.aux_loss_enabled = False  # of routers, which no adapter changes

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
        model.eval()
        readings, places_2P = distinct(pairs)
        found: dict[int, Tensor] = {}  # of the responses of each reading
        with self._folding.folded(ADAPTER):
            for part in micro_batches(readings, TOKENS_AT_ONCE, share=self._forward.share):
                some = [readings[i] for i in part]
                logps_S, _, owners_S = self._forward(model, some, self.args.device)
                sizes = [len(one.responses) for one in some]
                sums_R = torch.zeros(sum(sizes), device=logps_S.device).index_add(0, owners_S, logps_S)
                found.update(zip(part, sums_R.cpu().split(sizes), strict=True))
        chosen_P, rejected_P = torch.cat([torch.zeros(0), *(found[i] for i in range(len(readings)))])[
            places_2P
        ]
        return chosen_P.tolist(), rejected_P.tolist()

    def micro_batches(self, examples: list[Pair]) -> list[dict[str, Any]]:
        """Micro-batches of a step's pairs, each with its share in the mean over all pairs of the step."""
        total = torch.tensor(float(len(examples)), device=self.args.device)
        if processes() > 1:
            dist.all_reduce(total)
        share = float(total) / processes()  # DeepSpeed averages over the processes
        parts = micro_batches([*map(reading, examples)], self._budget, share=self._forward.share)
        return [{"pairs": [examples[i] for i in part], "share": len(part) / share} for part in parts]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """A micro-batch's share of the mean loss over the pairs of the step."""
        pairs, device = inputs["pairs"], self.args.device
        said = [{**pair, "prompt_ids": pair["prompt_ids"][-1:]} for pair in pairs]  # trl masks the prompt
        batch = {k: v.to(device) for k, v in self._collate(said).items()}
        mask_BT = batch["completion_mask"][:, 1:].bool()

        def outputs(**_: Any) -> SimpleNamespace:
            logps_S, entropy_S, owners_S = self._forward(model, [*map(reading, pairs)], device)
            rows_S = (owners_S % 2) * len(pairs) + owners_S // 2  # trl has all chosen responses first
            order_S = rows_S.argsort(stable=True)
            zeros_BT = torch.zeros(mask_BT.shape, device=device)
            return SimpleNamespace(
                log_probs=zeros_BT.masked_scatter(mask_BT, logps_S[order_S]),
                entropy=zeros_BT.masked_scatter(mask_BT, entropy_S[order_S]),
                mean_logits=zeros_BT,  # trl logs these two, and we do not
                is_top1=torch.zeros_like(mask_BT),
            )

        with _alone(self.accelerator):
            loss: Tensor = self._compute_loss(outputs, batch, False)
        seen = self._metrics["train"]
        found = {name: seen[theirs][-1] for name, theirs in _SHOWN.items()}
        seen.clear()
        self.add(inputs["weight"] * len(pairs), loss=loss.detach(), pairs=1.0, **found)
        return loss * inputs["share"]

    @staticmethod
    def metrics_of(sums: Sums) -> dict[str, float]:
        """Means over the pairs of a step: loss, implicit rewards, their margin, how often it is positive."""
        return {name: sums[name] / max(1.0, sums["pairs"]) for name in ("loss", *_SHOWN)}


@contextlib.contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """Keep trl from gathering its figures: processes have micro-batches of other sizes and numbers, and the
    log adds up theirs."""
    accelerator.gather = accelerator.gather_for_metrics = lambda values: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def new_trainer(
    recipe: Recipe,
    section: Dpo,
    dialogue: Dialogue,
    backbone: Backbone,
    pairs: Sequence[Pair],
    others: Sequence[Pair] = (),
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
        pairs: encoded pairs (:func:`policy.dpo.data.encode`) to learn.
        others: pairs that :meth:`DpoTrainer.log_probs` will be asked about, too.
        folder: where checkpoints and ``metrics.jsonl`` go.
        on_checkpoint: called behind every checkpoint.
    """
    head = vocabulary_head(recipe, with_hidden_states(backbone.base))
    return DpoTrainer(
        section=section,
        folder=folder,
        on_checkpoint=on_checkpoint,
        forward=plan_forward(recipe, section, backbone.model, [*pairs, *others], head, dialogue.pad_id),
        model=backbone.model,
        args=training_arguments(recipe, section, folder / "checkpoints"),
        train_dataset=Dataset.from_list([{k: v for k, v in pair.items() if k != "index"} for pair in pairs]),
        processing_class=dialogue.tokenizer,
    )
