"""What a run's folder holds, finished or not, damaged or not: read without refusing anything.

A file that is missing, does not match its manifest or is no JSON is left out and told; so a page can be made
of whatever there is. No torch here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from rlhf.recipe.stored import modernized
from rlhf.runs.artifacts import MANIFEST, files_of_manifest, read_manifest, sha256_of
from rlhf.runs.whole import STAGES

_ALWAYS = ("comparisons", "reward", "card", "ppo", "evaluate")  # the others a recipe has by their section
_EVALUATED = "evaluate_dpo"
_BY_FOLDER = (_EVALUATED, "inside")  # whose section, if any, does not say that they were asked for
_PAGES = {"card": "card.json", "evaluate": "summary.json", _EVALUATED: "summary.json", "tax": "tax.json",
          "inside": "inside.json"}  # fmt: skip


@dataclasses.dataclass
class Stage:
    """One stage of a run."""

    name: str
    state: str
    """``finished``, ``unfinished``, ``damaged`` or ``missing``."""
    note: str = ""
    """What is wrong, and what to do."""
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
    page: dict[str, Any] = dataclasses.field(default_factory=dict)
    """``card.json``, ``summary.json``, ``tax.json`` or ``inside.json``."""
    metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def results(self) -> dict[str, Any]:
        """The figures of its manifest."""
        found = self.manifest.get("results")
        return found if isinstance(found, dict) else {}


@dataclasses.dataclass
class Run:
    """A run's folder."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    """The resolved recipe, under the present keys; empty where no stage has left one."""
    stages: dict[str, Stage]
    responses: list[dict[str, Any]]
    """Held-out prompts with both responses: {prompt, before, after, scores}."""


def gather(folder: Path) -> Run:
    """All that a run's folder says of itself."""
    recipe = _recipe(folder)
    stages = {name: _stage(folder / name) for name in stages_of(folder)}
    return Run(folder.name, folder, recipe, stages, _responses(folder, stages))


def stages_of(folder: Path) -> list[str]:
    """Names of the stages that a run has or will have, as far as its folder tells."""
    recipe = _recipe(folder)
    return [name for name in (*STAGES, *_BY_FOLDER) if _belongs(folder, name, recipe)]


def _belongs(folder: Path, name: str, recipe: dict[str, Any]) -> bool:
    wanted = name not in _BY_FOLDER and bool(recipe.get(name))
    return name in _ALWAYS or (folder / name).is_dir() or wanted


def _recipe(folder: Path) -> dict[str, Any]:
    files = [folder / stage / "recipe.yaml" for stage in (*reversed(STAGES), _EVALUATED)]
    for file in files:
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(found, dict):
            return modernized(found)
    return {}


def _stage(folder: Path) -> Stage:
    name = folder.name
    target = f"make {'evaluate' if name == _EVALUATED else name} RECIPE=..."
    if not (folder / MANIFEST).exists():
        metrics, _ = _rows(folder / "metrics.jsonl")
        begun = (folder / "fingerprint.json").is_file()
        reached = f" at step {metrics[-1].get('step')}" if metrics else ""
        note = f"begun{reached} and not finished: the same command goes on ({target})" if begun else target
        return Stage(name, "unfinished" if begun else "missing", note, metrics=metrics)
    manifest, faults = read_manifest(folder), []
    files = files_of_manifest(folder) or {}
    if manifest is None:
        faults.append(f"{MANIFEST} is damaged")
    page: Any = {}
    if name in _PAGES:
        page, fault = _checked(folder / _PAGES[name], files.get(_PAGES[name]))
        faults += [fault] if fault else []
    metrics, lost = _rows(folder / "metrics.jsonl")
    faults += [f"{lost} lines of metrics.jsonl cannot be read"] if lost else []
    state = "damaged" if faults else "finished"
    note = f"{'; '.join(faults)}: remove {folder} and run {target}" if faults else ""
    return Stage(name, state, note, manifest or {}, page if isinstance(page, dict) else {}, metrics)


def _checked(file: Path, sha256: str | None) -> tuple[Any, str | None]:
    """A JSON file's value, and what is wrong with it; a damaged one gives nothing."""
    if not file.is_file():
        return {}, f"{file.name} is missing"
    try:
        if sha256 is not None and sha256_of(file) != sha256:
            return {}, f"{file.name} is damaged"
        return json.loads(file.read_bytes()), None
    except (OSError, ValueError, RecursionError):
        return {}, f"{file.name} is damaged"


def _rows(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many lines are none."""
    try:
        lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    except OSError:
        return [], 0
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found, len(lines) - len(found)


def _responses(folder: Path, stages: dict[str, Stage]) -> list[dict[str, Any]]:
    """What the evaluation sampled; scores as an earlier version kept them, with the few pairs it showed."""
    for name in ("evaluate", _EVALUATED):
        file = folder / name / "responses.jsonl"
        kept = (files_of_manifest(folder / name) or {}).get(file.name)
        if kept is None or not file.is_file() or sha256_of(file) != kept:
            continue
        rows, _ = _rows(file)
        shown = stages[name].page.get("samples")
        shown = [s for s in shown if isinstance(s, dict)] if isinstance(shown, list) else []
        scores = {_texts(sample): sample.get("scores") for sample in shown}
        for row in rows:
            row.setdefault("scores", scores.get(_texts(row)))
        return rows
    return []


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in ("prompt", "before", "after"))
