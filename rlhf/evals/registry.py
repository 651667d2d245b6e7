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
from rlhf.evals.tasks.inverse_scaling import FIELDS, PRIZE_TASKS

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
    reading: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``read``."""
    running: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``run``."""

    def read(self, files: Sequence[str], *, key: str) -> list[Any]:
        """The items of the files; raises UserError where they cannot be used."""
        items: list[Any] = importlib.import_module(self.module).read(files, key=key, **self.reading)
        return items

    def run(self, lm: LanguageModel, items: Sequence[Any], *, seed: int = 0, **options: Any) -> Outcome:
        """What a model does on the items.

        seed: of what it writes, where it writes. options: further arguments of the task's own ``run``.
        """
        if "generation" in self.needs:
            options["seed"] = seed
        outcome: Outcome = importlib.import_module(self.module).run(lm, items, **self.running, **options)
        return outcome


def _inverse_scaling() -> dict[str, TaskSpec]:
    formats = {task.name: task.format for task in PRIZE_TASKS}
    return {
        f"inverse_scaling/{name}": TaskSpec(
            "rlhf.evals.tasks.inverse_scaling",
            200,
            reading={"form": form},
            running={"form": form, "task": f"inverse_scaling/{name}"},
        )
        for name, form in [*formats.items(), *((form, form) for form in FIELDS)]
    }


TASKS: dict[str, TaskSpec] = {
    "hhh": TaskSpec("rlhf.evals.tasks.hhh", None),
    "truthfulqa": TaskSpec("rlhf.evals.tasks.truthfulqa", 200),
    "lambada": TaskSpec("rlhf.evals.tasks.lambada", 500),
    "lm_loss": TaskSpec("rlhf.evals.tasks.lm_loss", 100),
    **_inverse_scaling(),
    "humaneval": TaskSpec("rlhf.evals.tasks.humaneval", 20, frozenset({"generation", "sandbox"})),
    "toxicity": TaskSpec("rlhf.evals.tasks.toxicity", 100, frozenset({"generation", "judge"})),
}
"""All evaluations by name."""

_FORMER = {task.former: task.name for task in PRIZE_TASKS if task.former}


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
    found = f"{family}{slash}{_FORMER.get(task, task)}"
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


def read_task(name: str, files: Sequence[str], *, limit: int | None = None, seed: int = 0) -> list[Any]:
    """The items of a task that every model is to do, the same for the same arguments.

    name: of the task. limit: number of items; None = the task's default.

    Raises:
        UserError: an unknown task, or files that cannot be used.
    """
    spec = task_spec(name)
    items = spec.read(files, key=f"tax.tasks.{name}.files")
    return draw(items, spec.limit if limit is None else limit, seed)


def run_task(name: str, lm: LanguageModel, items: Sequence[Any], *, seed: int = 0, **options: Any) -> Outcome:
    """What a model does on the items of a task; options: further arguments of the task's own ``run``."""
    return task_spec(name).run(lm, items, seed=seed, **options)


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
    spec = task_spec(name)
    items = spec.read(files, key=f"tax.tasks.{name}.files")
    drawn = draw(items, spec.limit if limit is None else limit, seed)
    outcome = spec.run(lm, drawn, seed=seed, **options)
    if len(drawn) == len(items):
        return outcome
    return replace(
        outcome, notes=[*outcome.notes, f"{len(drawn)} of {len(items)} items, drawn by seed {seed}"]
    )
