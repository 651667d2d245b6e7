"""Check every file of a run against its manifests.

``python -m rlhf.runs.verify RECIPE [section.key=value ...]`` prints one line a stage, and the base model's;
status 2 where anything is damaged or missing. It loads no torch and changes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf.errors import USER_ERROR_STATUS, UserError, exit_on_user_error
from rlhf.recipe.load import Recipe, from_command_line
from rlhf.runs.artifacts import MANIFEST, fault_of, read_manifest
from rlhf.runs.stage import RUNS
from rlhf.runs.whole import STAGES, check_whole

_OPTIONAL = ("sft", "distill", "pmp", "dpo", "tax")  # stages that a recipe has with their section


def stages_of(recipe: Recipe) -> list[str]:
    """Stages of a recipe, and those that have a folder in its run all the same."""
    run = RUNS / recipe.name
    return [s for s in STAGES if s not in _OPTIONAL or getattr(recipe, s) or (run / s / MANIFEST).exists()]


def state_of(folder: Path, run: dict[str, str]) -> tuple[bool, str]:
    """Whether a finished stage is whole, and one line on it.

    run: identities of the stages before it that are whole, by name; its own is added.
    """
    if not (folder / MANIFEST).exists():
        begun = "begun and not finished" if (folder / "fingerprint.json").is_file() else "not there"
        return False, f"missing: {folder} is {begun}: run `make {folder.name} RECIPE=...`"
    try:
        check_whole(folder)
    except UserError as error:
        return False, f"damaged: {error}"
    manifest = read_manifest(folder) or {}
    run[folder.name] = str(manifest.get("identity"))
    parents = manifest.get("parents") or {}
    anew = [name for name, made in parents.items() if run.get(name, made) != made]
    if anew:
        return False, (
            f"outdated: {folder} was made from another {anew[0]} stage; remove {folder} and run "
            f"`make {folder.name} RECIPE=...` again"
        )
    files = manifest["files"]
    size = sum((folder / name).stat().st_size for name in files)
    return True, f"whole ({len(files)} files, {size / 1e6:.1f} MB)"


def main() -> None:
    """The `verify` target."""
    recipe = from_command_line()
    good = []
    model = Path(recipe.model.path).expanduser()
    if (model / MANIFEST).exists():
        fault = fault_of(model)
        good.append(fault is None)
        print(f"model: {f'damaged: {fault}; remove {model} and run `make model`' if fault else 'whole'}")
    identities: dict[str, str] = {}
    for stage in stages_of(recipe):
        whole, line = state_of(RUNS / recipe.name / stage, identities)
        good.append(whole)
        print(f"{stage}: {line}", flush=True)
    if not all(good):
        sys.exit(USER_ERROR_STATUS)


if __name__ == "__main__":
    exit_on_user_error(main)
