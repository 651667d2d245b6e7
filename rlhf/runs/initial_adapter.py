"""Where a stage that trains an adapter starts from: nothing, a folder, or another stage of the same run.

``ppo.start``, ``dpo.start``, ``pmp.start``, ``reward.start`` and ``distill.start`` are null, a folder with a
saved adapter, or the name of a stage, ``sft`` or ``distill``. A stage is a parent, so its successor is
refused as changed when it was run anew; a folder is an input by its content. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import STARTS
from rlhf.recipe.types import BASE
from rlhf.runs.artifacts import SETTINGS, WEIGHTS, read_json, read_manifest
from rlhf.runs.folder import StageFolder
from rlhf.runs.stage import RUNS, StageRun, differences, input_hashes
from rlhf.runs.whole import check_place, manifest_of

ADAPTER = "policy"  # what a stage that can be a start leaves, below its folder


def _named(recipe: Recipe, name: str) -> str | None:
    section: Any = getattr(recipe, name)
    return None if section is None else section.start


def start_folder(recipe: Recipe, run: StageFolder | str, section: str) -> Path | None:
    """Folder of the adapter that a section of the recipe starts from, None for a fresh one.

    Args:
        recipe: the whole recipe.
        run: the folder of a stage of the run, or the run's name.
        section: ``ppo``, ``dpo``, ``pmp``, ``reward``, ``distill`` or ``sft``.
    """
    named = _named(recipe, section)
    if named is None or not start_parents(recipe, section):
        return None if named is None else Path(named)
    stage = run.parent(named) if isinstance(run, StageFolder) else RUNS / run / named
    return stage / ADAPTER


def start_parents(recipe: Recipe, section: str) -> tuple[str, ...]:
    """The stage that a section starts from, as a further parent; none for a folder or a fresh adapter."""
    named = _named(recipe, section)
    return (named,) if named in STARTS.get(section, ()) else ()


def start_files(recipe: Recipe, section: str) -> list[str]:
    """The weights of a start that is a folder, as a further input; none for a stage.

    Raises:
        UserError: they are not what a finished stage wrote there.
    """
    folder = start_folder(recipe, recipe.name, section)
    if folder is None or start_parents(recipe, section):
        return []
    check_place(folder)
    return [str(folder / WEIGHTS)]


def start_inputs(recipe: Recipe, section: str) -> list[str]:
    """The same for a start that must be an adapter and nothing more, and is seen to be one.

    Raises:
        UserError: there is no adapter in that folder, or one that was made with other lora settings, of which
            the tensors alone do not tell the scale.
    """
    files = start_files(recipe, section)
    for file in map(Path, files):
        adapter_files(file.parent, recipe, f"{section}.start", STARTS.get(section, ()))
    return files


def adapter_files(folder: Path, recipe: Recipe, key: str, stages: Sequence[str] = ()) -> list[str]:
    """The weights of an adapter that a recipe names, as an input; it is there and has the recipe's settings.

    key: the recipe's key that names it. stages: what that may name instead.

    Raises:
        UserError: as :func:`start_inputs`.
    """
    file = folder / WEIGHTS
    for needed in (file, file.with_name(SETTINGS)):
        if not needed.is_file():
            words = " or ".join(stages)
            raise UserError(
                f"{key}: {needed} is not there; name the folder of a saved adapter"
                + (f", or {words} for that stage of this run" if words else "")
            )
    settings = read_json(file.with_name(SETTINGS))
    for name, ours, mine in (("r", "rank", recipe.lora.rank), ("lora_alpha", "alpha", recipe.lora.alpha)):
        if settings.get(name) != mine:
            raise UserError(
                f"{key}: {file} does not fit this recipe (lora.{ours} {settings.get(name)} "
                f"there, {mine} here): it was made with other lora settings"
            )
    return [str(file)]


def policy_files(recipe: Recipe, policies: Sequence[str], key: str) -> list[str]:
    """The weights of the policies that a recipe names, as inputs; `base` has none.

    Raises:
        UserError: as :func:`adapter_files`, or one was made on another base.
    """
    files = []
    for folder in (Path(policy) for policy in policies if policy != BASE):
        files += adapter_files(folder, recipe, key)
        check_place(folder)
        base = read_json(folder / SETTINGS).get("base_model_name_or_path")
        if base and not _same_base(str(base), recipe.model.path):
            raise UserError(
                f"{key}: {folder} was made on the base {base}, and model.path is {recipe.model.path}"
            )
    return files


def _same_base(*places: str) -> bool:
    """Whether two folders or hub ids are one base: by their manifests' identity, or by their last names, or
    those of what they were made from, where one has no manifest."""
    one, other = (read_manifest(Path(place)) or {} for place in places)
    if one and other:
        return bool(one["identity"] == other["identity"])
    names = [
        {Path(str(name)).name.casefold() for name in (place, noted.get("source", place))}
        for place, noted in zip(places, (one, other), strict=True)
    ]
    return not names[0].isdisjoint(names[1])


def check_same_start(recipe: Recipe, run: StageRun, stage: str) -> None:
    """What was trained from an adapter is compared with that adapter, not with what has taken its place.

    Args:
        recipe: the whole recipe.
        run: the open stage that compares.
        stage: the finished stage that was trained, called as its section.

    Raises:
        UserError: the start is another one now, or damaged, and what to do.
    """
    made = manifest_of(run.parent(stage), ["fingerprint"])["fingerprint"]
    changes = differences(made["recipe"][stage].get("start"), _named(recipe, stage), f"{stage}.start.")
    if not changes:
        for parent in start_parents(recipe, stage):
            if manifest_of(run.parent(parent), ["identity"])["identity"] != made["parents"].get(parent):
                changes.append(f"the {parent} stage was run anew")
            check_place(run.parent(parent))
        now = input_hashes(start_inputs(recipe, stage))
        changes += [f"{name} was changed" for name in now if now[name] not in made["inputs"].values()]
    if changes:
        raise UserError(
            f"{run.parent(stage)} was trained from another start ({changes[0]}): give the new run a name of "
            f'its own (SET="name=..."), or remove {run.parent(stage)} to make it anew'
        )
