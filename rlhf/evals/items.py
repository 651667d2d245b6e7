"""From files to the items of a task: every fault has a place, and every item a name that does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rlhf.data.readers.files import origins
from rlhf.data.readers.rows import BadRow, Origin, Row
from rlhf.errors import UserError

T = TypeVar("T")


class Item(NamedTuple):
    """One item of a task that needs no more than the fields of its row."""

    id: str
    """Label of the file, and the number of the line or row in it."""
    group: str
    """Category, "" where the task has none."""
    doc: dict[str, Any]
    """The fields, checked, as lm-eval's template of the task wants them."""


class Place(NamedTuple):
    """Where a row stands."""

    name: str
    """Label of the file and number of the line or row; the name of the item."""
    where: str
    """The same for messages, as an editor can open it."""
    origin: Origin
    """The file or hub data set."""


Parse = Callable[[Row, Place], T]
"""A row and its place -> the item; raises BadRow where the row does not hold together."""


def read_items(files: Sequence[str], parse: Parse[T], *, key: str, expected: str) -> list[T]:
    """The items of the files, in their order.

    Args:
        files: paths, globs or ``hub:NAME[:CONFIG][@SPLIT]``; jsonl, json, csv, parquet or txt (a line is a
            row with the field ``text``), each also as .gz.
        parse: makes an item of a row.
        key: the recipe's key that holds the files, for messages.
        expected: the fields of a row, for messages.

    Raises:
        UserError: a file is missing or damaged, a row is not as expected (file and line or row), or there is
            no item.
    """
    items = list(parsed(files, parse, key=key, expected=expected))
    if not items:
        raise UserError(f"{key}: no item in {', '.join(files)}; expected rows with {expected}")
    return items


def parsed(files: Sequence[str], parse: Parse[T], *, key: str, expected: str) -> Iterator[T]:
    """As :func:`read_items`, one after the other, and no item is no fault.

    A second file of the same name has the names of its rows marked with a 2.
    """
    seen: dict[str, int] = {}
    for origin in origins(files, key=key):
        seen[origin.source] = seen.get(origin.source, 0) + 1
        label = origin.source if seen[origin.source] == 1 else f"{origin.source}({seen[origin.source]})"
        for number, row in origin.rows:
            place = Place(f"{label}:{number}", origin.where(number), origin)
            try:
                item = parse(_fields(row), place)
            except BadRow as error:
                raise UserError(f"{place.where}: {error}; expected {expected}") from None
            yield item


def _fields(row: object) -> Row:
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, Mapping):
        raise BadRow("not a row with fields")
    return row


def text_of(row: Row, field: str) -> str:
    """A field that holds a text with something in it; raises BadRow for anything else."""
    value = row.get(field)
    if not isinstance(value, str):
        raise missing(row, field, "text")
    if not value.strip():
        raise BadRow(f'an empty "{field}"')
    return _whole(value, field)


def missing(row: Row, field: str, kind: str) -> BadRow:
    """The fault of a row that has not the field, or holds something else there."""
    if field in row:
        return BadRow(f'"{field}" is no {kind}', f"it is {row[field]!r}"[:60])
    return BadRow(f'no "{field}"', f"the fields are {', '.join(map(str, row)) or 'none'}")


def choices_of(value: object, field: str) -> list[str]:
    """Answers to choose from: texts, none of them empty, no two of them equal; raises BadRow."""
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise BadRow(f'"{field}" is no list of texts', f"it is {value!r}"[:60])
    if len(value) < 2:
        raise BadRow(f'fewer than 2 answers in "{field}"')
    for number, choice in enumerate(value):
        if not choice.strip():
            raise BadRow(f'an empty answer in "{field}"', f"number {number}, counted from 0")
        if choice in value[:number]:
            raise BadRow(f'the same answer twice in "{field}"', repr(choice)[:60])
    return [_whole(choice, field) for choice in value]


def index_of(row: Row, field: str, count: int) -> int:
    """The number of the right answer, counted from 0, a number or its text; raises BadRow if out of range."""
    value = row.get(field)
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise missing(row, field, "whole number")
    if not 0 <= value < count:
        raise BadRow(f'"{field}" is out of range', f"{value}, and the {count} answers are 0 to {count - 1}")
    return value


def _whole(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f'"{field}" is not valid Unicode', "a lone surrogate") from None
    return text
