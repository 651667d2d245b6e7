"""The PPO stage around its trainer: build it from a recipe; save what it trained, with the figures."""

from __future__ import annotations

from typing import Any

from policy.audit.scores import AuditedScore
from policy.ppo.setup import assemble, audit_folder, audit_function, score_function
from policy.ppo.trainer import PpoTrainer
from policy.rewards.mixture import MOMENTS
from rlhf.data.stored import stored_prompts
from rlhf.recipe.load import Recipe
from rlhf.runs.folder import StageFolder
from rlhf.stats.overoptimization import verdict
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.metrics import read_metrics
from rlhf.training.runtime import Runtime

_REPORTED = ("objective/score", "objective/kl", "response/length", "response/eos_rate", "policy/entropy")
_WINDOW = 5  # steps averaged at the start and at the end


def build_trainer(recipe: Recipe, place: StageFolder) -> PpoTrainer:
    """The trainer of a recipe, which goes on from the last checkpoint in its folder."""
    section = recipe.ppo
    runtime = Runtime(
        recipe.distributed,
        seed=recipe.seed,
        max_grad_norm=section.max_grad_norm,
        micro_batch_size=section.micro_batch_size,
    )
    dialogue = load_dialogue(recipe)
    backbone = assemble(recipe, place, dialogue, sharded=runtime.shards_weights)
    score: Any = score_function(recipe, place, backbone, dialogue, all_sum=runtime.all_sum)
    if test := audit_folder(recipe, place):
        test_fn = audit_function(recipe, test, backbone, dialogue)
        score = AuditedScore(score, test_fn, section.micro_batch_size)
    return PpoTrainer(
        backbone=backbone,
        dialogue=dialogue,
        prompts=stored_prompts(place, "prompts.jsonl"),
        reward_fn=score,
        section=section,
        folder=place.folder,
        seed=recipe.seed,
        runtime=runtime,
        reward_metrics=lambda: score.figures(runtime.all_sum, runtime.device),
        on_checkpoint=place.note_clock,
    )


def save(trainer: PpoTrainer) -> dict[str, Any]:
    """Write the trained adapters; returns the figures for the manifest, empty but on the main process."""
    if trainer.done != trainer.section.steps and trainer.ended_early is None:
        raise RuntimeError(f"ppo: {trainer.done} of {trainer.section.steps} steps were done")
    trainer.save()
    if not trainer.is_main:
        return {}
    log, runtime = read_metrics(trainer.folder), trainer.runtime
    results: dict[str, Any] = {"steps": trainer.done, "processes": runtime.world, "zero": runtime.stage}
    for name in _REPORTED:
        ends = [[row[name] for row in part] for part in (log[:_WINDOW], log[-_WINDOW:])]
        results[name] = {"first": sum(ends[0]) / len(ends[0]), "last": sum(ends[1]) / len(ends[1])}
    results["nonfinite_updates"] = trainer.nonfinite.count
    results |= {name: value for name, value in trainer.reward_fn.state().items() if name == MOMENTS and value}
    if trainer.ended_early is not None:
        results["ended_early"] = trainer.ended_early
    kept = None
    if trainer.weights.best is not None:
        kept = results["kept_step"] = trainer.weights.best.chosen().step
        print(f"ppo: kept the policy of step {kept} of {trainer.done}, the test model's best", flush=True)
    results["audit"] = verdict(log, trainer.section.steps, kept)
    print(f"ppo: {results['audit']['text']}", flush=True)
    return results
