"""Columns under the names that the recipe gives them (``data.columns``), before a format is recognized.

{prompt: question, chosen: good, rejected: bad} renames three columns; a list of columns becomes one list:
{responses: [answer 1, answer 2], scores: [grade 1, grade 2]}. Any field of a known format can be named, so
{better_response_id: safer_response_id} reads PKU-SafeRLHF by safety. All other columns stay as they are. A
verdict that names a column by the name that it has in the file names that column.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rlhf.data.readers.columns import VERDICTS
from rlhf.data.readers.rows import BadRow, Origin
from rlhf.errors import UserError

Columns = Mapping[str, str | list[str]]
KEY = "data.columns"  # in messages, also of other keys that hold columns (:func:`key_of`)


def key_of(files: str) -> str:
    """The recipe's key of the columns that belong to the files of a key."""
    if files == "card.comparisons":
        return "card.columns"
    return f"{files}.columns" if files.startswith("pmp.sources[") else KEY


def renamed(origin: Origin, columns: Columns) -> Origin:
    """The origin with its columns renamed.

    Raises UserError for a column that the first row does not have, with the nearest ones; a later row that
    lacks one is a bad row.
    """
    return replace(origin, rows=_rows(origin, columns)) if columns else origin


def _rows(origin: Origin, columns: Columns) -> Iterator[tuple[int, object]]:
    words = {
        of.lower(): name
        for name, of in columns.items()
        if isinstance(of, str) and name not in (*VERDICTS, "prompt", "group", "confidence")
    }
    wanted = {x for of in columns.values() for x in ([of] if isinstance(of, str) else of)}
    first = True
    for number, row in origin.rows:
        if not isinstance(row, Mapping):
            yield number, row
            continue
        if absent := sorted(wanted - row.keys()):
            fault = f"no column {absent[0]!r}, {_nearest(absent[0], row)}"
            if first:
                raise UserError(f"{origin.where(number)}: {fault}; mend {KEY}")
            yield number, BadRow("a column that the recipe names is not there", fault)
            continue
        first = False
        given = {
            name: row[of] if isinstance(of, str) else [row[x] for x in of] for name, of in columns.items()
        }
        whole = {name: x for name, x in row.items() if name not in wanted} | given
        for name in VERDICTS:
            if name in whole and ("rejected" not in whole or name != "chosen"):
                whole[name] = _reworded(whole[name], words)
        yield number, whole


def _reworded(verdict: object, words: Mapping[str, str]) -> object:
    """A verdict, or several, in the new names of columns."""
    if isinstance(verdict, list):
        return [_reworded(x, words) for x in verdict]
    return words.get(verdict.strip().lower(), verdict) if isinstance(verdict, str) else verdict


def _nearest(name: str, row: Mapping[str, Any]) -> str:
    names = list(map(str, row))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(names[:20])}"
