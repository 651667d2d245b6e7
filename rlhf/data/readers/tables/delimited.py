"""The rows of a .csv or .tsv file: delimiter, quotes and header are found out from the file.

- Delimiter: a tab where the name ends in .tsv, or the header has one and no comma; a semicolon where the
  header has one and neither comma nor tab; else a comma.
- Quotes: around cells, doubled within. Between tabs a quote may be a character like others: behind a header
  that begins with #, and where that reading gives fewer broken rows, or as many and more rows.
- Header: the first row, unless it has two cells or more, each of three words or more (in a file called
  util_*: one of them). The columns of a table without a header are named by their place: "1", "2", ...
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.data.readers.rows import BadRow
from rlhf.errors import UserError

Lines = Callable[[], Iterator[tuple[int, str]]]
_ROW_LINES = 100_000  # lines that a row may span; a quote that is not closed spans all


class _NoEnd(UserError):
    """A quote that is not closed."""


def rows(path: Path, lines: Lines, *, tabs: bool, limit: int) -> Iterator[tuple[int, object]]:
    """The rows with the line on which each starts; a broken one is a BadRow.

    Args:
        path: the file, named in messages.
        lines: gives its numbered lines, from the first, whenever it is called.
        tabs: whether the name of the file says that tabs are between the cells.
        limit: bytes of the longest row.
    """
    csv.field_size_limit(limit // 4)  # the default is shorter than some dialogues; four bytes a character
    header: list[str] | None = None
    for start, cells in _records(path, lines, _dialect(path, lines, tabs)):
        if isinstance(cells, csv.Error):
            yield start, BadRow("not valid CSV", str(cells))
        elif header is None:
            header = cells
            if _is_text_only(cells, any if path.name.startswith("util_") else all):
                header = [str(place) for place in range(1, len(cells) + 1)]
                yield start, dict(zip(header, cells, strict=True))
        elif len(cells) == len(header):
            yield start, dict(zip(header, cells, strict=True))
        elif cells:
            yield start, BadRow("not as many cells as the header", f"{len(cells)} instead of {len(header)}")


def _records(
    path: Path, lines: Lines, dialect: dict[str, Any]
) -> Iterator[tuple[int, list[str] | csv.Error]]:
    start = 1

    def bounded() -> Iterator[str]:
        for number, line in lines():
            if number - start > _ROW_LINES:
                raise _NoEnd(f"{path}:{start}: the row has no end within {_ROW_LINES} lines; close its quote")
            yield line

    reader = csv.reader(bounded(), strict=True, **dialect)
    while True:
        start = reader.line_num + 1  # a quoted cell may span lines
        try:
            yield start, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, error


def _dialect(path: Path, lines: Lines, tabs: bool) -> dict[str, Any]:
    header = next(lines(), (1, ""))[1]
    if tabs or ("\t" in header and "," not in header):
        bare = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        if header.startswith("#") or not any('"' in line for _, line in lines()):
            return bare
        quoted = {"delimiter": "\t", "quoting": csv.QUOTE_MINIMAL}
        return bare if _merit(path, lines, bare) > _merit(path, lines, quoted) else quoted
    return {"delimiter": ";" if ";" in header and "," not in header else ",", "quoting": csv.QUOTE_MINIMAL}


def _merit(path: Path, lines: Lines, dialect: dict[str, Any]) -> tuple[int, int]:
    """How well a dialect reads a file: minus the broken rows, and the whole ones."""
    width, broken, whole = 0, 0, 0
    try:
        for _, cells in _records(path, lines, dialect):
            width = width or (0 if isinstance(cells, csv.Error) else len(cells))
            good = not isinstance(cells, csv.Error) and len(cells) in (0, width)
            whole, broken = whole + good, broken + (not good)
    except _NoEnd:
        broken += 1
    return -broken, whole


def _is_text_only(cells: list[str], how_many: Callable[[Iterator[bool]], bool]) -> bool:
    return len(cells) > 1 and how_many(len(cell.split()) >= 3 for cell in cells)
