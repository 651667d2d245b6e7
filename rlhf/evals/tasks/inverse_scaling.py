"""The Inverse Scaling Prize (McKenzie et al. 2023, arXiv 2306.09479): tasks on which larger models did worse.

Three formats, scored as the official pipeline does (github.com/naimenz/inverse-scaling-eval-pipeline). With
l(c) the sum of the log-probabilities of the tokens of a class c behind the prompt, not divided by its length:

- ``classification`` (prompt, classes, answer_index), through lm-eval: ``acc`` = 1 if l of the right class
  exceeds that of every other (a tie is 0), ``loss`` = -log softmax(l)[right], ``total_logprob`` = log sum
  exp(l): the mass on any of the classes. Where that is small the other figures mean little;
- ``sequence_prob`` (prompt, completion): ``loss`` = -log P(completion | prompt);
- ``logodds`` (prompt, other_prompt, classes, answer_index; two classes): ``logodds_difference`` =
  (l(c0) - l(c1))[prompt] - (l(c0) - l(c1))[other_prompt], its sign turned if answer_index is 1: how much
  the other prompt takes from the log-odds of the right class, so lower is better.
  ``absolute_logodds_difference`` is its size; ``acc`` = 1 if the right class is the more probable one behind
  other_prompt; ``total_logprob`` = log of the mean mass of the classes behind the two prompts.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from rlhf.data.readers.rows import BadRow, Origin, Row
from rlhf.evals.items import choices_of, index_of, missing, read_items, text_of
from rlhf.evals.outcome import Outcome

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

Format = Literal["classification", "sequence_prob", "logodds"]
FIELDS: dict[Format, str] = {
    "classification": '{"prompt", "classes", "answer_index"}',
    "sequence_prob": '{"prompt", "completion"}',
    "logodds": '{"prompt", "other_prompt", "classes", "answer_index"}, two classes',
}
"""The fields of a row of each format."""
_LITTLE = 0.01  # mass on the classes below which the figures are marked


class PrizeTask(NamedTuple):
    """A task that won a prize."""

    name: str
    """As in the organisers' data release."""
    format: Format
    """How it is scored."""
    hub: str
    """A copy on the Hugging Face hub, as a spec of files."""
    former: str = ""
    """Its name in the first round, where that was another one."""


PRIZE_TASKS = (
    PrizeTask("neqa", "classification", "hub:inverse-scaling/NeQA"),
    PrizeTask(
        "resisting-correction", "classification", "hub:inverse-scaling/quote-repetition", "quote-repetition"
    ),
    PrizeTask("redefine", "classification", "hub:inverse-scaling/redefine-math", "redefine-math"),
    PrizeTask(
        "hindsight-neglect",
        "classification",
        "hub:inverse-scaling/hindsight-neglect-10shot",
        "hindsight-neglect-10shot",
    ),
    PrizeTask("modus-tollens", "classification", "hub:Albertmade/modus-tollens"),
    PrizeTask("memo-trap", "classification", "hub:Albertmade/memo-trap"),
    PrizeTask("prompt-injection", "sequence_prob", "hub:pminervini/inverse-scaling:prompt-injection@data"),
    PrizeTask("into-the-unknown", "classification", "hub:Albertmade/into-the-unknown"),
    PrizeTask(
        "pattern-matching-suppression", "classification", "hub:Albertmade/pattern-matching-suppression"
    ),
    PrizeTask("sig-figs", "classification", "hub:Albertmade/sig-figs"),
    PrizeTask("repetitive-algebra", "classification", "hub:Albertmade/repetitive-algebra"),
)
"""All eleven, in the order of the paper."""


class Item(NamedTuple):
    """One example of any format; fields that its format has not are empty."""

    id: str
    """Label of the file, and the number of the line or row in it."""
    part: str
    """The part of the task that it belongs to, "" where the file does not say."""
    prompt: str
    """What the model reads."""
    classes: list[str]
    """What may follow, with the space before it."""
    answer: int
    """Number of the right class."""
    completion: str
    """``sequence_prob``: what follows."""
    other_prompt: str
    """``logodds``: the prompt that the first one is compared with."""


def read(
    files: Sequence[str], *, form: Format = "classification", key: str = "tax.tasks.inverse_scaling.files"
) -> list[Item]:
    """The examples of csv, jsonl, json or parquet files, or of hub rows.

    ``classes`` is a list, or its text as Python or JSON writes it (csv).

    Raises:
        UserError: a file or a row cannot be used (file and line, and what is expected).
    """

    def parse(row: Row, name: str, _: Origin) -> Item:
        classes: list[str] = []
        answer = 0
        if form != "sequence_prob":
            classes = choices_of(_listed(row), "classes")
            answer = index_of(row, "answer_index", len(classes))
        if form == "logodds" and len(classes) != 2:
            raise BadRow("log-odds need two classes", f"there are {len(classes)}")
        return Item(
            id=name,
            part=str(row.get("part") or ""),
            prompt=text_of(row, "prompt"),
            classes=classes,
            answer=answer,
            completion=text_of(row, "completion") if form == "sequence_prob" else "",
            other_prompt=text_of(row, "other_prompt") if form == "logodds" else "",
        )

    return read_items(files, parse, key=key, expected=FIELDS[form])


