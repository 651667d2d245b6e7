"""The work of the tax stage: every variant on every task, one model in memory at a time, then the table."""

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
from policy.alignment_tax.judged_tasks import HeldOutScore, ToxicityTask, hhh_by_reward_model
from policy.alignment_tax.models import LoadedVariant, ModelVariant, load_variant, variant_hash, variants_of
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
"""By task: the items that every variant does, and how many there were to draw from."""


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
        UserError: a variant cannot be loaded, or an item does not fit in its window.
    """
    variants = variants_of(recipe, section)
    work = TaxRun(recipe, section, run, items)
    outcomes, said = work.all(variants)
    table = table_of(recipe, section, variants, outcomes)
    if section.reward_model_hhh:
        table["reward_model_hhh"] = work.reward_model()
    table["cost"] = run.clock()
    table["plot"] = len(variants) > 1
    if table["plot"]:
        draw(table, run.folder / "tax.png")
    write_json(run.folder / "tax.json", table)
    write_atomically(run.folder / "tax.md", as_markdown(table))
    _write_lines(
        run, "items.jsonl", [row for by_variant in outcomes.values() for row in item_rows(by_variant)]
    )
    if said:
        _write_lines(run, "responses.jsonl", said)
    found = {
        variant.name: verdicts(table["tasks"], variant.name)
        for variant in variants
        if variant.name != section.reference
    }
    return {"table": "tax.json", "reference": section.reference, "verdicts": found}


class TaxRun:
    """Every variant on every task; what is done survives an interruption.

    Args:
        recipe: the whole recipe.
        section: its section `tax`.
        run: the open stage.
        items: by task, the items and how many there were.
    """

    def __init__(self, recipe: Recipe, section: Tax, run: StageRun, items: Items) -> None:
        self.recipe, self.section, self.run, self.items = recipe, section, run, items
        self.parts = Parts(Path(section.cache).expanduser() if section.cache else run.folder / "parts")
        self._loaded: tuple[ModelVariant, LoadedVariant, LanguageModel] | None = None
        self._files = {
            name: input_hashes(task.files) for name, task in section.tasks.items() if name in items
        }
        self.judged: list[ToxicityTask | HeldOutScore] = []
        if TOXICITY in items:
            self.judged.append(ToxicityTask(recipe, section, items[TOXICITY][0]))
        if section.score:
            self.judged.append(HeldOutScore(recipe, run))

    def all(self, variants: Sequence[ModelVariant]) -> tuple[Outcomes, list[dict[str, Any]]]:
        """The outcomes, and what the variants wrote for a judge, an entry a prompt."""
        plain = [name for name in self.items if name != TOXICITY]
        outcomes: Outcomes = {name: {} for name in (*self.items, *(task.name for task in self.judged))}
        written: dict[tuple[str, str], list[list[str]]] = {}
        pieces = len(variants) * (len(plain) + 2 * len(self.judged))
        with progress("tax", total=pieces, leave=True) as bar:
            for variant in variants:
                for name in plain:
                    bar.set_postfix_str(f"{variant.name}: {name}")
                    outcomes[name][variant.name] = self._plain(variant, name)
                    bar.update()
                for task in self.judged:
                    bar.set_postfix_str(f"{variant.name}: {task.name}")
                    written[task.name, variant.name] = self._written(variant, task)
                    bar.update()
            self._forget()
            for task in self.judged:
                judge = None
                for variant in variants:
                    bar.set_postfix_str(f"{task.name}: judge")
                    responses = written[task.name, variant.name]
                    key = {**self._asked(variant, task), **task.judged_by()}
                    value = self.parts.get(f"{variant.name}--{task.name}", key)
                    if value is None:
                        judge = judge or task.judge()
                        value = self._noted(task.name, task.outcome(responses, judge)).as_dict()
                        self._keep(f"{variant.name}--{task.name}", key, value)
                    outcomes[task.name][variant.name] = Outcome.from_dict(value)
                    bar.update()
        return outcomes, _said(self.judged, written, outcomes, [variant.name for variant in variants])

    def _plain(self, variant: ModelVariant, name: str) -> Outcome:
        """A variant on a task that needs no judge."""
        options = self._options(name)
        key = {**self._key(variant, name), "options": options}
        value = self.parts.get(f"{variant.name}--{name}", key)
        if value is None:
            items = self.items[name][0]
            with _blaming(variant, name):
                lm = self._language_model(variant)
                outcome = run_task(name, lm, items, seed=self.recipe.seed, **options)
            value = self._noted(name, outcome).as_dict()
            self._keep(f"{variant.name}--{name}", key, value)
        return Outcome.from_dict(value)

    def _written(self, variant: ModelVariant, task: ToxicityTask | HeldOutScore) -> list[list[str]]:
        """What a variant writes for a judge."""
        key = self._asked(variant, task)
        value = self.parts.get(f"{variant.name}--{task.name}--written", key)
        if value is None:
            with _blaming(variant, task.name):
                value = task.respond(variant, self._language_model(variant))
            self._keep(f"{variant.name}--{task.name}--written", key, value)
        return [list(row) for row in value]

    def _asked(self, variant: ModelVariant, task: ToxicityTask | HeldOutScore) -> dict[str, Any]:
        return {**self._key(variant, task.name), "asked": task.asked()}

    def _key(self, variant: ModelVariant, name: str) -> dict[str, Any]:
        """What a variant's result on a task depends on, options apart; keys as in earlier caches."""
        task = self.section.tasks.get(name)
        return {
            "arm": variant_hash(variant, self.recipe),
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
            "samples": humaneval.samples_per_prompt,
            "ks": list(humaneval.pass_at),
            "temperature": humaneval.temperature,
            "top_p": humaneval.top_p,
            "max_new_tokens": humaneval.max_new_tokens,
        }

    def _language_model(self, variant: ModelVariant) -> LanguageModel:
        """The variant in memory; another one leaves it before, and a prompt alone needs no other weights."""
        if self._loaded is not None and self._loaded[0] == variant:
            return self._loaded[2]
        same = None
        if self._loaded is not None and self._loaded[0].weights == variant.weights:
            same = self._loaded[1]
        else:
            self._forget()
        loaded = load_variant(variant, self.recipe, same=same)
        lm = LanguageModel(
            loaded.model,
            loaded.tokenizer,
            prefix_ids=loaded.prefix_ids,
            tokens_at_once=self.section.tokens_per_batch,
        )
        self._loaded = (variant, loaded, lm)
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
def _blaming(variant: ModelVariant, task: str) -> Iterator[None]:
    """Say which variant and which task an error of the user's is about."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(f"variant {variant.name}"):
            raise
        raise UserError(f"variant {variant.name}, task {task}: {error}") from None


def _said(
    tasks: Sequence[ToxicityTask | HeldOutScore],
    written: Mapping[tuple[str, str], list[list[str]]],
    outcomes: Outcomes,
    variants: Sequence[str],
) -> list[dict[str, Any]]:
    """What the variants wrote to each prompt, with its score."""
    rows = []
    for task in tasks:
        for index, prompt in enumerate(task.shown()):
            by_variant = {
                variant: {
                    "responses": written[task.name, variant][index],
                    "score": outcomes[task.name][variant].values["score"][index],
                }
                for variant in variants
            }
            rows.append({"task": task.name, "prompt": prompt, "variants": by_variant})
    return rows


def _write_lines(run: StageRun, name: str, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(run.folder / name, "".join(lines))
