"""What every stage does around its work: find its parents, refuse a changed recipe, resume, skip, finish.

A stage script reads as: ``run = open_stage(...)``; if it is None the stage is done; otherwise do the work
and ``run.finish(results)``. No torch here, so that a mistake is told in under a second.
"""

from __future__ import annotations

import contextvars
import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

import yaml

from rlhf import NAME, __version__
from rlhf.data.readers.files import LINE_LIMIT
from rlhf.errors import LESS_MEMORY, UserError
from rlhf.recipe.load import Recipe, dump, files_of
from rlhf.recipe.stored import modernized
from rlhf.runs import artifacts
from rlhf.runs.artifacts import MANIFEST
from rlhf.runs.dtype import settled
from rlhf.runs.folder import StageFolder
from rlhf.runs.lock import locked, unshared, wait_for_first
from rlhf.runs.processes import SHARED, check_alone, processes, rank
from rlhf.runs.whole import READ, check_place, check_whole, manifest_of

RUNS = Path("runs")
ROAD = ("comparisons", "sft", "distill", "pmp", "reward", "ppo", "card", "evaluate", "tax")
"""The stages of `make rlhf`, in order; a recipe has those whose section is not null."""
ROAD_VARIABLE = "WHOLE_ROAD"  # of the environment, by which `make rlhf` says that all stages run
CONTRACT = ("seed", "model", "lora", "dialogue", "data")  # what all stages share
_ROWS = {  # what says how much a stage has in memory at once; the result stays the same, up to rounding
    **{name: (f"{name}.tokens_per_micro_batch",) for name in ("sft", "distill", "pmp", "reward", "dpo")},
    "ppo": ("ppo.micro_batch_size", "ppo.rollout_batch_size"),
}
_CHANGEABLE = {  # may change between two starts of an unfinished stage, because the result stays the same
    *(key for keys in _ROWS.values() for key in keys),
    "data.max_line_megabytes",
    "model.gradient_checkpointing",
    "ppo.checkpoint_every",
    "ppo.score_timeout_minutes",
    "reward.checkpoint_every",
    "pmp.checkpoint_every",
    "sft.checkpoint_every",
    "dpo.checkpoint_every",
    "distill.checkpoint_every",
    "tax.cache",
    *(
        f"{place}.judge.{name}"  # of a server, which may move
        for place in ("ppo.rewards", "evaluate", "collect")
        for name in ("url", "tries", "timeout_seconds", "concurrency", "key_variable", "remote", "cache")
    ),
}
FORMAT = 2  # of the checkpoints and other unfinished work in a folder; raised when they change
_VERSIONED = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "datasets")
PROGRESS = "progress.json"  # how far the main work of a stage is
OPEN: contextvars.ContextVar[Path | None] = contextvars.ContextVar("OPEN", default=None)
"""Folder of the stage that this process is in."""
# a folder that holds nothing else was begun, and stopped before any work was done
_OPENING = (".lock", "recipe.yaml", "fingerprint.json", "metrics.jsonl", PROGRESS, "tensorboard", "wandb")
# not results
_WORKING = ("checkpoints", "parts", ".lock", "clock.json", "tensorboard", "wandb", "metrics.jsonl")


@dataclasses.dataclass(kw_only=True)
class StageRun(StageFolder):
    """An open stage: its folder, locked, and what its manifest will say."""

    recipe: Recipe
    """The resolved one, whose `model.dtype` is a type."""
    fingerprint: dict[str, Any]
    parents: dict[str, str]
    lock: TextIO | None

    def finish(self, results: dict[str, Any]) -> None:
        """Write the manifest, which makes the stage complete, and drop its checkpoints.

        Args:
            results: figures that later stages and the summary read.
        """
        if not self.is_main:
            return
        extra = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "parents": self.parents,
            "results": results,
            **self.clock(),
            "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
            "git_commit": _git_commit(),
        }
        OPEN.set(None)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        artifacts.write_manifest(self.folder, extra, _WORKING)
        _drop_work(self.folder)


