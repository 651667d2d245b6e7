"""The project's rows: {"prompt", "responses", "ranks", "source"?, "confidence"?, "group"?}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf.data.comparisons import Comparison, Counts, OnBadRows, problem
from rlhf.data.readers.files import local
from rlhf.data.readers.rows import BadRow, Reader, Row, confidence, prompt_of
from rlhf.data.readers.sieve import sift


def parse(row: Row, source: str) -> Iterator[Comparison]:
    """The row's comparison; ``prompt`` is a string or messages. Raises BadRow for values of another type."""
    responses, ranks = row["responses"], row["ranks"]
    if not isinstance(responses, list) or not all(isinstance(response, str) for response in responses):
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
        tuple(responses),
        tuple(ranks),
        source if own_source is None else own_source,
        confidence(row),
        group,
    )


READER = Reader(
    'native {"prompt", "responses", "ranks"}',
    lambda row: "prompt" in row and "responses" in row and "ranks" in row,
    parse,
)


def read_native(path: str | Path, on_bad_rows: OnBadRows, counts: Counts) -> list[Comparison]:
    """Read what :func:`rlhf.data.comparisons.write_native` wrote; nothing is removed.

    Raises UserError with file and line at the first bad row, or counts bad rows under ``"skip"``.
    """
    return list(sift(local(Path(path)), [READER], problem, on_bad_rows, counts))
