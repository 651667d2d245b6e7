"""The work of the tax stage: every variant on every task, one model in memory at a time, then the table."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from policy.alignment_tax.judged_tasks import HeldOutScore, JudgedTask, Responses, ToxicityTask, reward_judge
from policy.alignment_tax.models import ModelVariant, load_variant, variant_hash, variants_of
from policy.alignment_tax.plot import draw
from policy.alignment_tax.report import as_markdown
from policy.alignment_tax.table import Figures, Outcomes, item_rows, table_of, verdicts
from reward.model.ensemble import own_folders
from rlhf import NAME, __version__
from rlhf.collect.judges import Judge
from rlhf.errors import UserError
from rlhf.evals.model import LanguageModel
from rlhf.evals.outcome import Outcome
from rlhf.evals.registry import run_task, with_draw
from rlhf.evals.tasks.hhh import hhh_by_scores
from rlhf.evals.tasks.toxicity import TASK as TOXICITY
from rlhf.recipe.load import Recipe
from rlhf.recipe.tax import Tax
from rlhf.runs.artifacts import write_atomically, write_json, write_jsonl
from rlhf.runs.processes import processes, rank
from rlhf.runs.stage import StageRun, input_hashes
from rlhf.training.progress import progress
from rlhf.training.shares import join, leave

Items = Mapping[str, tuple[Sequence[Any], int]]
"""By task: the items that every variant does, and how many there were to draw from."""
_MADE_WITH = ("torch", "transformers", "peft", "lm_eval")  # another release may give other figures


def measure(recipe: Recipe, section: Tax, run: StageRun, items: Items) -> dict[str, Any]:
    """Do the stage's work: ``tax.json``, ``tax.md``, ``tax.png``, ``items.jsonl``, ``responses.jsonl``.

    Args:
        recipe: the whole recipe.
        section: its section `tax`.
        run: the open stage; finished results lie in its ``parts`` folder.
        items: what :func:`policy.alignment_tax.checks.read_items` has read.

    Returns:
        Figures for the manifest.

    Raises:
        UserError: a variant cannot be loaded, or an item does not fit in its window.
    """
    variants = variants_of(recipe, section)
    work = TaxRun(recipe, section, run, items)
    join(recipe.distributed)
    outcomes, responses = work.evaluate(variants)
    table = table_of(recipe, section, variants, outcomes)
    if section.reward_model_hhh:
        table["reward_model_hhh"] = work.reward_model_hhh()
    table["cost"] = run.clock()
    table["plot"] = len(variants) > 1
    if table["plot"]:
        draw(table, run.folder / "tax.png")
    write_json(run.folder / "tax.json", table)
    write_atomically(run.folder / "tax.md", as_markdown(table))
    write_jsonl(run.folder / "items.jsonl", [row for found in outcomes.values() for row in item_rows(found)])
    if responses:
        write_jsonl(run.folder / "responses.jsonl", responses)
    others = [variant.name for variant in variants if variant.name != section.reference]
    found = {name: verdicts(table["tasks"], name) for name in others}
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
        self._made_with = {NAME: __version__, **{name: version(name) for name in _MADE_WITH}}
        self._loaded: tuple[ModelVariant, LanguageModel] | None = None
        self._files = {
            name: input_hashes(task.files) for name, task in section.tasks.items() if name in items
        }
        self.judged: list[JudgedTask] = []
        if TOXICITY in items:
            self.judged.append(ToxicityTask(recipe, section, items[TOXICITY][0]))
        if section.score:
            self.judged.append(HeldOutScore(recipe, run))

    def evaluate(self, variants: Sequence[ModelVariant]) -> tuple[Outcomes, list[Figures]]:
        """The outcomes, and the responses that a judge has scored, an entry a prompt.

        Of several processes each does its share, which lies on the disk then; all but the first end here.
        """
        if processes() > 1:
            names = [*(name for name in self.items if name != TOXICITY), *(task.name for task in self.judged)]
            mine = share([variant.name for variant in variants], names, rank(), processes())
            self._work(variants, lambda variant, name: (variant.name, name) in mine)
            leave()
        outcomes, written = self._work(variants)
        return outcomes, [
            {
                "task": task.name,
                "prompt": prompt[-1].content,
                "variants": {
                    variant.name: {
                        "responses": written[task.name, variant.name][index],
                        "score": outcomes[task.name][variant.name].values["score"][index],
                    }
                    for variant in variants
                },
            }
            for task in self.judged
            for index, prompt in enumerate(task.prompts)
        ]

    def _work(
        self,
        variants: Sequence[ModelVariant],
        mine: Callable[[ModelVariant, str], bool] = lambda variant, name: True,
    ) -> tuple[Outcomes, dict[tuple[str, str], Responses]]:
        """Outcomes by task and variant, and what was written for a judge, of what is ``mine`` alone."""
        plain = [name for name in self.items if name != TOXICITY]
        outcomes: Outcomes = {name: {} for name in (*self.items, *(task.name for task in self.judged))}
        written: dict[tuple[str, str], Responses] = {}
        with progress("tax", total=len(variants) * (len(plain) + 2 * len(self.judged)), leave=True) as bar:
            for variant in variants:
                for name in (name for name in plain if mine(variant, name)):
                    bar.set_postfix_str(f"{variant.name}: {name}")
                    outcomes[name][variant.name] = self._evaluated(variant, name)
                    bar.update()
                for task in (task for task in self.judged if mine(variant, task.name)):
                    bar.set_postfix_str(f"{variant.name}: {task.name}")
                    written[task.name, variant.name] = self._written(variant, task)
                    bar.update()
            self._unload()
            for task in self.judged:
                bar.set_postfix_str(f"{task.name}: judge")
                judge = functools.cache(task.judge)  # loaded where a score is not there yet, and once
                for variant in (variant for variant in variants if mine(variant, task.name)):
                    responses = written[task.name, variant.name]
                    outcomes[task.name][variant.name] = self._judged(variant, task, responses, judge)
                    bar.update()
        return outcomes, written

    def _evaluated(self, variant: ModelVariant, name: str) -> Outcome:
        """A variant on a task that needs no judge."""
        options = self._options(name)

        def outcome() -> dict[str, Any]:
            with _named_in_errors(variant, name):
                lm = self._language_model(variant)
                found = run_task(name, lm, self.items[name][0], seed=self.recipe.seed, **options)
            return self._noted(name, found).as_dict()

        key = {**self._key(variant, name), "options": options}
        return Outcome.from_dict(self._remember(f"{variant.name}--{name}", key, outcome))

    def _written(self, variant: ModelVariant, task: JudgedTask) -> Responses:
        """A variant's responses for a judge."""

        def responses() -> Responses:
            with _named_in_errors(variant, task.name):
                return task.respond(variant, self._language_model(variant))

        key = {**self._key(variant, task.name), "asked": task.asked()}
        found: Responses = self._remember(f"{variant.name}--{task.name}--written", key, responses)
        return found

    def _judged(
        self, variant: ModelVariant, task: JudgedTask, responses: Responses, judge: Callable[[], Judge]
    ) -> Outcome:
        """A variant's outcome by its responses."""
        key = {**self._key(variant, task.name), "asked": task.asked(), **task.judged_by()}
        found = self._remember(
            f"{variant.name}--{task.name}",
            key,
            lambda: self._noted(task.name, task.outcome(responses, judge())).as_dict(),
        )
        return Outcome.from_dict(found)

    def _remember(self, name: str, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        folder = Path(self.section.cache).expanduser() if self.section.cache else None
        return self.run.remember(name, compute, key=[key, self._made_with], folder=folder, own=True)

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
        """The variant in memory; a model with other weights leaves it before."""
        if self._loaded is None or self._loaded[0] != variant:
            same = None
            if self._loaded is not None and self._loaded[0].weights == variant.weights:
                same = self._loaded[1]
            else:
                self._unload()
            tokens = self.section.tokens_per_batch
            self._loaded = (variant, load_variant(variant, self.recipe, same=same, tokens_per_batch=tokens))
        return self._loaded[1]

    def _unload(self) -> None:
        """Let go of the model in memory, before another one comes."""
        model = None if self._loaded is None else weakref.ref(self._loaded[1].model)
        self._loaded = None
        if model is not None and model() is not None:  # it is part of a cycle
            gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _noted(self, name: str, outcome: Outcome) -> Outcome:
        """An outcome that says how many items it was drawn from."""
        there = self.items[name][1] if name in self.items else len(outcome.ids)
        return with_draw(outcome, there, self.recipe.seed)

    def reward_model_hhh(self) -> Figures:
        """Which of the two answers of each HHH item the run's own reward model prefers.

        Raises:
            UserError: the run's reward model gives no score.
        """
        key = {
            "parent": self.run.parents.get("reward"),
            "files": self._files["hhh"],
            "limit": self.section.tasks["hhh"].limit,
            "seed": self.recipe.seed,
        }

        def outcome() -> dict[str, Any]:
            judge = reward_judge(
                self.recipe, own_folders(self.run.parent("reward"), self.recipe.ppo.ensemble)
            )
            return hhh_by_scores(self.items["hhh"][0], judge).as_dict()

        found = Outcome.from_dict(self._remember("reward-model--hhh", key, outcome))
        return {
            "metric": found.metric,
            "items": len(found.ids),
            "figures": found.mean().as_dict(),
            "groups": {group: estimate.as_dict() for group, estimate in found.by_group().items()},
        }


def share(variants: Sequence[str], tasks: Sequence[str], rank: int, world: int) -> set[tuple[str, str]]:
    """The (variant, task) pairs of one process of ``world``: whole variants, so that few models are loaded.

    With more processes than variants several of them deal out a variant's tasks.
    """
    found: set[tuple[str, str]] = set()
    for number, variant in enumerate(variants):
        owners = [*range(number, world, len(variants))] or [number % world]
        found |= {(variant, task) for i, task in enumerate(tasks) if owners[i % len(owners)] == rank}
    return found


@contextlib.contextmanager
def _named_in_errors(variant: ModelVariant, task: str) -> Iterator[None]:
    """Put the variant and the task before an error of the user's."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(f"variant {variant.name}"):
            raise
        raise UserError(f"variant {variant.name}, task {task}: {error}") from None
