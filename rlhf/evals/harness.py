"""The bridge to lm-eval (EleutherAI's harness): its tasks and its evaluator, our rows and our language model.

A task is one of lm-eval's own task files, on its hub data set or with rows of ours in the place of that.
lm-eval builds the texts, asks for log-probabilities and texts, and hands them back item by item; metrics with
stricter rules for ties than its argmax are computed from those by the task. Nothing here goes to the network
for rows of ours, and lm-eval is imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import logging
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.evals.items import Item
from rlhf.tokenization.special_tokens import special_start

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

Answers = list[tuple[float, bool]]
"""Of each request of an item (each choice): summed log-probability, and whether it is greedy."""
MAX_NEW_TOKENS = 256
"""Longest text where a task's file says nothing, as in lm-eval's own models."""
_ROWS = "rows"  # name of the split that holds our rows


def stock_answers(lm: LanguageModel, files: Sequence[str], items: Sequence[Item]) -> list[list[Answers]]:
    """What a model says to items by lm-eval's task files of type ``multiple_choice`` or ``loglikelihood``.

    All files are asked in one call, so that what their texts share is read once. files: their paths below
    lm-eval's folder of tasks. Returns for each file, for each item, the answers of the model.

    Raises:
        UserError: an item is too long for the model's window, or lm-eval or its file is not there.
    """
    docs = [item.doc for item in items]
    unscored: Any = lambda doc, results: {}  # noqa: E731 - the metrics are computed from the answers
    tasks = {
        file: stock_task(
            stock_config(file, functions=False) | {"task": file, "process_results": unscored}, docs
        )
        for file in files
    }
    found = _evaluate(lm, tasks, [item.id for item in items])
    answers = []
    for file in files:
        samples = sorted(found[file], key=lambda sample: sample["doc_id"])
        answers.append([[(float(lp), bool(best)) for lp, best in s["filtered_resps"]] for s in samples])
    return answers


def stock_metrics(lm: LanguageModel, task: Any, ids: dict[int, str], seed: int) -> list[dict[str, float]]:
    """Metrics of a task as lm-eval computes them, an entry an item; those of further filters as
    ``metric,filter``.

    task: as :func:`stock_task` gives it. ids: number of each document that is wanted, ascending, and its name
    in messages. seed: of the few-shot examples and of sampling.
    """
    name = str(task.config.task)
    task.set_fewshot_seed(seed)
    samples = _evaluate(lm, {name: task}, list(ids.values()), samples={name: list(ids)}, seed=seed)[name]
    values: dict[int, dict[str, float]] = {number: {} for number in ids}
    for sample in samples:
        further = sample["filter"] != samples[0]["filter"]
        for metric in sample["metrics"]:
            value = _value_of(sample[metric])
            if value is not None:
                label = f"{metric},{sample['filter']}" if further else metric
                values[sample["doc_id"]][label] = value
    return list(values.values())


def _evaluate(
    lm: LanguageModel,
    tasks: Mapping[str, Any],
    names: Sequence[str],
    *,
    samples: dict[str, list[int]] | None = None,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples of every task. names: of the documents that are asked, in their order."""
    with _quiet():
        from lm_eval.evaluator import evaluate

        found = evaluate(
            lm=_bridge_class()(lm, names, seed),
            task_dict={"tasks": tasks},
            samples=samples,
            bootstrap_iters=0,
            log_samples=True,
        )
    assert found is not None, "one process"
    return dict(found["samples"])


def stock_config(file: str | Path, *, functions: bool = True) -> dict[str, Any]:
    """The fields of one of lm-eval's task files, with what it includes.

    file: its path, or that below lm-eval's folder of tasks. functions: whether those that it names are
    imported.

    Raises:
        UserError: lm-eval is not installed, or another version that has no such file.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("lm-eval is not installed: run `make setup`")
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(spec.submodule_search_locations[0]) / "tasks" / file
    try:
        config: dict[str, Any] = load_yaml(path, resolve_func=functions)
    except OSError:
        raise UserError(
            f"lm-eval {importlib.metadata.version('lm-eval')} has no task file {file}; install the version "
            "that constraints.txt names"
        ) from None
    return {field: value for field, value in config.items() if field not in ("tag", "group", "task_list")}


def stock_task(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None = None) -> Any:
    """lm-eval's task object of such fields, its data set loaded.

    rows: what takes the place of that data set, few-shot examples included.
    """
    config = dict(config)
    if rows is not None:
        import datasets

        table = datasets.Dataset.from_list(list(rows))
        config |= {"custom_dataset": lambda **_: {_ROWS: table}, "test_split": _ROWS}
        config |= {"training_split": None, "validation_split": None, "fewshot_split": None}
        if config.get("num_fewshot") and "samples" not in (config.get("fewshot_config") or {}):
            config["fewshot_split"] = _ROWS
    with _quiet():
        return _task_class()(config)


def _value_of(found: Any) -> float | None:
    """A metric of one item as a number: shares of lists, nats a unit of (log-likelihood, units)."""
    if isinstance(found, numbers.Real):
        return float(found)
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(x, numbers.Real) for x in found):
        return -float(found[0]) / float(found[1])
    if isinstance(found, list) and found and all(isinstance(x, numbers.Real) for x in found):
        return sum(map(float, found)) / len(found)
    return None


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

        def __init__(self, lm: LanguageModel, names: Sequence[str], seed: int = 0) -> None:
            super().__init__()
            self._lm = lm
            self._names = names
            self._asked: list[str] = []
            self._seed = seed

        @property
        def eot_token_id(self) -> Any:
            return self._lm.tokenizer.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self._lm.encode(string)  # what a tokenizer puts before every text is part of the prefix

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            self._asked = [self._names[r.doc_id] for r in requests]
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return [(s.log_prob, s.greedy) for s in self._lm.score(pairs, names=self._asked)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            lm, found = self._lm, []
            fixed = len(lm.prefix_ids)
            prompted = fixed > len(special_start(lm.tokenizer))
            taken = fixed if prompted else max(fixed - 1, 0)  # a prompt stands before every window
            for request in requests:
                name, ids = self._names[request.doc_id], lm.encode(request.args[0])
                size = max(len(ids), 1) if lm.window is None else lm.window - taken
                windows = [*map(make_disjoint_window, get_rolling_token_windows(ids, 0, size, context_len=1))]
                # the fixed text, or what stands in its place, takes the place of the 0 before the first
                scored = lm.score([([], continuation) for _, continuation in windows[:1]], names=[name])
                scored += lm.score(windows[1:], names=[name] * len(windows), bare=not prompted)
                found.append(sum(s.log_prob for s in scored))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            by_options: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                by_options.setdefault(repr(request.args[1]), []).append(i)
            for group in by_options.values():
                options = requests[group[0]].args[1]
                until = options.get("until") or []
                sampled = options.get("do_sample", False)
                said = self._lm.generate(
                    [self._lm.encode(requests[i].args[0]) for i in group],
                    max_new_tokens=int(options.get("max_gen_toks", MAX_NEW_TOKENS)),
                    temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
                    top_p=float(options.get("top_p", 1.0)),
                    stop=[until] if isinstance(until, str) else [stop for stop in until if stop],
                    seed=self._seed,
                    names=[self._names[requests[i].doc_id] for i in group],
                )
                for i, text in zip(group, said, strict=True):
                    texts[i] = text
            return texts

    return Bridge
