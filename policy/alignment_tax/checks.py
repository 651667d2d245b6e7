"""What the tax stage needs: variants, stages, files and items, checked before anything is loaded.

No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policy.alignment_tax.models import PICKLED, base_of, check_models, variant_names, variant_stages
from rlhf.collect.judges import JUDGES
from rlhf.errors import UserError
from rlhf.evals.registry import TASKS, canonical, read_task
from rlhf.recipe.load import Recipe, is_path
from rlhf.recipe.tax import Tax
from rlhf.recipe.types import function_files
from rlhf.runs.artifacts import SETTINGS, model_files
from rlhf.runs.initial_adapter import start_inputs


def check(recipe: Recipe, section: Tax, *, planned: bool = False) -> list[str]:
    """Refuse a section that cannot work, before anything is loaded; returns the names of the variants.

    planned: no stage has to have finished; the variants are those that the recipe's stages will make.

    Raises:
        UserError: a model, a task, a file or the reference is not there.
    """
    check_models(section)
    names = variant_names(recipe, section, planned=planned)
    if section.reference not in names:
        raise UserError(
            f"tax.reference: {section.reference!r} is not among the variants ({', '.join(names)}); "
            "name one of them, or add it"
        )
    if any(name.endswith("prompted") for name in names if name not in section.models):
        prompt = Path(recipe.hhh_prompt).expanduser()
        if not prompt.is_file():
            raise UserError(
                f"hhh_prompt: {prompt} is not there; the prompted variants need it: check the path"
            )
    known: dict[str, str] = {}
    for name in section.tasks:
        try:
            same = known.setdefault(canonical(name), name)
        except UserError as error:
            raise UserError(f"tax.tasks: {error}") from None
        if canonical(name) in TASKS and not section.tasks[name].files:
            raise UserError(f"tax.tasks.{name}.files names no file: give a path, a glob or hub:NAME")
        if same != name:
            raise UserError(f"tax.tasks: {name} and {same} are one task; give its files once")
    judge = section.toxicity.judge
    if judge not in JUDGES and is_path(judge) and not Path(judge).expanduser().is_dir():
        raise UserError(
            f"tax.toxicity.judge: {judge} is not a folder; name a reward model's folder, a hub id, or a "
            f"judge of texts ({', '.join(JUDGES)})"
        )
    evaluate, ppo = recipe.evaluate, recipe.ppo
    by_model = evaluate.reward_model or ppo.own_reward or ppo.named_models
    if section.score and evaluate.judge == "reward" and not by_model:
        raise UserError(
            "tax.score: evaluate.judge=reward, and ppo.rewards has no reward model; name a judge in "
            "evaluate.judge, or set tax.score=false"
        )
    if "humaneval" in section.tasks:
        from rlhf.evals.sandbox import run as sandbox

        sandbox.require()
    return names


def read_items(recipe: Recipe, section: Tax) -> dict[str, tuple[list[Any], int]]:
    """By task: the items that every variant does, drawn by the recipe's seed, and how many there were.

    Raises:
        UserError: a file cannot be used (file and line).
    """
    return {
        name: read_task(name, task.files, limit=task.limit, seed=recipe.seed, num_fewshot=task.num_fewshot)
        for name, task in section.tasks.items()
    }


def parents_of(recipe: Recipe, section: Tax, names: Sequence[str]) -> list[str]:
    """Stages of the run that must have finished."""
    parents = variant_stages(names)
    if section.score:
        parents.append("comparisons")
    evaluate = recipe.evaluate
    by_run = evaluate.judge == "reward" and not evaluate.reward_model and recipe.ppo.own_reward
    if section.reward_model_hhh or (section.score and by_run):
        parents.append("reward")
    return parents


def reads_of(recipe: Recipe, section: Tax) -> list[str]:
    """Folders or hub ids of the models that judge, beside the run's own."""
    places = []
    if "toxicity" in section.tasks and section.toxicity.judge not in JUDGES:
        places.append(section.toxicity.judge)
    if section.score and recipe.evaluate.judge == "reward":
        places += [recipe.evaluate.reward_model] if recipe.evaluate.reward_model else recipe.ppo.named_models
    return places


def inputs_of(recipe: Recipe, section: Tax, names: Sequence[str]) -> list[str]:
    """Files that the stage reads, by their specs; what the parents made is known by their manifests."""
    specs = [spec for task in section.tasks.values() for spec in task.files]
    places: list[str] = []
    for place in section.models.values():
        adapter = (Path(place).expanduser() / SETTINGS).is_file()
        places += [place, base_of(place, recipe)] if adapter else [place]
    if any(name not in section.models for name in names):
        places.append(recipe.model.path)
    places += reads_of(recipe, section)
    specs += function_files(recipe.evaluate.judge) if section.score else []
    specs += [str(file) for place in places for file in model_files(place, PICKLED)]
    if any(name.endswith("prompted") for name in names if name not in section.models):
        specs.append(recipe.hhh_prompt)
    if "policy" in names and section.interpolate:
        specs += start_inputs(recipe, "ppo")
    return list(dict.fromkeys(specs))
