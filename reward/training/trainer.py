"""``trl.RewardTrainer`` taught whole comparisons, packed rows, and checkpoints that survive ``kill -9``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PrinterCallback
from trl import RewardConfig, RewardTrainer

from reward.model.batch import Trunk, Wanted, micro_batches, pack
from reward.model.forward import forward_packed, response_log_probs
from reward.training.objective import Signals, objective
from rlhf.models.folding import Folding
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import PreferenceTraining
from rlhf.runs.artifacts import Checkpoints
from rlhf.runs.stage import StageRun
from rlhf.training.hf_trainer import Checkpointing, StepLog, Sums, accumulate, arguments
from rlhf.training.metrics import Metrics

_ADAPTER = "default"  # peft's name of the one adapter of a reward model


def training_arguments(
    recipe: Recipe, section: PreferenceTraining, folder: Path, *, rate: float, seed: int
) -> RewardConfig:
    """trl's arguments for a section of a recipe; every file that the trainer writes goes below ``folder``."""
    options = arguments(recipe, section, folder, rate=rate, seed=seed)
    return RewardConfig(**options, disable_dropout=True)


class PreferenceTrainer(Checkpointing, RewardTrainer):
    """Trains on whole comparisons: a prompt forwarded once, all pairs of a prompt one batch element.

    Args:
        run: the open stage.
        checkpoints: where this training keeps its checkpoints.
        metrics: where each step's figures go.
        section: the objective and the sizes.
        pad_id: the padding token.
        share: pack the responses of a prompt behind one copy of it.
        trunk: states of all examples below the first adapted layer, where they are kept.
        vocabulary: hidden states to logits, where the objective has a language-model term.
        steps_before: optimiser steps that the log holds of earlier trainings of the stage.
        options: what :class:`trl.RewardTrainer` takes.
    """

    def __init__(
        self,
        *,
        run: StageRun,
        checkpoints: Checkpoints,
        metrics: Metrics,
        section: PreferenceTraining,
        pad_id: int,
        share: bool,
        trunk: Trunk | None,
        vocabulary: nn.Module | None,
        steps_before: int = 0,
        **options: Any,
    ) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._objective = objective(section)
        self._budget = section.tokens_per_micro_batch
        self._pad_id = pad_id
        self._share = share
        self._trunk = trunk
        self._vocabulary = vocabulary
        self._seen: dict[str, float] = defaultdict(float)
        super().__init__(
            data_collator=lambda examples: {"examples": examples},
            callbacks=[StepLog(metrics, "reward", self._seen, figures, steps_before)],
            **options,
        )
        self.remove_callback(PrinterCallback)
        trained: Any = self.model
        self._folding = Folding(trained)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # encoded by reward.model.batch, in the one template of all stages

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            names = ["prompt", "responses", "spoken", "ranks", "index"]
            setattr(self, "_signature_columns", names)  # noqa: B010 (typed as None by its parent)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients of one optimiser step, a micro-batch at a time; returns the step's loss."""
        model, inputs = args[0], args[1]
        model.train()
        examples = inputs["examples"]
        parts = micro_batches(examples, self._budget, share=self._share)

        def loss_of(part: list[int], weight: float) -> Tensor:
            some = [examples[i] for i in part]
            loss: Tensor = self.compute_loss(
                model, {"examples": some, "normaliser": len(examples), "weight": weight}
            )
            return loss

        with self._folding.folded(_ADAPTER):
            return accumulate(self, parts, loss_of)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """A micro-batch's share of the objective's mean over the comparisons of the step."""
        examples, weight = inputs["examples"], inputs["weight"]
        wanted: Wanted = "best" if self._objective.needs_language else "none"
        packed = pack(examples, self._pad_id, share=self._share, wanted=wanted).to(self.args.device)
        hidden_NTD, scores_BK = forward_packed(model, packed, self._trunk)
        log_probs_BK = lengths_BK = None
        if self._vocabulary is not None:
            log_probs_BK, lengths_BK = response_log_probs(hidden_NTD, packed, self._vocabulary)
        outcome = self._objective(
            Signals(scores_BK, log_probs_BK, lengths_BK, packed.ranks_BK, packed.mask_BK),
            normaliser=inputs["normaliser"],
        )
        sums: dict[str, Any] = {
            "correct": outcome.correct,
            "pairs": outcome.pairs,
            "comparisons": len(examples),
        }
        sums |= {"loss": outcome.loss.detach() * inputs["normaliser"]}
        sums |= {name: part * inputs["normaliser"] for name, part in outcome.parts.items()}
        for name, value in sums.items():
            self._seen[name] += weight * float(value)
        return (outcome.loss, {"scores": scores_BK}) if return_outputs else outcome.loss


def figures(sums: Sums) -> dict[str, float]:
    """What the log says of a step, from the sums of all processes."""
    comparisons, pairs, correct = (sums.pop(name) for name in ("comparisons", "pairs", "correct"))
    values = {"pair_accuracy": correct / pairs} if pairs else {}
    return values | {name: value / comparisons for name, value in sums.items()}
