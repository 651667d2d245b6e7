"""The work of the PPO stage: assemble, train, save."""

from __future__ import annotations

from typing import Any

from policy.ppo.setup import assemble, score_function
from policy.ppo.trainer import PpoTrainer
from policy.ppo.weights import Adapters
from rlhf.collect.__main__ import stored_prompts
from rlhf.models.lora import HEAD
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.metrics import read_metrics
from rlhf.training.runtime import Runtime

_REPORTED = ("objective/score", "objective/kl", "response/length", "response/eos_rate", "policy/entropy")
_WINDOW = 5  # steps averaged at the start and at the end


def run(recipe: Recipe, stage: StageRun) -> dict[str, Any]:
    """Train the policy of a recipe; returns the figures for the manifest."""
    section = recipe.ppo
    runtime = Runtime(
        recipe.distributed,
        seed=recipe.seed,
        max_grad_norm=section.max_grad_norm,
        micro_batch_size=section.micro_batch_size,
    )
    dialogue = load_dialogue(recipe)
    backbone = assemble(recipe, stage, dialogue)
    if runtime.shards_weights:
        backbone.frozen_layers = 0  # ZeRO-3 gathers whole layers anyway; the cache would save little
    score = score_function(recipe, stage, backbone, dialogue)
    trainer = PpoTrainer(
        backbone=backbone,
        dialogue=dialogue,
        prompts=stored_prompts(stage, "prompts.jsonl"),
        reward_fn=score,
        section=section,
        folder=stage.folder,
        seed=recipe.seed,
        runtime=runtime,
        reward_metrics=lambda: score.figures(runtime.all_sum, runtime.device),
        on_checkpoint=stage.note_clock,
    )
    trainer.train()
    if trainer.done != section.steps and trainer.ended_early is None:
        raise RuntimeError(f"ppo: {trainer.done} of {section.steps} steps were done")
    adapters = trainer.weights.gathered()
    return _save(trainer, adapters) if stage.is_main else {}


def _save(trainer: PpoTrainer, adapters: Adapters) -> dict[str, Any]:
    """Write the trained adapters with their tokenizer; returns the figures for the manifest."""
    if trainer.section.has_value:
        adapters["value"][f"{HEAD}.bias"] += trainer.backbone.offsets["value"]  # peft's format has no offset
    if trainer.weights.ema is not None:
        adapters["policy_last"] = adapters["policy"]
        adapters["policy"] = trainer.weights.ema
    trainer.weights.write_adapters(trainer.folder, adapters)
    for adapter in adapters:
        trainer.dialogue.tokenizer.save_pretrained(str(trainer.folder / adapter))
    log, runtime = read_metrics(trainer.folder), trainer.runtime
    results: dict[str, Any] = {"steps": trainer.done, "processes": runtime.world, "zero": runtime.stage}
    for name in _REPORTED:
        ends = [[row[name] for row in part] for part in (log[:_WINDOW], log[-_WINDOW:])]
        results[name] = {"first": sum(ends[0]) / len(ends[0]), "last": sum(ends[1]) / len(ends[1])}
    results["nonfinite_updates"] = trainer.nonfinite.count
    if trainer.ended_early is not None:
        results["ended_early"] = trainer.ended_early
    return results
