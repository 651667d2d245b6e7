"""UKPConvArg (Habernal and Gurevych 2016, "Which argument is more convincing?"): one file a debate and side.

The file is called DEBATE_SIDE with - for blanks, and both stand in the prompt, one user message: "Debate: ban
plastic water bottles. Argue for: no bad for the economy.". ``group`` is the debate, so that a split by group
holds out both of its sides; "commond", as one file of pairs is called, is the "common" of its rankings.
``<br/>`` becomes a new line; between tabs, as published, a quote is a character like others. Pairs: "#id" or
"id", "label" (a1 or a2, the more convincing; "equal" is a tie), "a1", "a2". Rankings: "#id" or "id", "rank"
(low is better), "argument"; the whole file is one k-way comparison.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from rlhf.data.comparisons import Comparison, Message, Prompt
from rlhf.data.readers.public.verdicts import TIE, number, side, voted
from rlhf.data.readers.rows import LeftOut, Reader, Row, ranked_by_score

_LABELS = {"a1": 0, "a2": 1, "equal": TIE}


def _debate(source: str) -> tuple[Prompt, str]:
    debate, _, stance = source.partition("_")
    debate, stance = (part.strip("-").replace("-", " ") for part in (debate, stance))
    stance = stance.replace("commond good", "common good")
    words = f"Debate: {debate}." + (f" Argue for: {stance}." if stance else "")
    return (Message("user", words),), debate


def _plain(argument: str) -> str:
    return re.sub(r"\s*<br\s*/?>\s*", "\n", argument).strip()


def _has_id(row: Row) -> bool:
    return (row.get("#id"), row.get("id")) != (None, None)


def _pair(row: Row, source: str) -> Iterator[Comparison | LeftOut]:
    prompt, debate = _debate(source)
    _has_id(row)
    vote = side(row["label"], "label", _LABELS)
    yield voted(prompt, [_plain(row["a1"]), _plain(row["a2"])], [vote], source, debate)


def _ranking(row: Row, source: str) -> Iterator[Comparison | LeftOut]:
    prompt, debate = _debate(source)
    found = [(_plain(x["argument"]), -number(x["rank"], "rank")) for x in row["rows"] if _has_id(x)]
    ranked = ranked_by_score(prompt, [x for x, _ in found], [score for _, score in found], source)
    yield ranked if isinstance(ranked, LeftOut) else replace(ranked, group=debate)


def _key(row: Row) -> str:
    number(row["rank"], "rank")
    return ""


READERS: tuple[Reader[Comparison], ...] = (
    Reader(
        'UKPConvArg pairs {"#id", "label", "a1", "a2"}',
        lambda row: {"label", "a1", "a2"} <= row.keys() and _has_id(row),
        _pair,
    ),
    Reader(
        'UKPConvArg rankings {"#id", "rank", "argument"}',
        lambda row: {"rank", "argument"} <= row.keys() and _has_id(row),
        _ranking,
        together=_key,
    ),
)
