"""The evaluations by name: what reads their files, what runs them, how many items by default.

Light: a task's module is imported when it is used, so that a wrong name is told before torch is loaded.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.errors import UserError
from rlhf.evals.tasks import stock
from rlhf.evals.tasks.inverse_scaling import FORMATS, FORMER

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel
    from rlhf.evals.outcome import Outcome

T = TypeVar("T")


@dataclass(frozen=True)
class TaskSpec:
    """One evaluation."""

    module: str
    """Where its ``read`` and ``run`` are."""
    limit: int | None
    """Items by default; None = all of the published set, which is small."""
    needs: frozenset[str] = frozenset()
    """What it needs beside a language model that scores: ``generation`` (it writes, so it takes a seed),
    ``judge``, ``sandbox``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``read`` and ``run``."""

    def read(self, files: Sequence[str], *, key: str) -> list[Any]:
        """The items of the files; raises UserError where they cannot be used."""
        items: list[Any] = importlib.import_module(self.module).read(files, key=key, **self.options)
        return items

    def run(self, lm: LanguageModel, items: Sequence[Any], *, seed: int = 0, **options: Any) -> Outcome:
        """What a model does on the items.

        seed: of what it writes, where it writes. options: further arguments of the task's own ``run``.
        """
        if "generation" in self.needs:
            options["seed"] = seed
        outcome: Outcome = importlib.import_module(self.module).run(lm, items, **self.options, **options)
        return outcome


TASKS: dict[str, TaskSpec] = {
    "hhh": TaskSpec("rlhf.evals.tasks.hhh", None),
    "truthfulqa": TaskSpec("rlhf.evals.tasks.truthfulqa", 200),
    "lambada": TaskSpec("rlhf.evals.tasks.lambada", 500),
    "lm_loss": TaskSpec("rlhf.evals.tasks.lm_loss", 100),
    **{name: TaskSpec("rlhf.evals.tasks.inverse_scaling", 200, options={"task": name}) for name in FORMATS},
    "humaneval": TaskSpec("rlhf.evals.tasks.humaneval", 20, frozenset({"generation", "sandbox"})),
    "toxicity": TaskSpec("rlhf.evals.tasks.toxicity", 100, frozenset({"generation", "judge"})),
}
"""All evaluations by name."""


def canonical(name: str) -> str:
    """The name under which a task is known: prize tasks also go by their names of the first round, and with
    underscores for hyphens.

    Raises:
        UserError: there is no such task.
    """
    if name in TASKS:
        return name
    family, slash, task = name.partition("/")
    task = task.lower().replace("_", "-")
    found = f"{family}{slash}{FORMER.get(task, task)}"
    if found in TASKS:
        return found
    stock.check_name(name, list(TASKS))
    return name


def task_spec(name: str, num_fewshot: int | None = None) -> TaskSpec | stock.StockTask:
    """A task of this project, or any other of lm-eval's own; num_fewshot: examples, for lm-eval's.

    Raises:
        UserError: there is no such task, or it takes no examples.
    """
    known = canonical(name)
    if known not in TASKS:
        return stock.StockTask(known, num_fewshot)
    if num_fewshot is not None:
        raise UserError(f"tax.tasks.{name}.num_fewshot: {name} takes no examples; remove it")
    return TASKS[known]


def draw(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most ``limit`` items, drawn by the seed alone, in their order; None = all."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = random.Random(f"evaluate {seed}").sample(range(len(items)), limit)
    return [items[index] for index in sorted(chosen)]


def read_task(
    name: str,
    files: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    num_fewshot: int | None = None,
) -> tuple[list[Any], int]:
    """The items of a task, the same for the same arguments, and how many there were to draw them from.

    name: of the task. limit: number of items; None = the task's default. num_fewshot: of :func:`task_spec`.

    Raises:
        UserError: an unknown task, or files that cannot be used.
    """
    spec = task_spec(name, num_fewshot)
    items = spec.read(files, key=f"tax.tasks.{name}.files")
    return draw(items, spec.limit if limit is None else limit, seed), len(items)


def run_task(name: str, lm: LanguageModel, items: Sequence[Any], *, seed: int = 0, **options: Any) -> Outcome:
    """What a model does on the items of a task; options: further arguments of the task's own ``run``."""
    return task_spec(name).run(lm, items, seed=seed, **options)


def with_draw(outcome: Outcome, there: int, seed: int) -> Outcome:
    """An outcome that says of how many items its own were drawn."""
    if len(outcome.ids) == there:
        return outcome
    note = f"{len(outcome.ids)} of {there} items, drawn by seed {seed}"
    return replace(outcome, notes=[*outcome.notes, note])


def evaluate_task(
    name: str,
    files: Sequence[str],
    lm: LanguageModel,
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Outcome:
    """Read, draw and run; a note says how many of how many items there were.

    limit: number of items, drawn by the seed, the same for every model; None = the task's default.
    options: further arguments of the task's own ``run``, such as the judge of ``toxicity``.

    Raises:
        UserError: an unknown task, files that cannot be used, or an item too long for the model's window.
    """
    items, there = read_task(name, files, limit=limit, seed=seed)
    return with_draw(run_task(name, lm, items, seed=seed, **options), there, seed)
