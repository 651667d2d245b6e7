"""``trl.RewardTrainer`` taught whole comparisons, packed rows, and checkpoints that survive ``kill -9``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from datasets import Dataset
from torch import nn
from trl import RewardConfig, RewardTrainer

from reward.loss import Signals, needs_language, objective_loss
from reward.model.batch import Example, Wanted, micro_batches, pack
from reward.model.forward import check_packing, forward_packed, score_examples
from reward.model.trunk_cache import build_trunk
from reward.training.validation import Validation
from rlhf.models.base import best_device, vocabulary_head
from rlhf.models.packing import sequence_log_probs
from rlhf.models.trunk_cache import ResponseStates
from rlhf.recipe.load import Recipe
from rlhf.recipe.reward import PreferenceTraining
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.hf_trainer import StepTrainer, Sums, arguments


def training_arguments(
    recipe: Recipe, section: PreferenceTraining, folder: Path, *, rate: float, seed: int
) -> RewardConfig:
    """trl's arguments for a section of a recipe; every file that the trainer writes goes below ``folder``."""
    options = arguments(recipe, section, folder, rate=rate, seed=seed)
    return RewardConfig(**options, disable_dropout=True)


class PreferenceTrainer(StepTrainer, RewardTrainer):
    """Trains on whole comparisons: a prompt forwarded once, all pairs of a prompt one batch element.

    Args:
        section: the objective and the sizes.
        pad_id: the padding token.
        share: pack the responses of a prompt behind one copy of it.
        trunk: states of all examples below the first adapted layer, where they are kept.
        vocabulary: hidden states to logits, where the objective has a language-model term.
        options: what :class:`rlhf.training.hf_trainer.StepTrainer` and :class:`trl.RewardTrainer` take.
    """

    prefix = "reward"
    shown: ClassVar = {"reward/loss": ".3f", "reward/pair_accuracy": ".2f"}

    def __init__(
        self,
        *,
        section: PreferenceTraining,
        pad_id: int,
        share: bool,
        trunk: ResponseStates | None,
        vocabulary: nn.Module | None,
        **options: Any,
    ) -> None:
        self._section, self._pad_id, self._share = section, pad_id, share
        self._trunk, self._vocabulary = trunk, vocabulary
        super().__init__(section=section, **options)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # encoded by reward.model.batch, in the one template of all stages

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            names = ["prompt", "responses", "spoken", "ranks", "index"]
            setattr(self, "_signature_columns", names)  # noqa: B010 (typed as None by its parent)

    def micro_batches(self, examples: list[Example]) -> list[dict[str, Any]]:
        """Micro-batches of a step's comparisons."""
        return [
            {"examples": [examples[i] for i in part], "normalizer": len(examples)}
            for part in micro_batches(examples, self._budget, share=self._share)
        ]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """A micro-batch's share of the objective's mean over the comparisons of the step."""
        examples, weight = inputs["examples"], inputs["weight"]
        wanted: Wanted = "best" if needs_language(self._section) else "none"
        packed = pack(examples, self._pad_id, share=self._share, wanted=wanted).to(self.args.device)
        hidden_NTD, scores_R = forward_packed(model, packed, self._trunk)
        signals = Signals(packed.by_comparison(scores_R), None, None, packed.ranks_BK, packed.mask_BK)
        if self._vocabulary is not None:
            both = sequence_log_probs(hidden_NTD, packed, self._vocabulary)
            log_probs_BK, lengths_BK = map(packed.by_comparison, both)
            signals = signals._replace(log_probs_BK=log_probs_BK, lengths_BK=lengths_BK)
        outcome = objective_loss(self._section, signals, normalizer=inputs["normalizer"])
        self.add(weight, correct=outcome.correct, pairs=outcome.pairs, comparisons=len(examples))
        self.add(weight * inputs["normalizer"], loss=outcome.loss.detach(), **outcome.parts)
        return outcome.loss

    @staticmethod
    def metrics_of(sums: Sums) -> dict[str, float]:
        """Mean loss and its parts over the comparisons of a step, and the share of right pairs."""
        comparisons, pairs, correct = (sums.pop(name) for name in ("comparisons", "pairs", "correct"))
        values = {"pair_accuracy": correct / pairs} if pairs else {}
        return values | {name: value / comparisons for name, value in sums.items()}


_SHARES = {"pmp": 0.1, "reward": 0.01}  # of the pre-training learning rate (Bai 2022, A.2)


def learning_rate(recipe: Recipe, section: PreferenceTraining, stage: str) -> float:
    """The section's peak learning rate, or its stage's share of ``model.pretraining_learning_rate``."""
    return section.learning_rate or _SHARES[stage] * recipe.model.pretraining_learning_rate


class ForwardPlan(NamedTuple):
    """How examples are laid out, and what is known of them before any pass."""

    share: bool
    """Prompts stand once for all their responses."""
    trunk: ResponseStates | None
    """States below the first adapted layer, where they are kept."""


def plan_forward(
    recipe: Recipe, section: PreferenceTraining, model: Any, rows: Sequence[Example], dialogue: Dialogue
) -> ForwardPlan:
    """How this model can go over these examples without computing anything twice; warnings are printed."""
    model = model.to(best_device()).eval()
    share = section.share_prompts
    if share and (warning := check_packing(model, rows, dialogue.pad_id)):
        print(f"warning: {warning}", flush=True)
        share = False
    return ForwardPlan(share, build_trunk(recipe, section, model, rows, dialogue.pad_id, share=share))


def train_preference_model(
    recipe: Recipe,
    section: PreferenceTraining,
    dialogue: Dialogue,
    model: Any,
    rows: Sequence[Example],
    plan: ForwardPlan,
    *,
    folder: Path,
    stage: str = "reward",
    on_checkpoint: Callable[[], None] = lambda: None,
    member: int = 0,
    members: int = 1,
    validation: Validation | None = None,
) -> nn.Module:
    """Train a model on encoded comparisons; an interrupted training goes on from its newest checkpoint.

    Args:
        recipe: the whole recipe.
        section: its ``pmp`` or ``reward`` section.
        dialogue: tokenizer, template and lengths.
        model: a reward model at its start.
        rows: encoded training comparisons.
        plan: how to go over them.
        folder: where checkpoints and ``metrics.jsonl`` go.
        stage: ``reward`` or ``pmp``: which default learning rate, and the name in the log.
        on_checkpoint: called behind every checkpoint.
        member: number of this training among those of the stage; it moves the seed.
        members: how many trainings the stage has.
        validation: judges the model meanwhile.

    Returns:
        The trained model.
    """
    rate = learning_rate(recipe, section, stage)
    trainer = PreferenceTrainer(
        section=section,
        stage=stage,
        folder=folder,
        on_checkpoint=on_checkpoint,
        member=member,
        members=members,
        pad_id=dialogue.pad_id,
        share=plan.share,
        trunk=plan.trunk,
        vocabulary=vocabulary_head(recipe, model.base_model.model) if needs_language(section) else None,
        model=model,
        args=training_arguments(
            recipe, section, folder / "checkpoints", rate=rate, seed=recipe.seed + member
        ),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=dialogue.tokenizer,
    )
    trained: Any = trainer.model
    if validation is not None:
        steps = section.epochs * -(-len(rows) // section.batch_size)
        options: Any = {"share": plan.share, "trunk": plan.trunk}
        pad_id, held = dialogue.pad_id, validation.rows
        validation.begin(trained, steps, lambda model: score_examples(model, held, pad_id, **options)[0])
        trainer.add_callback(validation)
    trainer.fit()
    return trained.eval()
