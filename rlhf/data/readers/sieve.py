"""The sieve: rows to items by the readers of their formats, all counted; it obeys ``on_bad_rows``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rlhf.data.comparisons import Counts, OnBadRows
from rlhf.data.readers.columns import is_empty
from rlhf.data.readers.rows import BadRow, LeftOut, Origin, Reader, Row, WholeFile
from rlhf.data.readers.tables.cells import with_lists
from rlhf.errors import UserError

T = TypeVar("T")
SKIP = "set data.on_bad_rows=skip to leave such rows out and count them"
"""What to do about a bad row; who never skips them replaces it."""


def sift(
    origin: Origin,
    readers: Sequence[Reader[T]],
    problem: Callable[[T], str | None],
    on_bad_rows: OnBadRows,
    counts: Counts,
) -> Iterator[T]:
    """The usable items of an origin; every item is counted in ``counts``.

    "stop" raises UserError at the first bad row or item. "skip" counts it and goes on; but an origin of
    whose rows none is recognized is a mistake in the recipe and raises UserError in both cases. What a
    reader leaves out by rule (:class:`LeftOut`) is counted in both cases.
    """
    recognized = False
    unrecognized = ""
    gathered: dict[Hashable, tuple[str, Reader[T], list[Row]]] = {}
    for number, row in _numbered(origin):
        where = origin.where(number)
        try:
            reader = _reader(row, readers)
            if reader is None:
                if empty := _empty_columns(row, readers):
                    raise BadRow("a column is empty", empty)
                unknown = BadRow("fields of no known format", _fields_and_formats(row, readers))
                unrecognized = unrecognized or f"{where}: {unknown}"
                if on_bad_rows == "stop" and not recognized:  # the file is wrong, skipping would not help
                    raise UserError(unrecognized)
                raise unknown
            recognized = True
            fields: Row = row  # type: ignore[assignment]
            if reader.together is not None:
                key = (reader.format, reader.together(fields))
                gathered.setdefault(key, (where, reader, []))[2].append(fields)
                continue
        except BadRow as error:
            _count_bad(error, where, on_bad_rows, counts)
            continue
        yield from _usable(reader, [fields], origin.source, where, problem, on_bad_rows, counts)
    for where, reader, rows in gathered.values():
        yield from _usable(reader, rows, origin.source, where, problem, on_bad_rows, counts)
    if unrecognized and not recognized:
        raise UserError(unrecognized)


def _usable(
    reader: Reader[T],
    rows: Sequence[Row],
    source: str,
    where: str,
    problem: Callable[[T], str | None],
    on_bad_rows: OnBadRows,
    counts: Counts,
) -> Iterator[T]:
    """The usable items of rows that are read as one."""
    watched = [_Watched(row) for row in rows]
    try:
        given = watched[0] if reader.together is None else {"rows": watched}
        items = list(reader.parse(given, source))
    except BadRow as error:
        _count_bad(error, where, on_bad_rows, counts)
        return
    for row in watched:
        counts.note_unused(str(name) for name in row.unused())
    for item in items:
        counts.read += 1
        if isinstance(item, LeftOut):
            counts.drop(item.reason)
        elif reason := problem(item):
            _refuse(reason, reason, where, on_bad_rows, counts)
        else:
            yield item


def _count_bad(error: BadRow, where: str, on_bad_rows: OnBadRows, counts: Counts) -> None:
    """Count what was to be an item."""
    counts.read += 1
    if isinstance(error, WholeFile):
        raise UserError(f"{where}: {error}")
    if isinstance(error, LeftOut):
        counts.drop(error.reason)
    else:
        place = where if error.column is None else f"{where}:{error.column}"
        _refuse(error.reason, str(error), place, on_bad_rows, counts)


def _numbered(origin: Origin) -> Iterator[tuple[int, object]]:
    """The rows, a list of rows as {"rows": ...}.

    A row of the hub that its library cannot read, for one of dozens of reasons, is one line.
    """
    number = 0
    try:
        for number, row in with_lists(origin).rows:
            listed = isinstance(row, list) and row and all(isinstance(x, Mapping) for x in row)
            yield number, {"rows": row} if listed else row
    except Exception as error:
        if not origin.name.startswith("hub:") or isinstance(error, UserError | BadRow):
            raise
        cause = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{origin.where(number + 1)}: cannot be read ({type(error).__name__}: {cause}); "
            "download the set, mend it and give local files"
        ) from None


def _refuse(reason: str, message: str, where: str, on_bad_rows: OnBadRows, counts: Counts) -> None:
    if on_bad_rows == "stop":
        raise UserError(f"{where}: {message}; {SKIP}")
    counts.drop(reason)


def _reader(row: object, readers: Sequence[Reader[T]]) -> Reader[T] | None:
    if isinstance(row, BadRow):  # the file reader could not make a row of it, and did not want to stop
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("not a row with fields", f"a {type(row).__name__}")
    found = next((reader for reader in readers if reader.recognizes(row)), None)
    if not found and row.keys() == {"rows"}:
        raise BadRow("not a row with fields", "a list")
    if not found and (fault := next(filter(None, (reader.nearly(row) for reader in readers)), None)):
        raise fault
    return found


def _empty_columns(row: object, readers: Sequence[Reader[T]]) -> str:
    """The empty columns of a row that would be of a known format if they held something, else nothing."""
    empty = [name for name, value in row.items() if is_empty(value)] if isinstance(row, Mapping) else []
    filled = dict(row) | dict.fromkeys(empty, "1") if isinstance(row, Mapping) else {}
    known = empty and any(reader.recognizes(filled) for reader in readers)
    return ", ".join(map(str, empty[:5])) if known else ""


class _Watched(dict[str, Any]):
    """A row that knows which columns have been asked for."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[name] if name in self else default  # noqa: SIM401 - this is get()

    def unused(self) -> list[str]:
        """Columns that hold something and have not been asked for."""
        return [name for name, value in self.items() if name not in self.used and value not in (None, "", [])]


