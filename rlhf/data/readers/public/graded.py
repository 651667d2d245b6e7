"""Responses with grades: UltraFeedback, Nectar, HelpSteer 2, the ratings of E2E, and rows of one's own.

- UltraFeedback {"instruction", "completions"}: ``overall_score`` where all have it, else
  ``fine-grained_score``; two scales are never mixed in one comparison.
- Nectar {"prompt", "answers"}: ``rank`` of each, the lowest the best.
- {"prompt", "responses"} with a number per response in ``_SCORES``, or several annotators' ("grades": a list
  per response); or with "votes", one per annotator: the place of the best response, from 0, or "tie"; counts
  of votes are scores.
- one row a response, {"prompt", "response"} with ``_GRADES`` (HelpSteer 2: helpfulness): rows of one prompt
  are one comparison; rows of one response are several annotators.
- E2E {"mr", "ref1", ...} with a grade in "quality1", ...: rows of one ``_unit_id`` are its annotators. The
  prompt is ``E2E`` and the meaning representation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.comparisons import Comparison, Message, is_usable, prompt_key
from rlhf.data.readers.public.verdicts import (
    TIE,
    TIES,
    as_prompt,
    asked,
    grade,
    graded,
    group_of,
    named,
    not_counts,
    number,
    side,
    text,
    texts,
    voted,
)
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, is_list

E2E = "Say in one or two sentences:"
_SCORES = ("scores", "score", "grades", "ratings", "rewards")
_GRADES = ("helpfulness", "score", "grade", "rating", "overall_score")
Found = Iterator[Comparison | LeftOut]


def _of(row: Row, names: tuple[str, ...]) -> str:
    return next((name for name in names if named(row, name)), "")


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow("an answer is not a row with fields", f"a {type(value).__name__}")
    return value


def _common(rows: Sequence[Row], names: tuple[str, ...]) -> str:
    """The first of the columns that all rows have: grades of two scales cannot be compared."""
    name = next((name for name in names if all(named(row, name) for row in rows)), "")
    if not name:
        have = ((column, sum(named(row, column) for row in rows)) for column in names)
        having = ", ".join(f"{column} in {number}" for column, number in have if number)
        raise BadRow("no score that all responses have", f"{having or 'none'} of {len(rows)}")
    return name


def _ultrafeedback(row: Row, source: str) -> Found:
    answers = list(map(_mapping, row["completions"]))
    responses = texts(x.get("response") for x in answers)
    told = [x for x, of in zip(answers, responses, strict=True) if is_usable(of)]
    score = _common(told, ("overall_score", "fine-grained_score"))
    grades = [[grade(x.get(score), of)] for x, of in zip(answers, responses, strict=True)]
    yield graded(as_prompt(row["instruction"]), responses, grades, source)


def _nectar(row: Row, source: str) -> Found:
    answers = list(map(_mapping, row["answers"]))
    responses = texts(x.get("answer") for x in answers)
    ranks = [grade(x.get("rank"), of, "a rank") for x, of in zip(answers, responses, strict=True)]
    yield graded(as_prompt(row["prompt"]), responses, [[-rank] for rank in ranks], source)


def _responses(row: Row, source: str) -> Found:
    answers = texts(row["responses"])
    prompt, group = asked(row), group_of(row)
    if row.get("votes") is not None:
        meaning = {str(place): place for place in range(len(answers))} | dict.fromkeys(TIES, TIE)
        given = _list(row["votes"], "votes")
        not_counts(given, len(answers), "votes")
        votes = [side(vote, "votes", meaning) for vote in given if vote is not None]
        yield voted(prompt, answers, votes, source, group)
        return
    name = _of(row, _SCORES)
    if not name:
        raise BadRow("no scores")
    given = _list(row[name], name)
    if len(given) != len(answers):
        raise BadRow("not as many scores as responses", f"{len(given)} and {len(answers)}")
    lists = [of if isinstance(of, list) else [of] for of in given]
    grades = [[grade(x, answer) for x in of] for of, answer in zip(lists, answers, strict=True)]
    yield graded(prompt, answers, grades, source, group)


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{name} is not a list", f"a {type(value).__name__}")
    return value


def _rows_of_responses(row: Row, source: str) -> Found:
    grades: dict[str, list[float]] = {}
    column = _common(row["rows"], _GRADES)
    for x in row["rows"]:
        grades.setdefault(text(x["response"]), []).append(number(x[column], column))
    first, *others = row["rows"]
    for x in others:  # the same prompt and group, by together
        asked(x), group_of(x)
    yield graded(asked(first), list(grades), list(grades.values()), source, group_of(first))


def _prompt_of_response(row: Row) -> Hashable:
    number(row[_of(row, _GRADES)])
    return prompt_key(asked(row))


_E2E_GRADE = re.compile(r"(?!ref|sys)[a-z]+1")


def _e2e_grade(row: Row) -> str:
    return next((name[:-1] for name in row if _E2E_GRADE.fullmatch(name)), "")


def _e2e(row: Row, source: str) -> Found:
    first = row["rows"][0]
    grade = _e2e_grade(first)
    places = [name[3:] for name in first if re.fullmatch("ref[0-9]+", name) and named(first, name)]
    answers = [first[f"ref{place}"] for place in places]
    grades = [[number(x[f"{grade}{place}"]) for x in row["rows"]] for place in places]
    for x in row["rows"]:
        [x.get(name) for name in ("_unit_id", "mr", *(f"{of}{k}" for k in places for of in ("ref", "sys")))]
    yield graded((Message("user", f"{E2E} {first['mr']}"),), answers, grades, source)


def _e2e_unit(row: Row) -> Hashable:
    grade = _e2e_grade(row)
    for name in row:
        if re.fullmatch(f"{grade}[0-9]+", name):
            number(row[name], "a grade")
    return json.dumps([row.get("_unit_id"), row["mr"], *(row[x] for x in row if x.startswith("ref"))])


READERS: tuple[Reader[Comparison], ...] = (
    Reader(
        'UltraFeedback {"instruction", "completions"}',
        lambda row: named(row, "instruction") and is_list(row, "completions"),
        _ultrafeedback,
    ),
    Reader(
        'Nectar {"prompt", "answers"}',
        lambda row: named(row, "prompt", "answers") and is_list(row, "answers"),
        _nectar,
    ),
    Reader(
        'E2E ratings {"mr", "ref1", "quality1"}',
        lambda row: named(row, "mr", "ref1") and bool(_e2e_grade(row)),
        _e2e,
        together=_e2e_unit,
    ),
    Reader(
        '{"prompt", "responses"} with "scores", "grades" or "votes"',
        lambda row: is_list(row, "responses") and ("votes" in row or any(name in row for name in _SCORES)),
        _responses,
    ),
    Reader(
        'one response a row {"prompt", "response", "helpfulness"} or {"prompt", "response", "score"}',
        lambda row: named(row, "response") and "chosen" not in row and bool(_of(row, _GRADES)),
        _rows_of_responses,
        together=_prompt_of_response,
    ),
)
