r"""LAMBADA (Paperno et al. 2016, arXiv 1606.06031), the variant of OpenAI: lm-eval's ``lambada_openai``.

The last word of a passage, which people guess only from the whole of it. Context: the text up to its last
space; target: the space and what follows.

- ``acc``: 1 if every token of the target is the most probable one (greedy), else 0;
- ``nll``: -log P(target | context), nats a word;
- aggregate ``perplexity``: exp of the mean ``nll``, a word and not a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.data.readers.rows import BadRow, Row
from rlhf.evals.items import Item, Place, read_items, text_of
from rlhf.evals.outcome import Outcome

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

TASK = "lambada"
_STOCK = "lambada/lambada_openai.yaml"
_LARGEST = 700.0  # nats; exp of more overflows


def read(files: Sequence[str], *, key: str = "tax.tasks.lambada.files") -> list[Item]:
    """The passages of files with a field ``text``.

    Raises:
        UserError: a file or a row cannot be used (file and line, and what is expected).
    """
    return read_items(files, _parse, key=key, expected='{"text"}')


def _parse(row: Row, place: Place) -> Item:
    text = text_of(row, "text")
    context, _, word = text.rpartition(" ")
    if not context.strip() or not word.strip():
        raise BadRow("no last word behind other words", repr(text[-40:]))
    return Item(place.name, "", {"text": text})


def run(lm: LanguageModel, items: Sequence[Item]) -> Outcome:
    """Score the last words.

    Raises:
        UserError: a passage is too long for the model's window.
    """
    from rlhf.evals.harness import stock_answers

    (found,) = stock_answers(lm, [_STOCK], items)
    rows = [{"acc": float(greedy), "nll": -log_prob} for ((log_prob, greedy),) in found]
    return Outcome.of(
        TASK, "acc", items, rows, aggregate={"perplexity": perplexity([row["nll"] for row in rows])}
    )


def perplexity(nll: Sequence[float]) -> float:
    """exp of the mean; nll: nats of each unit."""
    return math.exp(min(sum(nll) / len(nll), _LARGEST))
