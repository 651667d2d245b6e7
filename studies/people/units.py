"""What each unit does: the stages' own command lines, in runs of their own, which a restart goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data.comparisons import Counts, prompt_key, write_native
from rlhf.data.readers.native import read_native
from rlhf.data.split import split_by_hash
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import MANIFEST, hash_of, read_json
from rlhf.runs.dtype import settled
from rlhf.runs.stage import RUNS
from studies.engine.stages import log_of, run_stage
from studies.engine.units import Settings, Unit
from studies.people.plan import ARMS, samples

BEFORE = ("rlhf.collect", "policy.sft", "policy.distillation")  # the last two where the recipe has them
KEPT = (
    "reward",
    "reward_length_controlled",
    "judge",
    "judge_win_rate",
    "judge_length_controlled",
    "response_length",
    "kl",
    "best_of_n",
    "samples",
)


def run_name(s: Settings, what: str) -> str:
    """Name of a run of the study; another recipe has other runs."""
    return f"{Path(s['recipe']).stem}-people-{s['content']}-{what}"


def recipe_of(s: Settings, *more: str) -> Recipe:
    """The recipe of a unit with further overrides."""
    return load(Path(s["recipe"]), [*s["overrides"], *more])


def compute(unit: Unit, folder: Path) -> dict[str, Any]:
    """Do a unit; returns its result."""
    with log_of(unit, folder):
        return KINDS[unit.kind](unit.settings)


def stages(s: Settings, modules: Sequence[str], overrides: Sequence[str]) -> None:
    """Run the command lines of stages, in order; what is done is skipped by them.

    Raises:
        UserError: one of them ended with an error; its line is in the unit's log.
    """
    for module in modules:
        run_stage(module, [s["recipe"], *s["overrides"], *overrides])


def half_file(s: Settings, half: str) -> Path:
    """Where the comparisons of a half stand."""
    return RUNS / run_name(s, "all") / f"{half}_half.jsonl"


def halves(s: Settings) -> dict[str, Any]:
    """The training comparisons in two halves; no group (a debate), and else no prompt, is in both."""
    name = run_name(s, "all")
    stages(s, ("rlhf.models.prepare", "rlhf.collect"), [f"name={name}"])
    found = list(read_native(RUNS / name / "comparisons" / "train.jsonl", "stop", Counts()))
    test, train = split_by_hash(found, lambda c: c.group or prompt_key(c.prompt), 0.5, "people")
    for half, part in (("train", train), ("test", test)):
        write_native(half_file(s, half), part)
    return {"train": len(train), "test": len(test)}


def of_half(s: Settings, half: str) -> list[str]:
    """Overrides with which a run reads a half, as it stands there, and the study's held-out prompts."""
    data, prompts = recipe_of(s).data, RUNS / run_name(s, "all") / "comparisons" / "held_out_prompts.jsonl"
    undone = [f"data.{key}=null" for key in ("limit", "rankings") if getattr(data, key, None)]
    undone += ["data.columns={}"] if getattr(data, "columns", None) else []
    return [f"data.comparisons={half_file(s, half)}", f"data.held_out_prompts={prompts}", *undone]


def reward(s: Settings) -> dict[str, Any]:
    """A reward model on a half; its accuracy on what its run holds out of that half."""
    name = run_name(s, s["half"])
    stages(s, (*BEFORE, "reward.pretraining", "reward.training"), [f"name={name}", *of_half(s, s["half"])])
    results = read_json(RUNS / name / "reward" / MANIFEST)["results"]
    return {"held_out_accuracy": results["held_out_accuracy"]}


def policy(s: Settings) -> dict[str, Any]:
    """One policy against the reward model of the training half, and what both reward models say of it."""
    arm, given = s["arm"], ()
    if arm not in ARMS:  # a variant
        arm, given = "ppo", s["arm"].split()
    name = run_name(s, f"{arm}{hash_of(given)[:8] if given else ''}-{s['seed']}")
    train, test = (str(RUNS / run_name(s, half) / "reward" / "model") for half in ("train", "test"))
    own = [f"name={name}", f"seed={s['seed']}", *of_half(s, "train"), f"ppo.reward_model={train}", *given]
    own += ["ppo.retokenize=true"] if recipe_of(s).ppo.retokenize else []
    if arm == "rloo":
        own += [f"ppo.samples_per_prompt={samples(recipe_of(s))}", "ppo.algorithm=rloo"]
        own += ["ppo.value=adapter", "ppo.value_warmup=0"]
    if arm == "dpo" and recipe_of(s).dpo is None:
        own.append("dpo.beta=0.1")
    stages(s, BEFORE, own)
    where = arm
    if arm in ("ppo", "rloo", "dpo"):
        where = "dpo" if arm == "dpo" else "ppo"
        stages(s, (f"policy.{where}",), own)
    else:
        from studies.people.trl_arms import train as train_with_trl

        recipe = settled(recipe_of(s, *own), RUNS / name)
        where = str(train_with_trl(recipe, arm, Path(train), RUNS / name))
    judged = ["evaluate.judge=reward", f"evaluate.reward_model={test}", f"evaluate.policy={where}"]
    if arm == "ppo":
        judged.append(f"evaluate.best_of={s['best_of']}")
    stages(s, ("policy.evaluate",), [*own, *judged])
    done = RUNS / name / ("evaluate_dpo" if arm == "dpo" else "evaluate") / "summary.json"
    summary = json.loads(done.read_text(encoding="utf-8"))
    file = RUNS / name / where / MANIFEST
    seconds = {"train_seconds": read_json(file)["seconds"]} if file.is_file() else {}  # trl's arms tell none
    return {key: summary[key] for key in KEPT if key in summary} | seconds


KINDS = {"halves": halves, "reward": reward, "policy": policy}
