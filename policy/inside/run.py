"""The work of the stage `inside`: the run's models in memory, a question after the other, the page."""

from __future__ import annotations

from typing import Any

from policy.inside.circuit.question import circuits
from policy.inside.neurons.lens import find_lens
from policy.inside.neurons.question import find_neurons, texts_of
from policy.inside.questions import Inspection
from policy.inside.report import as_markdown, draw
from policy.inside.solutions.policies import BETWEEN, compare_policies, times_of
from policy.inside.solutions.soft_prompts import compare_prompts
from policy.ppo.setup import (
    EnsembleScore,
    check_rewards,
    load_scorer,
    model_scores,
    reward_adapters,
    reward_folders,
    shapes_of,
)
from rlhf.data.stored import held_out_prompts, stored_prompts
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.base import best_device, load_in_float32
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import write_atomically, write_json
from rlhf.runs.initial_adapter import start_folder
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import load_dialogue

START = "start"  # the role of the adapter that PPO started from, beside the base


def look(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Do the stage's work: ``inside.json``, ``inside.md`` and plots; returns figures for the manifest.

    Each answer is kept as it is there, so that an interrupted stage goes on with the next question.

    Raises:
        UserError: an adapter does not fit the base, the policy is its reference, or the recipe's own pairs
            or texts are none.
    """
    models, options = _inspection(recipe, run), recipe.inside
    texts = texts_of(models) if options.neurons else None
    own = models.own_pairs("reward")
    start = START if START in models.backbone.model.peft_config else None
    before = start or REFERENCE
    found: dict[str, Any] = {"name": recipe.name, "model": recipe.model.path, "seed": recipe.seed}
    found["options"] = options.model_dump()
    found["policy"] = run.remember("policy", lambda: models.change("PPO", "policy", before))
    if start:
        found["start"] = run.remember("start", lambda: models.change("start", start, REFERENCE))
    if "reward" in models.backbone.heads:
        found["reads"] = models.reads("reward", own, run.remember)
    else:
        found["reads"] = {"skipped": "no reward model is an adapter on the policy's base"}
    if options.edges != "none":
        found["circuit"] = circuits(models, "reward", found["reads"], run.remember)
    if texts is not None:
        found["neurons"] = run.remember("neurons", lambda: find_neurons(models, texts, "policy", before))
        named = options.others or []
        found["lens"] = run.remember("lens", lambda: find_lens(models, texts, named, "policy", before))
    if options.soft_prompts:
        training = stored_prompts(run, "prompts.jsonl")
        found["prompts"] = run.remember(
            "prompts", lambda: compare_prompts(models, training, "policy", before)
        )
    if (others := options.others) and len(others) > 1:
        found["policies"] = run.remember("policies", lambda: compare_policies(models, others))
    found["cost"] = run.clock()
    write_json(run.folder / "inside.json", found)
    draw(found, run.folder)
    write_atomically(run.folder / "inside.md", as_markdown(found))
    return {"figures": "inside.json"}


def _inspection(recipe: Recipe, run: StageRun) -> Inspection:
    """The policy, what it started from, and the reward models as adapters of one base."""
    dialogue = load_dialogue(recipe)
    folders = reward_folders(recipe, run)
    rewards = () if recipe.ppo.retokenize else reward_adapters(len(folders))
    start = start_folder(recipe, run, "ppo")
    others = recipe.inside.others
    between = {BETWEEN: times_of(1 + len(others))} if others else {}
    shapes = shapes_of(rewards, folders) if rewards else {}
    backbone = Backbone(
        load_in_float32(recipe.model),  # the effect of one neuron is less than a half type's rounding
        recipe.lora,
        adapters=["policy", *((START,) if start else ()), *between, *rewards],
        heads=rewards,
        **shapes | {"ranks": shapes.get("ranks", {}) | between},
    )
    backbone.load_adapter("policy", run.parent("ppo") / "policy")
    if start:
        backbone.load_adapter(START, start)
    if rewards:
        check_rewards(recipe, dialogue, folders)
    for role, folder in zip(rewards, folders, strict=False):
        run.say(f"inside: {load_scorer(backbone, role, folder)}")
    backbone.check_architecture()
    backbone.to(best_device())
    score = None
    if folders:
        members = model_scores(recipe, folders, backbone, dialogue)
        score = EnsembleScore(members, recipe.ppo.ensemble, recipe.ppo.ensemble_penalty)
    return Inspection(recipe, backbone, dialogue, held_out_prompts(run, recipe.inside.prompts), score)
