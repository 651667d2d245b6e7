"""summarize-from-feedback (Stiennon et al. 2020, "Learning to summarize from human feedback").

- comparisons {"info", "summaries", "choice"}: the chosen one of two.
- axis {"info", "summary"}: one rated summary a row. Rows of one post are one comparison by ``axes.overall``;
  rows of one text are several annotators, whose grades are averaged.

The prompt is laid out as in the paper's appendix B.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace

from rlhf.data.comparisons import Comparison, Message, Prompt, prompt_key
from rlhf.data.readers.public.verdicts import graded, group_of, number, side, text, voted
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row

Found = Iterator[Comparison | LeftOut]


def _asked(row: Row) -> Prompt:
    info = row["info"]
    if not isinstance(info, Mapping):
        raise BadRow("info or summaries are not what the set has")
    names = ("subreddit", "title", "post")
    parts = [f"{x.upper()}: {info[x]}" for x in names if info.get(x)] if info.get("post") else []
    words = "\n".join(parts) or str(info.get("article") or "")
    return (Message("user", f"{words}\nTL;DR:".strip() if words else ""),)


def _choice(row: Row, source: str) -> Found:
    prompt, summaries = _asked(row), row["summaries"]
    if not isinstance(summaries, list):
        raise BadRow("info or summaries are not what the set has")
    vote = side(row["choice"], "choice", {str(place): place for place in range(len(summaries))})
    yield voted(prompt, [text(x).strip() for x in summaries], [vote], source, group_of(row))


def _post(row: Row) -> Hashable:
    _overall(row)
    return prompt_key(_asked(row))


def _overall(row: Row) -> float:
    axes = row["summary"].get("axes")
    grade = axes.get("overall") if isinstance(axes, Mapping) else None
    if grade is None:
        raise LeftOut("a summary without an overall grade")
    return number(grade, "axes.overall")


def _axis(row: Row, source: str) -> Found:
    grades: dict[str, list[tuple[str, float]]] = {}
    for x in row["rows"]:
        grade = (str(x.get("worker")), _overall(x))
        grades.setdefault(text(x["summary"]).strip(), []).append(grade)
    prompts = [_asked(x) for x in row["rows"]]
    found = graded(
        prompts[0], list(grades), [[grade for _, grade in sorted(of)] for of in grades.values()], source
    )
    same = len({tuple(sorted(worker for worker, _ in of)) for of in grades.values()}) == 1
    yield found if same or isinstance(found, LeftOut) else replace(found, confidence=None)


READERS: tuple[Reader[Comparison], ...] = (
    Reader(
        'summarize-from-feedback {"info", "summaries", "choice"}',
        lambda row: {"info", "summaries", "choice"} <= row.keys(),
        _choice,
    ),
    Reader(
        'summarize-from-feedback axis {"info", "summary"}',
        lambda row: all(isinstance(row.get(name), Mapping) for name in ("info", "summary")),
        _axis,
        together=_post,
    ),
)
