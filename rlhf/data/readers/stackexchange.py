"""Questions of StackExchange with answers and votes (Askell et al. 2021, arXiv:2112.00861, section 4.1).

Two forms. A row of a site's Posts.xml (:mod:`rlhf.data.readers.xml_dumps` groups answers by question) has
upvotes, from which the score of an answer is made:

    score = round(log2(1 + upvotes)), + 1 if the asker accepted the answer;  -1 if upvotes < 0

A row of the hub's HuggingFaceH4/stack-exchange-preferences, {"qid", "question", "answers"}, has that score
already (``pm_score``); it is used as it is.

A question with at least two answers of different scores gives one k-way comparison; equal scores are a tie.
The prompt is one user message: the title, a blank line, the text of the question. HTML becomes text by
:func:`rlhf.data.readers.html.text_of`. Posts of deleted users are posts like others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.data.comparisons import Comparison, Message
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, is_list, is_text, ranked_by_score


def parse(row: Row, source: str) -> Iterator[Comparison | LeftOut]:
    """The question's comparison. Raises BadRow for an answer without a score or of another type."""
    from rlhf.data.readers.html import text_of  # its parser takes a third of a second, and few read dumps

    dump = "qid" not in row
    title = (row["Title"] or "") if dump else ""
    question = (row["Body"] or "") if dump else row["question"]
    if not isinstance(title, str) or not isinstance(question, str):
        raise BadRow("the question is not a text")
    prompt = (Message("user", f"{title.strip()}\n\n{text_of(question)}".strip()),)
    texts, scores = [], []
    for answer in row["answers"]:
        if not isinstance(answer, Mapping):
            raise BadRow("an answer is not a row with fields", f"a {type(answer).__name__}")
        accepted = dump and answer.get("Id") is not None and answer.get("Id") == row.get("AcceptedAnswerId")
        scores.append(_score_in_dump(answer, accepted) if dump else _score_of_hub(answer))
        field = "Body" if dump else "text"
        if not is_text(answer, field) and answer.get(field) is not None:
            raise BadRow("the text of an answer is not a text", f"a {type(answer[field]).__name__}")
        texts.append(text_of(answer.get(field) or ""))
    yield ranked_by_score(prompt, texts, scores, source)


def score(upvotes: int, accepted: bool) -> int:
    """The preference score of an answer; an accepted answer with negative votes stays at -1."""
    return -1 if upvotes < 0 else round(math.log2(1 + upvotes)) + accepted


def _score_in_dump(answer: Mapping[str, Any], accepted: bool) -> int:
    upvotes = answer.get("Score")
    if not isinstance(upvotes, str) or not re.fullmatch(r"[+-]?[0-9]{1,18}", upvotes.strip()):
        raise BadRow(
            "an answer whose Score is not a whole number", f"answer {answer.get('Id')}: {upvotes!r}"[:80]
        )
    return score(int(upvotes), accepted)


def _score_of_hub(answer: Mapping[str, Any]) -> float:
    value = answer.get("pm_score")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise BadRow("an answer whose pm_score is not a number", f"{value!r}"[:80])
    return value


READER = Reader(
    'StackExchange Posts.xml or {"qid", "question", "answers"}',
    lambda row: (
        is_list(row, "answers")
        and ({"Id", "Title", "Body"} <= row.keys() or {"qid", "question"} <= row.keys())
    ),
    parse,
)
