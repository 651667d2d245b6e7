"""The work of the PPO stage: assemble, train, save."""

from __future__ import annotations

from typing import Any

from policy.ppo.setup import assemble, score_function
from policy.ppo.trainer import PpoTrainer
from rlhf.collect.__main__ import stored_prompts
from rlhf.models.lora import HEAD
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.metrics import read_metrics
from rlhf.training.runtime import Runtime

_REPORTED = ("objective/score", "objective/kl", "response/length", "response/eos_rate", "policy/entropy")
_WINDOW = 5  # steps averaged at the start and at the end


def fit(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Train the policy of a recipe; returns the figures for the manifest."""
    section = recipe.ppo
    runtime = Runtime(
        recipe.distributed,
        seed=recipe.seed,
        max_grad_norm=section.max_grad_norm,
        micro_batch_size=section.micro_batch_size,
    )
    dialogue = load_dialogue(recipe)
    backbone = assemble(recipe, run, dialogue)
    if runtime.shards_weights:
        backbone.frozen_layers = 0  # ZeRO-3 gathers whole layers anyway; the cache would save little
    prompts = stored_prompts(run, "prompts.jsonl")
    score = score_function(recipe, run, backbone, dialogue)
    trainer = PpoTrainer(
        backbone=backbone,
        runtime=runtime,
        dialogue=dialogue,
        prompts=prompts,
        score_fn=score,
        section=section,
        seed=recipe.seed,
        run=run,
        score_figures=lambda: score.figures(runtime.all_sum, runtime.device),
    )
    trainer.train()
    if trainer.done != section.steps and trainer.ended_early is None:
        raise RuntimeError(f"ppo: {trainer.done} of {section.steps} steps were done")
    adapters = trainer.learner.weights()
    if run.is_main:
        if section.has_value:
            adapters["value"][f"{HEAD}.bias"] += backbone.offsets["value"]  # peft's format has no offset
        if trainer.learner.average is not None:
            adapters["policy_last"] = adapters["policy"]
            adapters["policy"] = trainer.learner.average
        trainer.learner.write_adapters(run.folder, adapters)
        for adapter in adapters:
            dialogue.tokenizer.save_pretrained(str(run.folder / adapter))
        log = read_metrics(run.folder)
        results: dict[str, Any] = {"steps": trainer.done, "processes": runtime.world, "zero": runtime.stage}
        for name in _REPORTED:
            ends = [[row[name] for row in part] for part in (log[:_WINDOW], log[-_WINDOW:])]
            results[name] = {"first": sum(ends[0]) / len(ends[0]), "last": sum(ends[1]) / len(ends[1])}
        results["bad_updates"] = trainer.bad.count
        if trainer.ended_early is not None:
            results["ended_early"] = trainer.ended_early
        return results
    return {}
