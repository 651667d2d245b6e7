"""The Inverse Scaling Prize (McKenzie et al. 2023, arXiv 2306.09479): tasks on which larger models did worse.

Three formats, scored as the official pipeline does (github.com/naimenz/inverse-scaling-eval-pipeline). With
l(c) the sum of the log-probabilities of the tokens of a class c behind the prompt, not divided by its length:

- ``classification`` (prompt, classes, answer_index), by the template of lm-eval's ``inverse_scaling_mc``:
  ``acc`` = 1 if l of the right class exceeds that of every other (a tie is 0), ``loss`` = -log
  softmax(l)[right], ``total_logprob`` = log sum exp(l): the mass on any of the classes. Where that is small
  the other figures mean little;
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
from typing import TYPE_CHECKING, Any

from rlhf.data.readers.rows import BadRow, Row
from rlhf.evals.items import Item, Place, choices_of, index_of, missing, read_items, text_of
from rlhf.evals.outcome import Outcome

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

FAMILY = "inverse_scaling/"
CLASSIFICATION, SEQUENCE_PROB, LOG_ODDS = "classification", "sequence_prob", "logodds"
FIELDS = {
    CLASSIFICATION: '{"prompt", "classes", "answer_index"}',
    SEQUENCE_PROB: '{"prompt", "completion"}',
    LOG_ODDS: '{"prompt", "other_prompt", "classes", "answer_index"}, two classes',
}
"""The fields of a row of each format."""
PRIZE_TASKS = (
    "neqa",
    "resisting-correction",
    "redefine",
    "hindsight-neglect",
    "modus-tollens",
    "memo-trap",
    "prompt-injection",
    "into-the-unknown",
    "pattern-matching-suppression",
    "sig-figs",
    "repetitive-algebra",
)
"""All eleven that won a prize, by their names in the organizers' release, in the order of the paper."""
FORMER = {
    "quote-repetition": "resisting-correction",
    "redefine-math": "redefine",
    "hindsight-neglect-10shot": "hindsight-neglect",
}
"""Names of the first round."""
FORMATS = {
    **{FAMILY + name: CLASSIFICATION for name in PRIZE_TASKS},
    FAMILY + "prompt-injection": SEQUENCE_PROB,
    **{FAMILY + form: form for form in FIELDS},
}
"""Format of every task; rows of the user's own go by the name of their format."""
_STOCK = "inverse_scaling/_inverse_scaling_mc_yaml"
_LITTLE = 0.01  # mass on the classes below which the figures are marked


def read(
    files: Sequence[str],
    *,
    task: str = FAMILY + CLASSIFICATION,
    key: str = "tax.tasks.inverse_scaling.files",
) -> list[Item]:
    """The examples of csv, jsonl, json or parquet files, or of hub rows.

    ``classes`` is a list, or its text as Python or JSON writes it (csv); ``part`` is the item's group.

    Raises:
        UserError: a file or a row cannot be used (file and line, and what is expected).
    """
    form = FORMATS[task]

    def parse(row: Row, place: Place) -> Item:
        doc: dict[str, Any] = {}
        if form != SEQUENCE_PROB:
            doc["classes"] = choices_of(_listed(row), "classes")
            doc["answer_index"] = index_of(row, "answer_index", len(doc["classes"]))
        if form == LOG_ODDS and len(doc["classes"]) != 2:
            raise BadRow("log-odds need two classes", f"there are {len(doc['classes'])}")
        for field in ("prompt", "completion", "other_prompt"):
            if f'"{field}"' in FIELDS[form]:
                doc[field] = text_of(row, field)
        return Item(place.name, str(row.get("part") or ""), doc)

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


def run(lm: LanguageModel, items: Sequence[Item], *, task: str = FAMILY + CLASSIFICATION) -> Outcome:
    """Score the examples in the format of their task.

    Raises:
        UserError: an example is too long for the model's window.
    """
    form = FORMATS[task]
    rows = {CLASSIFICATION: _classified, SEQUENCE_PROB: _sequences, LOG_ODDS: _compared}[form](lm, items)
    chance = None
    if form == CLASSIFICATION:
        chance = sum(1 / len(item.doc["classes"]) for item in items) / len(items)
    return Outcome.of(
        task,
        {CLASSIFICATION: "acc", SEQUENCE_PROB: "loss", LOG_ODDS: "logodds_difference"}[form],
        items,
        rows,
        higher_is_better=form == CLASSIFICATION,
        chance=chance,
        notes=[] if form == SEQUENCE_PROB else _little_mass(rows),
    )


def _classified(lm: LanguageModel, items: Sequence[Item]) -> list[dict[str, float]]:
    from rlhf.evals.harness import stock_answers

    (found,) = stock_answers(lm, [_STOCK], items)
    return [
        classification([log_prob for log_prob, _ in answers], item.doc["answer_index"])
        for answers, item in zip(found, items, strict=True)
    ]


def _sequences(lm: LanguageModel, items: Sequence[Item]) -> list[dict[str, float]]:
    texts = [(item.id, item.doc["prompt"], item.doc["completion"]) for item in items]
    return [{"loss": -log_prob} for log_prob in _log_probs(lm, texts)]


def _compared(lm: LanguageModel, items: Sequence[Item]) -> list[dict[str, float]]:
    texts = [
        (item.id, item.doc[prompt], choice)
        for item in items
        for prompt in ("prompt", "other_prompt")
        for choice in item.doc["classes"]
    ]
    found = _log_probs(lm, texts)
    return [
        log_odds(found[4 * i : 4 * i + 2], found[4 * i + 2 : 4 * i + 4], item.doc["answer_index"])
        for i, item in enumerate(items)
    ]


def _log_probs(lm: LanguageModel, texts: Sequence[tuple[str, str, str]]) -> list[float]:
    """texts: name of the item, prompt, what follows."""
    pairs = [lm.encode_pair(prompt, text) for _, prompt, text in texts]
    return [scored.log_prob for scored in lm.score(pairs, names=[name for name, _, _ in texts])]


def _little_mass(rows: Sequence[dict[str, float]]) -> list[str]:
    mass = sum(math.exp(row["total_logprob"]) for row in rows) / len(rows)
    if mass >= _LITTLE:
        return []
    return [f"the classes hold {mass:.2g} of the probability on average: which of them leads means little"]
