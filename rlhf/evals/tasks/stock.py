"""Any task of lm-eval's own library as an evaluation of ours, on the hub's rows or on local files.

The task's file (prompt template, answer choices, filters, metrics) is taken as it stands; with local files
their rows take the place of the split that it evaluates on, and few-shot examples come from the same rows
without the item itself. lm-eval is imported on first use; names are found by scanning its folder of tasks.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from rlhf.data.readers.rows import Row
from rlhf.errors import UserError
from rlhf.evals.harness import MAX_NEW_TOKENS
from rlhf.evals.items import Place, missing, read_items
from rlhf.evals.outcome import Outcome

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

_ENTRY = re.compile(r"""^["']?(task|group)["']?[ \t]*:[ \t]*["']?([\w./+-]+)""", re.MULTILINE)
_INCLUDE = re.compile(r"""^["']?include["']?[ \t]*:[ \t]*["']?([\w./+-]+)""", re.MULTILINE)
_KIND = re.compile(r"""^["']?output_type["']?[ \t]*:[ \t]*["']?(\w+)""", re.MULTILINE)
_LONGEST = re.compile(r"""max_gen_toks["']?[ \t]*:[ \t]*(\d+)""")
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")


class Item(NamedTuple):
    """One document of a task."""

    id: str
    """Label of the file and line or row, or the name of the task and the number of the document."""
    number: int
    """Number of the document in the task, counted from 0."""
    task: Any
    """lm-eval's task object, shared by all its items."""


@functools.cache
def index() -> dict[str, tuple[str, Path]]:
    """Of every name in lm-eval's folder of tasks: ("task" or "group", its file); empty without lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    found: dict[str, tuple[str, Path]] = {}
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for folder, _, files in os.walk(Path(place) / "tasks"):
            for file in sorted(files):
                if file.endswith((".yaml", ".yml")):
                    path = Path(folder) / file
                    entries = _ENTRY.findall(path.read_text(encoding="utf-8"))
                    group = any(kind == "group" for kind, _ in entries)
                    for kind, name in entries:
                        if kind == "group" or not group:
                            found.setdefault(name, (kind, path))
    return found


def check_name(name: str, own: Sequence[str]) -> None:
    """Whether a name is that of a task that can be run; no import of lm-eval.

    own: names of this project's tasks, for the suggestion.

    Raises:
        UserError: there is no such task, it is a group, or it runs generated code outside the sandbox.
    """
    if name not in index():
        lowered: dict[str, str] = {}
        for known in (*own, *index()):
            lowered.setdefault(known.lower(), known)
        close = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)
        near = [lowered[known] for known in close]
        remedy = (
            f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(own)}, or any of lm-eval"
        )
        raise UserError(f"unknown evaluation {name!r}; {remedy}")
    kind, path = index()[name]
    if kind == "group":
        tasks = list(itertools.islice(_tasks_of(_loaded(path).get("task"), {name}), 4))
        some = f" ({', '.join(tasks[:3])}{', ...' * (len(tasks) > 3)})" if tasks else ""
        raise UserError(f"{name} is a group of lm-eval: name its tasks one by one{some}")
    if "unsafe_code: true" in _text(path):
        raise UserError(
            f"{name} of lm-eval runs generated code without a sandbox; use humaneval, which has one"
        )


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's files without the functions that they name."""


_Loader.add_multi_constructor("!", lambda *_: None)


def _loaded(path: Path) -> dict[str, Any]:
    return dict(yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader))


def _tasks_of(members: Any, seen: set[str]) -> Iterator[str]:
    """Names of the tasks in a group's ``task`` field: itself, of groups in it, and those with a tag in it.

    seen: groups that are being read.
    """
    for member in members if isinstance(members, list) else [members]:
        if isinstance(member, dict):
            yield from _tasks_of(member.get("task"), seen)
        elif (kind := index().get(member, ("tag",))[0]) == "task":
            yield member
        elif kind == "group" and member not in seen:
            yield from _tasks_of(_loaded(index()[member][1]).get("task"), {*seen, member})
        elif isinstance(member, str) and kind == "tag":
            for task, (_, path) in index().items():
                tags = _loaded(path).get("tag") if member in path.read_text(encoding="utf-8") else ()
                if member in ([tags] if isinstance(tags, str) else tags or ()):
                    yield task


def _text(path: Path) -> str:
    """A task file and what it includes."""
    text = path.read_text(encoding="utf-8")
    included = (path.parent / name for name in _INCLUDE.findall(text))
    return text + "".join(_text(file) for file in included if file.is_file())


