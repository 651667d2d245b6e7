"""The bridge to lm-eval (EleutherAI's harness): its tasks and its evaluator, our rows and our language model.

A task is defined as in lm-eval's own files, with rows of ours in the place of a hub data set. lm-eval builds
the texts, asks for log-probabilities and hands them back, item by item; metrics with stricter rules for ties
than its argmax are computed from those by the task. Nothing here goes to the network, and lm-eval is imported
on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.resources
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

Answers = list[tuple[float, bool]]
"""Of each request of an item (each choice): summed log-probability, and whether it is greedy."""
_ROWS = "rows"  # name of the split that holds our rows


class TaskFile(NamedTuple):
    """A task with its rows."""

    name: str
    """As it stands in messages."""
    ids: list[str]
    """Name of every row, for messages."""
    rows: list[dict[str, Any]]
    """The items, as lm-eval's templates want them."""
    definition: dict[str, Any]
    """Fields of an lm-eval task file: output_type, doc_to_text, doc_to_target, ..."""


def through_lm_eval(lm: LanguageModel, files: Sequence[TaskFile]) -> list[list[Answers]]:
    """Run tasks of type ``multiple_choice`` or ``loglikelihood`` through lm-eval's evaluator.

    All tasks are asked in one call, so that what their items share is read once. Returns for each task, for
    each of its rows, the answers of the model.

    Raises:
        UserError: an item is too long for the model's window, or lm-eval is not there.
    """
    _check_installed()
    with _quiet():
        from lm_eval.evaluator import evaluate

        tasks = {file.name: _task_class()(_config(file)) for file in files}
        names = {file.name: file.ids for file in files}
        found = evaluate(
            lm=_bridge_class()(lm, names),
            task_dict={"tasks": tasks},
            bootstrap_iters=0,
            log_samples=True,
        )
    assert found is not None, "one process"
    answers = []
    for file in files:
        samples = sorted(found["samples"][file.name], key=lambda sample: sample["doc_id"])
        answers.append([[(float(lp), bool(best)) for lp, best in s["filtered_resps"]] for s in samples])
    return answers


def stock_field(file: str, field: str) -> Any:
    """A field of one of lm-eval's own task files, such as the preamble of TruthfulQA.

    file: its path below lm-eval's folder of tasks.

    Raises:
        UserError: the installed lm-eval has no such file or field.
    """
    _check_installed()
    package = importlib.resources.files("lm_eval")
    try:
        return yaml.safe_load((package / "tasks" / file).read_text(encoding="utf-8"))[field]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"lm-eval {importlib.metadata.version('lm-eval')} has no {field} in its task file {file} "
            f"({error}); install the version that constraints.txt names"
        ) from None


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: run `make setup`")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its notes on every task; nothing is reported to anybody."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _config(file: TaskFile) -> dict[str, Any]:
    import datasets

    rows = datasets.Dataset.from_list(file.rows)
    return {
        "task": file.name,
        "custom_dataset": lambda **_: {_ROWS: rows},
        "test_split": _ROWS,
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
        **file.definition,
    }


@functools.cache
def _task_class() -> Any:
    from lm_eval.api.task import ConfigurableTask

    class RowsTask(ConfigurableTask):
        """lm-eval's task without the progress bar over its rows."""

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config=config)

        def build_all_requests(self, **options: Any) -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                super().build_all_requests(**options)

    return RowsTask


@functools.cache
def _bridge_class() -> Any:
    from lm_eval.api.model import TemplateLM

    class Bridge(TemplateLM):
        """A language model of ours as lm-eval wants it: it divides context and continuation, we score."""

        def __init__(self, lm: LanguageModel, names: dict[str, list[str]]) -> None:
            super().__init__()
            self._lm = lm
            self._names = names
            self._asked: list[str] = []

        @property
        def eot_token_id(self) -> Any:
            return self._lm.tokenizer.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self._lm.encode(string)  # what a tokenizer puts before every text is part of the prefix

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            self._asked = [self._names[r.task_name][r.doc_id] for r in requests]
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return [(s.log_prob, s.greedy) for s in self._lm.score(pairs, names=self._asked)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError("held-out loss has a task of its own")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("tasks that write use LanguageModel.generate")

    return Bridge
