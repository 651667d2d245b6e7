"""What each unit does: the rounds by the stages' own command lines, in runs of their own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from policy.rounds import plan
from policy.rounds.run import open_rounds, run_rounds
from rlhf.recipe.load import Recipe, load
from rlhf.recipe.schema import Rounds
from rlhf.runs.artifacts import read_json, read_jsonl
from rlhf.runs.stage import RUNS
from studies.engine.stages import log_of, run_stage
from studies.engine.units import Settings, Unit


def compute(unit: Unit, folder: Path) -> dict[str, Any]:
    """Do a unit; returns its result."""
    with log_of(unit, folder):
        return KINDS[unit.kind](unit.settings)


def base(s: Settings) -> dict[str, Any]:
    """The base model, in place."""
    run_stage("rlhf.models.prepare", [s["recipe"], *s["overrides"]])
    return {}


def arm(s: Settings) -> dict[str, Any]:
    """All rounds of an arm; gold scores of its last policy, and how right its reward model is about it."""
    parts = (s["content"], s["arm"], s["seed"], s["rounds"], s["prompts"])
    name = "-".join([Path(s["recipe"]).stem, "online", *map(str, parts)])
    rounds = Rounds(number=s["rounds"], prompts=s["prompts"])
    given = json.dumps(rounds.model_dump())
    recipe = load(s["recipe"], [*s["overrides"], f"name={name}", f"seed={s['seed']}", f"rounds={given}"])
    with open_rounds(recipe) as file:
        rows = run_rounds(recipe, rounds, file, run_stage)
        accuracy = fresh_accuracy(recipe, file, s["rounds"], s["fresh"], s["noise"])
    done = RUNS / plan.run_name(recipe, s["rounds"]) / "evaluate"
    scores = [row["scores"]["gold"] for row in read_jsonl(done / "responses.jsonl")]
    summary = read_json(done / "summary.json")
    return {
        "rounds": [asdict(row) for row in rows],
        "gold": [after for _, after in scores],
        "gain": rows[-1].gain,
        "kl": summary["kl"],
        "length": summary["response_length"],
        "accuracy": accuracy,
        "samples": summary["samples"][:2],
    }


def fresh_accuracy(recipe: Recipe, file: Path, number: int, prompts: int, noise: float) -> dict[str, Any]:
    """Accuracy of the last reward model on pairs of the last policy's responses to held-out prompts.

    The gold judge orders them; pairs that it scores equally without noise do not count.
    """
    last = RUNS / plan.run_name(recipe, number)
    name = f"{recipe.name}-fresh"
    swapped = {"data.prompts": recipe.data.held_out_prompts, "data.held_out_prompts": recipe.data.prompts}
    given = {
        "name": name,
        **swapped,
        "data.held_out": 0.5,
        "data.limit": None,
        "collect.prompts": prompts,
        "collect.noise": noise,
        "collect.policies": [str(last / "ppo" / "policy")],
    }
    words = [str(file), *(f"{key}={json.dumps(value)}" for key, value in given.items())]
    run_stage("rlhf.collect", words)
    card = {"model": str(last / "reward" / "model"), "comparisons": plan.stored(name, "train", "held_out")}
    run_stage("reward.card", [*words, *(f"card.{key}={json.dumps(value)}" for key, value in card.items())])
    found: dict[str, Any] = read_json(RUNS / name / "card" / "card.json")["accuracy"]["overall"]
    return found


KINDS = {"base": base, "arm": arm}