def longest_text(name: str) -> int | None:
    """Tokens of the longest text that a task of lm-eval has a model write; None where it has none written,
    or there is no such task. By its file alone, without an import of lm-eval."""
    kind, path = index().get(name, ("", Path()))
    text = _text(path) if kind == "task" else ""
    kinds = _KIND.findall(text)  # its own before those of what it includes
    if not kinds or kinds[0] != "generate_until":
        return None
    given = _LONGEST.search(text)
    return int(given[1]) if given else MAX_NEW_TOKENS


@dataclass(frozen=True)
class StockTask:
    """A task of lm-eval by its name; the same interface as :class:`rlhf.evals.registry.TaskSpec`."""

    name: str
    """As lm-eval has it."""
    num_fewshot: int | None = None
    """Examples before each item; None = as the task's file has it, and 0 there where it says nothing."""
    limit: int | None = None
    """Items by default: all."""
    needs: frozenset[str] = frozenset()
    """What else it needs: nothing."""

    def read(self, files: Sequence[str], *, key: str) -> list[Item]:
        """The task's documents, of local files or, without any, of the data set that the task names.

        Raises:
            UserError: a file cannot be used (file and line, and the fields expected), or the hub cannot be
                reached.
        """
        from rlhf.evals.harness import stock_config, stock_task

        config = stock_config(index()[self.name][1])
        if "class" in config:
            raise UserError(f"{key}: {self.name} is a Python class in lm-eval, not a task file; leave it out")
        if self.num_fewshot is not None:
            config["num_fewshot"] = self.num_fewshot
        if files:
            return self._local(files, config, key)
        try:
            task = stock_task(config)
        except Exception as error:
            raise UserError(
                f"{key}: the data set of {self.name} cannot be loaded from the hub "
                f"({_line(error)}); give local rows with `files`"
            ) from None
        return [Item(f"{self.name}:{i + 1}", i, task) for i in range(len(task.eval_docs))]

    def _local(self, files: Sequence[str], config: dict[str, Any], key: str) -> list[Item]:
        from rlhf.evals.harness import stock_task

        fields = [] if config.get("process_docs") else _fields(config)
        expected = f"the fields {', '.join(fields) or f'of {self.name}'}"

        def parse(row: Row, place: Place) -> tuple[Place, dict[str, Any]]:
            for field in fields:
                if field not in row:
                    raise missing(row, field, "field")
            return place, dict(row)

        places, rows = zip(*read_items(files, parse, key=key, expected=expected), strict=True)
        shots = config.get("num_fewshot") or 0
        if shots >= len(rows):
            raise UserError(
                f"{key}: {shots} few-shot examples need more than {len(rows)} rows; set num_fewshot"
            )
        try:
            task = stock_task(config, rows)
        except Exception as error:
            raise UserError(
                f"{places[0].where} and on: the task cannot read the rows ({_line(error)}); "
                f"expected {expected}"
            ) from None
        docs = task.eval_docs
        if len(docs) != len(rows):  # the task has chosen among them
            places = [Place(f"{self.name}:{i + 1}", files[0], places[0].origin) for i in range(len(docs))]
        for doc, place in zip(docs, places, strict=True):
            try:
                task.doc_to_text(doc)
                task.doc_to_target(doc)
                _ = task.doc_to_choice(doc) if task.config.doc_to_choice else None
            except Exception as error:
                raise UserError(
                    f"{place.where}: the task cannot read it ({_line(error)}); expected {expected}"
                ) from None
        return [Item(place.name, i, task) for i, place in enumerate(places)]

    def run(self, lm: LanguageModel, items: Sequence[Item], *, seed: int = 0) -> Outcome:
        """What a model does on the items: every numeric metric of the task, item by item.

        The first metric of which more is better stands for the task, else its first.
        """
        from rlhf.evals.harness import stock_metrics

        task = items[0].task
        rows = stock_metrics(lm, task, {item.number: item.id for item in items}, seed)
        better = task.higher_is_better()
        names = [name for name in rows[0] if all(name in row for row in rows)]
        metric = next((name for name in names if better.get(name.partition(",")[0])), names[0])
        return Outcome.of(
            self.name,
            metric,
            items,
            [{name: row[name] for name in names} for row in rows],
            higher_is_better=bool(better.get(metric.partition(",")[0])),
            notes=[f"lm-eval's task {self.name}, {task.config.num_fewshot or 0} few-shot examples"],
        )


def _fields(config: dict[str, Any]) -> list[str]:
    """The fields that the task's templates read."""
    import jinja2
    from jinja2 import meta

    found: set[str] = set()
    for template in (config.get(name) for name in _TEMPLATES):
        if isinstance(template, str) and template.isidentifier():
            found.add(template)
        elif isinstance(template, str):
            found |= meta.find_undeclared_variables(jinja2.Environment().parse(template))
    return sorted(found)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