def _git_commit() -> str | None:
    command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def input_hashes(specs: Sequence[str]) -> dict[str, str]:
    """Content hash of every file that the specs name; a hub id stands for itself.

    A file goes by its name without the folder, so that data may move; a second one of that name by its path.
    """
    hashes: dict[str, str] = {}
    for spec in specs:
        if spec.startswith("hub:") or spec == "sampled":
            hashes[spec] = "by name"
        for path in files_of(spec):
            if path.encode("utf-8", "replace").decode() != path:
                raise UserError(f"the name of the file {path!a} is not UTF-8: rename it")
            if os.path.isfile(path):
                name = os.path.basename(path)
                hashes[path if name in hashes else name] = artifacts.sha256_of(Path(path))
    return hashes


def open_stage(
    recipe: Recipe,
    stage: str,
    *,
    section: str | None = None,
    parents: Sequence[str] = (),
    inputs: Sequence[str] = (),
    reads: Sequence[str | Path] = (),
) -> StageRun | None:
    """Open a stage's directory, new or interrupted.

    Args:
        recipe: the whole recipe.
        stage: name of the stage, of its folder and of its make target.
        section: the recipe's section of this stage; with the shared contract it makes the fingerprint.
        parents: stages that must be complete.
        inputs: files that the stage reads, by their specs.
        reads: further folders that it reads, such as a model that the recipe names; those of the parents and
            the base model go without saying.

    Returns:
        The open stage, or None where it is complete already.

    Raises:
        UserError: a parent is missing (and which target makes it), the recipe or the data differ from those
            that the directory was made with (and in what), another process is at it, or a file that is read
            is not what a finished stage wrote.
    """
    check_alone(stage)
    recipe = settled(recipe, RUNS / recipe.name, measured=False)
    LINE_LIMIT.set(recipe.data.max_line_megabytes << 20)
    LESS_MEMORY.set(_less_memory(recipe, stage))
    folder = RUNS / recipe.name / stage
    if parents and rank() > 0 and not folder.parent.is_dir():  # rather than that a parent is missing
        raise unshared(folder.parent)
    found = {name: parent_identity(recipe, name, stage) for name in parents}
    hashes = input_hashes(inputs)
    recipe = settled(recipe, folder.parent)  # now that nothing else is wrong with what the stage reads
    resolved = recipe.model_dump(mode="json")
    keys = (*CONTRACT, *([section] if section else []))
    fingerprint = {
        "recipe": {key: resolved[key] for key in keys},
        "inputs": hashes,
        "parents": found,
    }
    is_main, finished = rank() == 0, (folder / MANIFEST).exists()
    if not finished:
        for parent in parents:
            check_whole(RUNS / recipe.name / parent, READ[parent])
        for place in (recipe.model.path, *reads, *(path for spec in inputs for path in files_of(spec))):
            check_place(place)
    lock = locked(folder) if is_main else None
    if not is_main:
        wait_for_first(folder)
    if finished:
        manifest = manifest_of(folder, ["fingerprint"])
        _refuse_changes(manifest["fingerprint"], fingerprint, folder, finished=True)
        if is_main:
            check_whole(folder)
            _drop_work(folder)  # a kill may have come between the manifest and this
            print(f"{NAME} {__version__}: {stage}: done already ({folder})", flush=True)
        return None
    if is_main:
        _start_or_resume(folder, fingerprint, recipe)
        print(f"{NAME} {__version__}: {stage}: {folder}", flush=True)
        if os.environ.get(ROAD_VARIABLE) and stage in road_of(recipe):
            print(_place_on_road(recipe, stage), flush=True)
        shared = recipe.distributed
        if (
            {shared.offload_optimizer, shared.offload_param} != {"none"}
            and stage in SHARED
            and processes() == 1
        ):
            print("warning: distributed: one process offloads nothing; use PROCS=2 or more", flush=True)
    OPEN.set(folder if is_main else None)
    return StageRun(stage, folder, is_main, recipe=recipe, fingerprint=fingerprint, parents=found, lock=lock)


def road_of(recipe: Recipe) -> list[str]:
    """The stages that `make rlhf` runs for a recipe, in order."""
    return [name for name in ROAD if getattr(recipe, name, recipe) is not None]


def _place_on_road(recipe: Recipe, stage: str) -> str:
    """Which stage of `make rlhf` this is, how long those before it took, and what is still to come."""
    road = road_of(recipe)
    done = road.index(stage)
    clocks = [artifacts.read_manifest(RUNS / recipe.name / name) or {} for name in road[:done]]
    minutes = sum(float(clock.get("seconds", 0.0)) for clock in clocks) / 60
    before = f", those before took {minutes:.1f} min" if done else ""
    left = ", ".join(road[done + 1 :]) or "the report"
    return f"stage {done + 1} of {len(road)}{before}; still to come: {left}"


