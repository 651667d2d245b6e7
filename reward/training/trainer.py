"""``trl.RewardTrainer`` taught whole comparisons, packed rows, and checkpoints that survive ``kill -9``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback
from trl import RewardConfig, RewardTrainer

from reward.loss import Signals, needs_language, objective_loss
from reward.model.batch import Example, Wanted, micro_batches, pack
from reward.model.forward import check_packing, forward_packed, response_log_probs
from reward.model.model import vocabulary_head
from reward.model.trunk_cache import build_trunk
from rlhf.models.base import best_device
from rlhf.models.folding import Folding
from rlhf.models.trunk_cache import TrunkCache
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import PreferenceTraining
from rlhf.runs.artifacts import Checkpoints, step_of
from rlhf.runs.stage import rank
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.hf_trainer import Checkpointing, StepLog, Sums, accumulate, arguments, resumable
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
        checkpoints: where this training keeps its checkpoints.
        metrics: where each step's figures go.
        on_checkpoint: called behind every checkpoint.
        section: the objective and the sizes.
        pad_id: the padding token.
        share: pack the responses of a prompt behind one copy of it.
        trunk: states of all examples below the first adapted layer, where they are kept.
        vocabulary: hidden states to logits, where the objective has a language-model term.
        steps_before: optimizer steps that the log holds of earlier trainings of the stage.
        options: what :class:`trl.RewardTrainer` takes.
    """

    def __init__(
        self,
        *,
        checkpoints: Checkpoints,
        metrics: Metrics,
        on_checkpoint: Callable[[], None] = lambda: None,
        section: PreferenceTraining,
        pad_id: int,
        share: bool,
        trunk: TrunkCache | None,
        vocabulary: nn.Module | None,
        steps_before: int = 0,
        **options: Any,
    ) -> None:
        self._checkpoints, self._on_checkpoint = checkpoints, on_checkpoint
        self._section = section
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
        """Gradients of one optimizer step, a micro-batch at a time; returns the step's loss."""
        model, inputs = args[0], args[1]
        model.train()
        examples = inputs["examples"]
        parts = micro_batches(examples, self._budget, share=self._share)

        def loss_of(part: list[int], weight: float) -> Tensor:
            some = [examples[i] for i in part]
            loss: Tensor = self.compute_loss(
                model, {"examples": some, "normalizer": len(examples), "weight": weight}
            )
            return loss

        with self._folding.folded(_ADAPTER):
            return accumulate(self, parts, loss_of)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """A micro-batch's share of the objective's mean over the comparisons of the step."""
        examples, weight = inputs["examples"], inputs["weight"]
        wanted: Wanted = "best" if needs_language(self._section) else "none"
        packed = pack(examples, self._pad_id, share=self._share, wanted=wanted).to(self.args.device)
        hidden_NTD, scores_BK = forward_packed(model, packed, self._trunk)
        log_probs_BK = lengths_BK = None
        if self._vocabulary is not None:
            log_probs_BK, lengths_BK = response_log_probs(hidden_NTD, packed, self._vocabulary)
        outcome = objective_loss(
            self._section,
            Signals(scores_BK, log_probs_BK, lengths_BK, packed.ranks_BK, packed.mask_BK),
            normalizer=inputs["normalizer"],
        )
        sums: dict[str, Any] = {
            "correct": outcome.correct,
            "pairs": outcome.pairs,
            "comparisons": len(examples),
        }
        sums |= {"loss": outcome.loss.detach() * inputs["normalizer"]}
        sums |= {name: part * inputs["normalizer"] for name, part in outcome.parts.items()}
        for name, value in sums.items():
            self._seen[name] += weight * float(value)
        return outcome.loss


def figures(sums: Sums) -> dict[str, float]:
    """What the log says of a step, from the sums of all processes."""
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
    trunk: TrunkCache | None
    """States below the first adapted layer, where they are kept."""


def plan_forward(
    recipe: Recipe, section: PreferenceTraining, model: Any, rows: Sequence[Example], dialogue: Dialogue
) -> ForwardPlan:
    """How this model can go over these examples without computing anything twice; warnings are printed."""
    model = model.to(best_device()).eval()
    share = section.share_prompts
    if share and (warning := check_packing(model, rows[:32], dialogue.pad_id)):
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

    Returns:
        The trained model.
    """
    vocabulary = vocabulary_head(recipe, model) if needs_language(section) else None
    steps = section.epochs * -(-len(rows) // section.batch_size)
    is_main = rank() == 0
    below = folder / "checkpoints"
    checkpoints = Checkpoints(below / f"member-{member}" if members > 1 else below)
    checkpoint = checkpoints.newest()
    done = step_of(checkpoint)
    if checkpoint and is_main:
        print(f"{stage}: going on after step {done} of {steps}", flush=True)
    metrics = Metrics(
        folder,
        total=steps * members,
        done=member * steps + done,
        shown={"reward/loss": ".3f", "reward/pair_accuracy": ".2f"},
        description=stage,
        active=is_main,
    )
    rate = learning_rate(recipe, section, stage)
    trainer = PreferenceTrainer(
        checkpoints=checkpoints,
        metrics=metrics,
        on_checkpoint=on_checkpoint,
        section=section,
        pad_id=dialogue.pad_id,
        share=plan.share,
        trunk=plan.trunk,
        vocabulary=vocabulary,
        steps_before=member * steps,
        model=model,
        args=training_arguments(recipe, section, below, rate=rate, seed=recipe.seed + member),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=dialogue.tokenizer,
    )
    resume = resumable(checkpoint / f"checkpoint-{done}") if checkpoint else None
    trainer.train(resume_from_checkpoint=resume)
    metrics.close()
    if trainer.state.global_step != trainer.state.max_steps:
        raise RuntimeError(f"trained {trainer.state.global_step} of {trainer.state.max_steps} steps")
    trained: Any = trainer.model
    return trained.eval()
