"""One training of a preference model, from its newest checkpoint to its last step: what both stages share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from torch import nn

from reward.model.batch import Example, Trunk
from reward.model.forward import check_packing
from reward.model.model import vocabulary_head
from reward.model.trunk_cache import build_trunk
from reward.training.objective import objective
from reward.training.trainer import PreferenceTrainer, training_arguments
from rlhf.models.base import best_device
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import PreferenceTraining
from rlhf.runs.artifacts import Checkpoints, step_of
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.hf_trainer import resumable
from rlhf.training.metrics import Metrics

_SHARES = {"pmp": 0.1, "reward": 0.01}  # of the pre-training learning rate (Bai 2022, A.2)


def learning_rate(recipe: Recipe, section: PreferenceTraining, stage: str) -> float:
    """The section's peak learning rate, or its stage's share of ``model.pretraining_learning_rate``."""
    return section.learning_rate or _SHARES[stage] * recipe.model.pretraining_learning_rate


class Passes(NamedTuple):
    """How examples are laid out, and what is known of them before any pass."""

    share: bool
    """Prompts stand once for all their responses."""
    trunk: Trunk | None
    """States below the first adapted layer, where they are kept."""


def passes(
    recipe: Recipe, section: PreferenceTraining, model: Any, rows: Sequence[Example], dialogue: Dialogue
) -> Passes:
    """Find out how this model can go over these examples without doing work twice; warnings are printed."""
    model = model.to(best_device()).eval()
    share = section.share_prompts
    if share and (warning := check_packing(model, rows[:32], dialogue.pad_id)):
        print(f"warning: {warning}", flush=True)
        share = False
    trunk = build_trunk(recipe, model, rows, dialogue.pad_id, share=share, gigabytes=section.trunk_gigabytes)
    return Passes(share, trunk)


def learn(
    recipe: Recipe,
    section: PreferenceTraining,
    run: StageRun,
    dialogue: Dialogue,
    model: Any,
    rows: Sequence[Example],
    way: Passes,
    *,
    member: int = 0,
    members: int = 1,
) -> nn.Module:
    """Train a model on encoded comparisons; an interrupted training goes on from its newest checkpoint.

    Args:
        recipe: the whole recipe.
        section: its ``pmp`` or ``reward`` section.
        run: the open stage.
        dialogue: the token contract.
        model: a reward model at its start.
        rows: encoded training comparisons.
        way: how to go over them.
        member: number of this training among those of the stage; it moves the seed.
        members: how many trainings the stage has.

    Returns:
        The trained model.
    """
    vocabulary = vocabulary_head(recipe, model) if objective(section).needs_language else None
    steps = section.epochs * -(-len(rows) // section.batch_size)
    folder = run.folder / "checkpoints"
    checkpoints = Checkpoints(folder / f"member-{member}") if members > 1 else run.checkpoints
    checkpoint = checkpoints.newest()
    done = step_of(checkpoint)
    if checkpoint and run.is_main:
        print(f"{run.stage}: going on after step {done} of {steps}", flush=True)
    metrics = Metrics(
        run.folder,
        total=steps * members,
        done=member * steps + done,
        shown={"reward/loss": ".3f", "reward/pair_accuracy": ".2f"},
        description=run.stage,
        active=run.is_main,
    )
    rate = learning_rate(recipe, section, run.stage)
    trainer = PreferenceTrainer(
        run=run,
        checkpoints=checkpoints,
        metrics=metrics,
        section=section,
        pad_id=dialogue.pad_id,
        share=way.share,
        trunk=way.trunk,
        vocabulary=vocabulary,
        steps_before=member * steps,
        model=model,
        args=training_arguments(recipe, section, folder, rate=rate, seed=recipe.seed + member),
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