def _listed(row: Row) -> object:
    """The field ``classes``, out of its text where it is one."""
    value = row.get("classes")
    if value is None:
        raise missing(row, "classes", "list")
    if not isinstance(value, str):
        return value
    for parse in (ast.literal_eval, json.loads):
        try:
            found = parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return list(found) if isinstance(found, tuple) else found
    raise BadRow('"classes" is no list', repr(value)[:60])


# ---------------------------------------------------------------- metrics


def classification(log_probs: Sequence[float], answer: int) -> dict[str, float]:
    """Accuracy (a tie is 0), loss and total log-probability of one example."""
    from scipy.special import logsumexp

    total = float(logsumexp(log_probs))
    others = [x for index, x in enumerate(log_probs) if index != answer]
    return {
        "acc": float(log_probs[answer] > max(others)),
        "loss": total - log_probs[answer],
        "total_logprob": total,
    }


def log_odds(here: Sequence[float], there: Sequence[float], answer: int) -> dict[str, float]:
    """The figures of one example.

    here: l of the two classes behind ``prompt``. there: behind ``other_prompt``. answer: 0 or 1.
    """
    from scipy.special import logsumexp

    difference = (here[0] - here[1]) - (there[0] - there[1])
    difference = -difference if answer == 1 else difference
    return {
        "logodds_difference": difference,
        "absolute_logodds_difference": abs(difference),
        "acc": float(there[answer] > there[1 - answer]),
        "total_logprob": float(logsumexp([*here, *there])) - math.log(2),
    }


# ---------------------------------------------------------------- the run


def run(
    lm: LanguageModel,
    items: Sequence[Item],
    *,
    form: Format = "classification",
    task: str = "inverse_scaling/classification",
) -> Outcome:
    """Score the examples of one format.

    task: name of the outcome.

    Raises:
        UserError: an example is too long for the model's window.
    """
    rows = {"classification": _classify, "sequence_prob": _sequences, "logodds": _compare}[form](
        lm, items, task
    )
    metric = {"classification": "acc", "sequence_prob": "loss", "logodds": "logodds_difference"}[form]
    values = {name: [row[name] for row in rows] for name in rows[0]}
    chance = sum(1 / len(item.classes) for item in items) / len(items) if form == "classification" else None
    return Outcome(
        task=task,
        metric=metric,
        higher_is_better=form == "classification",
        ids=[item.id for item in items],
        groups=[item.part for item in items],
        values=values,
        chance=chance,
        notes=_little_mass(values.get("total_logprob", [])),
    )


def _classify(lm: LanguageModel, items: Sequence[Item], task: str) -> list[dict[str, float]]:
    from rlhf.evals.harness import TaskFile, through_lm_eval

    rows = [{"prompt": item.prompt, "classes": item.classes, "answer_index": item.answer} for item in items]
    definition = {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "classes",
        "doc_to_target": "answer_index",
        "target_delimiter": "",
    }
    (found,) = through_lm_eval(lm, [TaskFile(task, [item.id for item in items], rows, definition)])
    return [
        classification([log_prob for log_prob, _ in answers], item.answer)
        for answers, item in zip(found, items, strict=True)
    ]


def _sequences(lm: LanguageModel, items: Sequence[Item], _: str) -> list[dict[str, float]]:
    pairs = [lm.encode_pair(item.prompt, item.completion) for item in items]
    return [{"loss": -scored.log_prob} for scored in lm.score(pairs, names=[item.id for item in items])]


def _compare(lm: LanguageModel, items: Sequence[Item], _: str) -> list[dict[str, float]]:
    pairs = [
        lm.encode_pair(prompt, choice)
        for item in items
        for prompt in (item.prompt, item.other_prompt)
        for choice in item.classes
    ]
    found = [s.log_prob for s in lm.score(pairs, names=[item.id for item in items for _ in range(4)])]
    return [
        log_odds(found[4 * i : 4 * i + 2], found[4 * i + 2 : 4 * i + 4], item.answer)
        for i, item in enumerate(items)
    ]


def _little_mass(total_logprob: Sequence[float]) -> list[str]:
    if not total_logprob:
        return []
    mass = sum(map(math.exp, total_logprob)) / len(total_logprob)
    if mass >= _LITTLE:
        return []
    return [f"the classes hold {mass:.2g} of the probability on average: which of them leads means little"]
