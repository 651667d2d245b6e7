"""The project's rows: {"prompt", "responses", "ranks", "source"?, "confidence"?, "group"?}.

What people ranked (`make rank`) has an ``annotator`` and an ``item`` besides: the rows of one item are votes,
and their mean ranks are one comparison, so that people who agree do not count as one. Skipped items, and
those of which everything is bad, say nothing about preference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf.data.comparisons import Comparison, Counts, OnBadRows, problem
from rlhf.data.readers.files import local
from rlhf.data.readers.public.verdicts import graded
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, confidence, is_text, prompt_of
from rlhf.data.readers.sieve import sift


def parse(row: Row, source: str) -> Iterator[Comparison]:
    """The row's comparison; ``prompt`` is a string or messages. Raises BadRow for values of another type."""
    responses, ranks = row["responses"], row["ranks"]
    if not isinstance(responses, list) or not all(isinstance(x, str | None) for x in responses):
        raise BadRow("responses are not a list of strings")
    if not isinstance(ranks, list):
        raise BadRow("ranks are not a list")
    own_source, group = row.get("source"), row.get("group")
    if own_source is not None and not isinstance(own_source, str):
        raise BadRow("source is not a string")
    if group is not None and not isinstance(group, str):
        raise BadRow("group is not a string")
    yield Comparison(
        prompt_of(row["prompt"]),
        tuple(response or "" for response in responses),
        tuple(ranks),
        source if own_source is None else own_source,
        confidence(row),
        group,
    )


def _votes(row: Row, source: str) -> Iterator[Comparison | LeftOut]:
    rows = row["rows"]
    found = [(_told(one), next(iter(parse(one, source)))) for one in rows]
    answers = [comparison for told, comparison in found if told]
    first = found[0][1]
    if not answers:
        yield LeftOut("skipped, or all responses bad", first.prompt)
        return
    for answer in answers:
        if answer.responses != first.responses or len(answer.ranks) != len(first.responses):
            raise BadRow("answers of one item with other responses, or another number of ranks")
        if not all(isinstance(rank, int) for rank in answer.ranks):
            raise BadRow("a rank is not an integer >= 0")
    grades = [[-float(answer.ranks[k]) for answer in answers] for k in range(len(first.responses))]
    yield graded(first.prompt, first.responses, grades, first.source, first.group)


def _told(row: Row) -> bool:
    """Whether an answer says what is better; its other fields are about the answer, and known."""
    for name in ("annotator", "item", "reason", "seconds", "writers"):
        row.get(name)
    return not (row.get("skipped") or row.get("all_bad"))


def _is_answer(row: Row) -> bool:
    return is_text(row, "annotator", "item") and READER.recognizes(row)


READER = Reader(
    'native {"prompt", "responses", "ranks"}',
    lambda row: "prompt" in row and "responses" in row and "ranks" in row,
    parse,
)
ANSWERS = Reader(
    'answers of people {"prompt", "responses", "ranks", "annotator", "item"}',
    _is_answer,
    _votes,
    together=lambda row: str(row["item"]),
)


def read_native(path: str | Path, on_bad_rows: OnBadRows, counts: Counts) -> list[Comparison]:
    """Read what :func:`rlhf.data.comparisons.write_native` wrote; nothing is removed.

    Raises UserError with file and line at the first bad row, or counts bad rows under ``"skip"``.
    """
    return list(sift(local(Path(path)), [READER], problem, on_bad_rows, counts))
