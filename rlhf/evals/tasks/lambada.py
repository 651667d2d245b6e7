r"""LAMBADA (Paperno et al. 2016, arXiv 1606.06031), the variant of OpenAI, through lm-eval.

The last word of a passage, which people guess only from the whole of it. Context: the text up to its last
space; target: the space and what follows. As lm-eval's ``lambada_openai``:

- ``acc``: 1 if every token of the target is the most probable one (greedy), else 0;
- ``nll``: -log P(target | context), nats a word;
- aggregate ``perplexity``: exp of the mean ``nll``, a word and not a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rlhf.data.readers.rows import BadRow, Origin, Row
from rlhf.evals.items import read_items, text_of
from rlhf.evals.outcome import Outcome

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

TASK = "lambada"
EXPECTED = '{"text"}'
_LARGEST = 700.0  # nats; exp of more overflows


class Item(NamedTuple):
    """One passage."""

    id: str
    """Label of the file, and the number of the line in it."""
    context: str
    """Everything before the last space."""
    target: str
    """The last space and the word behind it."""


def read(files: Sequence[str], *, key: str = "tax.tasks.lambada.files") -> list[Item]:
    """The passages of files with a field ``text``.

    Raises:
        UserError: a file or a row cannot be used (file and line, and what is expected).
    """
    return read_items(files, _parse, key=key, expected=EXPECTED)


def _parse(row: Row, name: str, _: Origin) -> Item:
    return Item(name, *split_last_word(text_of(row, "text")))


def split_last_word(text: str) -> tuple[str, str]:
    """Context and target, divided at the last space; raises BadRow where one of them would be empty."""
    context, space, word = text.rpartition(" ")
    if not context.strip() or not word.strip():
        raise BadRow("no last word behind other words", repr(text[-40:]))
    return context, space + word


def run(lm: LanguageModel, items: Sequence[Item]) -> Outcome:
    """Score the last words through lm-eval's log-likelihood task.

    Raises:
        UserError: a passage is too long for the model's window.
    """
    from rlhf.evals.harness import TaskFile, through_lm_eval

    ids = [item.id for item in items]
    rows = [{"context": item.context, "target": item.target} for item in items]
    definition = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "target"}
    (found,) = through_lm_eval(lm, [TaskFile(TASK, ids, rows, definition)])
    nll = [-log_prob for ((log_prob, _),) in found]
    return Outcome(
        task=TASK,
        metric="acc",
        higher_is_better=True,
        ids=ids,
        groups=[""] * len(items),
        values={"acc": [float(greedy) for ((_, greedy),) in found], "nll": nll},
        aggregate={"perplexity": perplexity(nll)},
    )


def perplexity(nll: Sequence[float]) -> float:
    """exp of the mean; nll: nats of each unit."""
    return math.exp(min(sum(nll) / len(nll), _LARGEST))
