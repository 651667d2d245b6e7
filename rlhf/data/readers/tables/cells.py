"""Lists and objects in the cells of a table, as JSON or as Python, pandas and numpy write them.

A cell is read as a list or an object only where it is one as a whole, and only

- in a column that no format has as a text (``_LISTS``, and those of verdicts);
- where it is messages: an object, or a list of objects, with a role and a content each (or from and value,
  as ShareGPT has), in ``chosen`` and ``rejected`` only where both are; or the question of WebGPT;
- in ``chosen`` and ``rejected`` of suites: beside ``id`` and ``prompt``, both lists of texts, with
  ``num_correct`` (RewardBench 2) or of three each (RM-Bench). The first row decides for the whole file.

Everything else is a text: a response ``[1, 2]`` or ``["a"]`` stays one. What begins like a list in the first
two cases, but is cut off or holds what cannot be told, is a bad row.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rlhf.data.readers.columns import VERDICTS
from rlhf.data.readers.rows import BadRow, Origin, Row

_LISTS = frozenset(
    ("completions", "answers", "responses", "summaries", "info", "comments", "votes", "scores", "score",
     "grades", "ratings", "rewards", "ranks", "individual_preference", "all_preferences_unprocessed",
     *VERDICTS)
)  # fmt: skip
_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*(['"])(role|from|content|value|full_text)\1\s*:""")
_LIKE_A_LIST = re.compile(r"""\s*(\[\s*['"{\[]|\{\s*['"])""")
_LITERAL = 1 << 20  # characters of the longest list that is not JSON: its parser takes much memory
_TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,'"]+""", re.DOTALL)
_STYLES = 3  # of RM-Bench
SIDES = ("chosen", "rejected")


def parsed(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text is as a whole, None where it is none."""
    if not text.lstrip().startswith(("[", "{")) or not text.rstrip().endswith(("]", "}")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _literal(text) if len(text) <= _LITERAL else None
    return value if isinstance(value, list | dict) else None


def _literal(text: str) -> Any:
    """A Python literal; numpy, which writes no commas, has ['a' 'b'], which Python would read as ['ab']."""
    tokens: list[str] = []
    for token in _TOKEN.findall(text):
        if token == "...":  # numpy left out the middle
            return None
        if tokens and token not in "]}:," and tokens[-1] not in "[{:,":
            tokens.append(",")
        tokens.append(token)
    try:
        return ast.literal_eval("".join(tokens))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def with_lists(origin: Origin) -> Origin:
    """The origin; the lists and objects of a table are read. A row in which one cannot be is a BadRow."""
    if not origin.texts_only:
        return origin
    return replace(origin, rows=_rows(origin.rows), texts_only=False)


def _rows(rows: Iterator[tuple[int, object]]) -> Iterator[tuple[int, object]]:
    cells = _Cells()
    for number, row in rows:
        try:
            yield number, cells.read(row) if isinstance(row, Mapping) else row
        except BadRow as error:
            yield number, error


class _Cells:
    """Reads the lists and objects of the rows of one table."""

    def __init__(self) -> None:
        self._suite: bool | None = None

    def read(self, row: Row) -> Row:
        """The row with its lists and objects; raises BadRow where one cannot be read."""
        found = {name: x for name, x in row.items() if isinstance(x, str) and x.lstrip()[:1] in ("[", "{")}
        sides = SIDES if "rejected" in row else ()
        values = {name: _cell(str(name), text) for name, text in found.items() if name not in sides}
        values |= self._sides(row) if all(isinstance(row.get(name), str) for name in SIDES) else {}
        values = {name: value for name, value in values.items() if value is not None}
        return {**row, **values} if values else row

    def _sides(self, row: Row) -> dict[str, Any]:
        values = [parsed(row[name]) for name in SIDES]
        if all(_LIKE_MESSAGES.match(row[name]) for name in SIDES):
            if None in values:
                raise BadRow("messages that cannot be read", f"chosen or rejected of {row[SIDES[0]][:40]!r}")
            return dict(zip(SIDES, values, strict=True)) if all(map(_is_messages, values)) else {}
        sizes = [len(x) if isinstance(x, list) and all(isinstance(y, str) for y in x) else 0 for x in values]
        named = bool(row.get("id") and row.get("prompt"))
        suite = named and all(sizes) and (bool(row.get("num_correct")) or sizes == [_STYLES, _STYLES])
        self._suite = suite if self._suite is None else self._suite
        if self._suite and not suite:
            raise BadRow("chosen and rejected are not both lists of texts", "as in the rows before")
        return dict(zip(SIDES, values, strict=True)) if self._suite else {}


def _cell(name: str, text: str) -> Any:
    """The value of a cell, None where it is a text."""
    listed = name in _LISTS
    if not listed and _LIKE_MESSAGES.match(text) is None:
        return None
    value = parsed(text)
    if value is None and (not listed or _LIKE_A_LIST.match(text)):
        raise BadRow("a list that cannot be read", f"{name} is {text[:40]!r}...; write it as JSON")
    return value if listed or _is_messages(value) else None


def _is_messages(value: Any) -> bool:
    """Whether a value is a message, a list of them, or the question of WebGPT."""
    if isinstance(value, Mapping):
        return "full_text" in value or _is_message(value)
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(
        {"role", "from"} & value.keys() and {"content", "value"} & value.keys()
    )