def _fields_and_formats(row: object, readers: Sequence[Reader[T]]) -> str:
    """The fields of a row, the format whose quoted names are most like them, and how to name columns."""
    fields = sorted(map(str, row)) if isinstance(row, Mapping) else []
    best = max(readers, key=lambda reader: _nearness(fields, reader.format))
    near = f"nearest: {best.format}; " if _nearness(fields, best.format) else ""
    shown = ", ".join(fields[:20]) + (", ..." if len(fields) > 20 else "")
    hint = max(_HINTS, key=lambda hint: _nearness(fields, hint))
    return (
        f"{shown or 'no field'}; {near}columns of comparisons are named by "
        f"data.columns={_HINTS[hint]}, the formats stand in docs/guide.md"
    )


_HINTS = {
    '{"prompt", "chosen", "rejected"}': "{prompt: ..., chosen: ..., rejected: ...}",
    '{"prompt", "response_a", "response_b", "winner"} or {"prompt", "response1", "response2", "label"}': (
        "{prompt: ..., response_a: ..., response_b: ..., winner: ...}"
    ),
    '{"prompt", "response_a", "response_b", "score_a", "score_b"} or {"prompt", "responses", "scores"}': (
        "{prompt: ..., responses: [..., ...], scores: [..., ...]}"
    ),
    '{"prompt", "response", "score"}': "{prompt: ..., response: ..., score: ...}",
}  # what most files are like, and how their columns are named; the first where none is near


def _nearness(fields: Sequence[str], form: str) -> float:
    """How like the best of a format's {...} is to the fields: the mean over its names, in [0, 1)."""

    def like(name: str) -> float:
        ratios = (difflib.SequenceMatcher(None, name.lower(), x[:60].lower()).ratio() for x in fields[:50])
        best = max(ratios, default=0.0)
        return best if best >= 0.7 else 0.0

    groups = [re.findall(r'"([^"]+)"', part) for part in re.findall(r"{[^{}]*", form)]
    # of two that are there in full, the one with more names
    return max((sum(map(like, names)) / (len(names) + 0.5) for names in groups if names), default=0.0)