def _less_memory(recipe: Recipe, stage: str) -> str:
    """How a stage gets by with less memory, and goes on."""
    rows = [key for key in _ROWS.get(stage, ()) if getattr(recipe, key.partition(".")[0]) is not None]
    ways = [f"lower {key} ({attrgetter(key)(recipe)} now)" for key in rows]
    if ways and not recipe.model.gradient_checkpointing:
        ways.append("set model.gradient_checkpointing=true")
    if not ways:
        return f"free some memory and run {stage} again"
    return f"{', or '.join(ways)}; {stage} then goes on from its last checkpoint"


def _drop_work(folder: Path) -> None:
    for name in ("checkpoints", "parts"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _start_or_resume(folder: Path, fingerprint: dict[str, Any], recipe: Recipe) -> None:
    noted = folder / "fingerprint.json"
    if noted.is_file() and _holds_work(folder):
        old = artifacts.read_json(noted)
        if old.get("format") != FORMAT:
            raise UserError(
                f"{folder} was begun by an earlier version, whose unfinished work this one cannot continue: "
                f'give the new run a name of its own (SET="name=..."), or remove {folder} to start again'
            )
        _refuse_changes(old, fingerprint, folder, finished=False)
    artifacts.write_atomically(folder / "recipe.yaml", dump(recipe))
    artifacts.write_json(noted, {"format": FORMAT, **fingerprint})


def _holds_work(folder: Path) -> bool:
    """Whether an unfinished folder has anything to lose; a mistake mended after the first look has not."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return any(file.parts[0] not in _OPENING for file in files)


def parent_identity(recipe: Recipe, parent: str, stage: str) -> str:
    """Identity of a finished stage that another one reads.

    Raises:
        UserError: it is not complete, or was made with another recipe: what makes it.
    """
    manifest = RUNS / recipe.name / parent / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{stage} needs the {parent} stage, and {manifest.parent} is not complete: "
            f"run `make {parent} RECIPE=...` with the same recipe first"
        )
    made = manifest_of(manifest.parent, ["fingerprint", "identity"])
    resolved = recipe.model_dump(mode="json")
    old = modernized(made["fingerprint"]["recipe"])
    changes = differences({key: old[key] for key in CONTRACT}, {key: resolved[key] for key in CONTRACT})
    if changes:
        raise UserError(
            f"{stage} needs the {parent} stage of the same recipe, and {manifest.parent} was made with "
            f"another one ({'; '.join(changes[:4])}): give the new run a name of its own "
            f'(SET="name=..."), and run `make {parent} RECIPE=...` for it first'
        )
    return str(made["identity"])


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Where two nested values differ, as ``key: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines: list[str] = []
        for key in [*old, *(k for k in new if k not in old)]:
            lines += differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return lines
    both = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if both and old and all(isinstance(item, dict) for item in (*old, *new)):
        return differences(dict(enumerate(old)), dict(enumerate(new)), prefix)
    key = prefix.removesuffix(".")
    return (
        [] if old == new or re.sub(r"\.\d+(?=\.)", "", key) in _CHANGEABLE else [f"{key}: {old!r} -> {new!r}"]
    )


def _refuse_changes(old: dict[str, Any], new: dict[str, Any], folder: Path, *, finished: bool) -> None:
    changes = differences(modernized(old["recipe"]), new["recipe"])
    changes += [f"data file {line}" for line in differences(old["inputs"], new["inputs"])]
    if not changes:
        changes = [f"the {line.partition(':')[0]} stage was run anew" for line in
                   differences(old["parents"], new["parents"])]  # fmt: skip
    if changes:
        state = "was finished" if finished else "was begun"
        raise UserError(
            f"{folder} {state} with another recipe or data ({'; '.join(changes[:4])}"
            f"{'; ...' if len(changes) > 4 else ''}): give the new run a name of its own "
            f'(SET="name=..."), or remove {folder} to make it anew'
        )


def recipe_of(folder: Path) -> dict[str, Any]:
    """The resolved recipe that a stage directory was made with."""
    return dict(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
