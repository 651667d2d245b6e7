"""The work of the tax stage: every arm on every task, one model in memory at a time, then the table."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from policy.alignment_tax.comparison import item_rows, verdicts
from policy.alignment_tax.judged_tasks import HeldOutScore, Toxic, hhh_by_reward_model
from policy.alignment_tax.models import Arm, LoadedArm, arm_hash, arms_of, load_arm
from policy.alignment_tax.plot import draw
from policy.alignment_tax.report import as_markdown
from policy.alignment_tax.results_cache import Parts
from policy.alignment_tax.table import Outcomes, table_of
from rlhf.errors import UserError
from rlhf.evals.model import LanguageModel
from rlhf.evals.outcome import Outcome
from rlhf.evals.registry import run_task
from rlhf.evals.tasks.toxicity import TASK as TOXICITY
from rlhf.recipe.load import Recipe
from rlhf.recipe.tax import Tax
from rlhf.runs.artifacts import write_atomically, write_json
from rlhf.runs.stage import StageRun, input_hashes
from rlhf.training.progress import progress

Items = Mapping[str, tuple[Sequence[Any], int]]
"""By task: the items that every arm does, and how many there were to draw from."""


def measure(recipe: Recipe, section: Tax, run: StageRun, items: Items) -> dict[str, Any]:
    """Do the stage's work: ``tax.json``, ``tax.md``, ``tax.png``, ``items.jsonl``, ``responses.jsonl``.

    Args:
        recipe: the whole recipe.
        section: its section `tax`.
        run: the open stage; finished pieces lie in its ``parts`` folder.
        items: what :func:`policy.alignment_tax.checks.read_items` has read.

    Returns:
        Figures for the manifest.

    Raises:
        UserError: an arm cannot be loaded, or an item does not fit in its window.
    """
    arms = arms_of(recipe, section)
    work = Work(recipe, section, run, items)
    outcomes, said = work.all(arms)
    table = table_of(recipe, section, arms, outcomes)
    if section.reward_model_hhh:
        table["reward_model_hhh"] = work.reward_model()
    table["cost"] = run.clock()
    table["plot"] = len(arms) > 1
    if table["plot"]:
        draw(table, run.folder / "tax.png")
    write_json(run.folder / "tax.json", table)
    write_atomically(run.folder / "tax.md", as_markdown(table))
    _write_lines(run, "items.jsonl", [row for by_arm in outcomes.values() for row in item_rows(by_arm)])
    if said:
        _write_lines(run, "responses.jsonl", said)
    found = {arm.name: verdicts(table["tasks"], arm.name) for arm in arms if arm.name != section.reference}
    return {"table": "tax.json", "reference": section.reference, "verdicts": found}


class Work:
    """Every arm on every task; what is done survives an interruption.

    Args:
        recipe: the whole recipe.
        section: its section `tax`.
        run: the open stage.
        items: by task, the items and how many there were.
    """

    def __init__(self, recipe: Recipe, section: Tax, run: StageRun, items: Items) -> None:
        self.recipe, self.section, self.run, self.items = recipe, section, run, items
        self.parts = Parts(Path(section.pieces).expanduser() if section.pieces else run.folder / "parts")
        self._loaded: tuple[Arm, LoadedArm, LanguageModel] | None = None
        self._files = {
            name: input_hashes(task.files) for name, task in section.tasks.items() if name in items
        }
        self.judged: list[Toxic | HeldOutScore] = []
        if TOXICITY in items:
            self.judged.append(Toxic(recipe, section, items[TOXICITY][0]))
        if section.score:
            self.judged.append(HeldOutScore(recipe, run))

    def all(self, arms: Sequence[Arm]) -> tuple[Outcomes, list[dict[str, Any]]]:
        """The outcomes, and what the arms wrote for a judge, an entry a prompt."""
        plain = [name for name in self.items if name != TOXICITY]
        outcomes: Outcomes = {name: {} for name in (*self.items, *(task.name for task in self.judged))}
        written: dict[tuple[str, str], list[list[str]]] = {}
        pieces = len(arms) * (len(plain) + 2 * len(self.judged))
        with progress("tax", total=pieces, leave=True) as bar:
            for arm in arms:
                for name in plain:
                    bar.set_postfix_str(f"{arm.name}: {name}")
                    outcomes[name][arm.name] = self._plain(arm, name)
                    bar.update()
                for task in self.judged:
                    bar.set_postfix_str(f"{arm.name}: {task.name}")
                    written[task.name, arm.name] = self._written(arm, task)
                    bar.update()
            self._forget()
            for task in self.judged:
                judge = None
                for arm in arms:
                    bar.set_postfix_str(f"{task.name}: judge")
                    responses = written[task.name, arm.name]
                    key = {**self._asked(arm, task), **task.judged_by()}
                    value = self.parts.get(f"{arm.name}--{task.name}", key)
                    if value is None:
                        judge = judge or task.judge()
                        value = self._noted(task.name, task.outcome(responses, judge)).as_dict()
                        self._keep(f"{arm.name}--{task.name}", key, value)
                    outcomes[task.name][arm.name] = Outcome.from_dict(value)
                    bar.update()
        return outcomes, _said(self.judged, written, outcomes, [arm.name for arm in arms])

    def _plain(self, arm: Arm, name: str) -> Outcome:
        """An arm on a task that needs no judge."""
        options = self._options(name)
        key = {**self._key(arm, name), "options": options}
        value = self.parts.get(f"{arm.name}--{name}", key)
        if value is None:
            items = self.items[name][0]
            with _blaming(arm, name):
                lm = self._language_model(arm)
                outcome = run_task(name, lm, items, seed=self.recipe.seed, **options)
            value = self._noted(name, outcome).as_dict()
            self._keep(f"{arm.name}--{name}", key, value)
        return Outcome.from_dict(value)

    def _written(self, arm: Arm, task: Toxic | HeldOutScore) -> list[list[str]]:
        """What an arm writes for a judge."""
        key = self._asked(arm, task)
        value = self.parts.get(f"{arm.name}--{task.name}--written", key)
        if value is None:
            with _blaming(arm, task.name):
                value = task.respond(arm, self._language_model(arm))
            self._keep(f"{arm.name}--{task.name}--written", key, value)
        return [list(row) for row in value]

    def _asked(self, arm: Arm, task: Toxic | HeldOutScore) -> dict[str, Any]:
        return {**self._key(arm, task.name), "asked": task.asked()}

    def _key(self, arm: Arm, name: str) -> dict[str, Any]:
        """Everything that decides what an arm does on a task, its options apart."""
        task = self.section.tasks.get(name)
        return {
            "arm": arm_hash(arm, self.recipe),
            "files": self._files.get(name),
            "limit": None if task is None else task.limit,
            **({"num_fewshot": task.num_fewshot} if task and task.num_fewshot is not None else {}),
            "items": len(self.items[name][0]) if name in self.items else None,
            "seed": self.recipe.seed,
        }

    def _options(self, name: str) -> dict[str, Any]:
        """Further arguments of a task."""
        if name != "humaneval":
            return {}
        humaneval = self.section.humaneval
        return {
            "allow_code": self.section.allow_generated_code,
            "samples": humaneval.samples,
            "ks": list(humaneval.pass_at),
            "temperature": humaneval.temperature,
            "top_p": humaneval.top_p,
            "max_new_tokens": humaneval.max_new_tokens,
        }

    def _language_model(self, arm: Arm) -> LanguageModel:
        """The arm in memory; another one leaves it before, and a prompt alone needs no other weights."""
        if self._loaded is not None and self._loaded[0] == arm:
            return self._loaded[2]
        same = None
        if self._loaded is not None and self._loaded[0].weights == arm.weights:
            same = self._loaded[1]
        else:
            self._forget()
        loaded = load_arm(arm, self.recipe, same=same)
        lm = LanguageModel(
            loaded.model,
            loaded.tokenizer,
            prefix_ids=loaded.prefix_ids,
            tokens_at_once=self.section.tokens_at_once,
        )
        self._loaded = (arm, loaded, lm)
        return lm

    def _forget(self) -> None:
        """Let go of the model in memory, before another one comes."""
        model = None if self._loaded is None else weakref.ref(self._loaded[1].model)
        self._loaded = None
        if model is not None and model() is not None:  # it is part of a cycle
            gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _noted(self, name: str, outcome: Outcome) -> Outcome:
        """An outcome that says how many items it was drawn from."""
        if name not in self.items or len(self.items[name][0]) == self.items[name][1]:
            return outcome
        drawn, there = len(self.items[name][0]), self.items[name][1]
        note = f"{drawn} of {there} items, drawn by seed {self.recipe.seed}"
        return replace(outcome, notes=[*outcome.notes, note])

    def _keep(self, name: str, key: dict[str, Any], value: Any) -> None:
        self.parts.put(name, key, value)
        self.run.note_clock()

    def reward_model(self) -> dict[str, Any]:
        """How the run's own reward model does on the HHH items."""
        key = {
            "parent": self.run.parents.get("reward"),
            "files": self._files["hhh"],
            "limit": self.section.tasks["hhh"].limit,
            "seed": self.recipe.seed,
        }
        value = self.parts.get("reward-model--hhh", key)
        if value is None:
            value = hhh_by_reward_model(self.recipe, self.run, self.items["hhh"][0]).as_dict()
            self._keep("reward-model--hhh", key, value)
        found = Outcome.from_dict(value)
        return {
            "metric": found.metric,
            "items": len(found.ids),
            "figures": found.mean().as_dict(),
            "groups": {group: estimate.as_dict() for group, estimate in found.by_group().items()},
        }


@contextlib.contextmanager
def _blaming(arm: Arm, task: str) -> Iterator[None]:
    """Say which arm and which task an error of the user's is about."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(f"arm {arm.name}"):
            raise
        raise UserError(f"arm {arm.name}, task {task}: {error}") from None


def _said(
    tasks: Sequence[Toxic | HeldOutScore],
    written: Mapping[tuple[str, str], list[list[str]]],
    outcomes: Outcomes,
    arms: Sequence[str],
) -> list[dict[str, Any]]:
    """What the arms wrote to each prompt, with its score."""
    rows = []
    for task in tasks:
        for index, prompt in enumerate(task.shown()):
            by_arm = {
                arm: {
                    "responses": written[task.name, arm][index],
                    "score": outcomes[task.name][arm].values["score"][index],
                }
                for arm in arms
            }
            rows.append({"task": task.name, "prompt": prompt, "arms": by_arm})
    return rows


def _write_lines(run: StageRun, name: str, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(run.folder / name, "".join(lines))
