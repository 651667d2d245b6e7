"""Figures {mean, ci95: [low, high], n} and tables as Markdown; what is not known (None) says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a line for every row; the cells are flattened to one line each."""
    lines = [head, ["---"] * len(head), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(text: str) -> str:
    """Text that stays inside one table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def number(value: float | None, form: str) -> str:
    """A number in a format."""
    return "unknown" if value is None else f"{value:{form}}"


def value(figure: Figure, form: str) -> tuple[str, str]:
    """A figure and its interval, as two cells."""
    ends = figure["ci95"]
    nothing = "unknown" if figure["mean"] is None else "no interval"
    interval = nothing if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"
    return number(figure["mean"], form), interval


def plain(figure: Figure, form: str) -> str:
    """A figure and its interval, where it has one, in running text."""
    return _together(figure, value(figure, form))


def share(figure: Figure) -> tuple[str, str]:
    """A share in per cent and its interval, as two cells."""
    mean, ends = value(_hundredfold(figure), ".1f")
    return (mean if figure["mean"] is None else f"{mean}%"), ends


def percent(figure: Figure) -> str:
    """A share in per cent and its interval, where it has one, in running text."""
    return _together(figure, share(figure))


def points(figure: Figure) -> str:
    """A difference of shares in percentage points, with its sign, in running text."""
    return f"{plain(_hundredfold(figure), '+.1f')} points"


def _together(figure: Figure, cells: tuple[str, str]) -> str:
    return cells[0] if figure["ci95"] is None else " ".join(cells)


def _hundredfold(figure: Figure) -> Figure:
    mean, ends = figure["mean"], figure["ci95"]
    return {
        "mean": None if mean is None else 100 * mean,
        "ci95": None if ends is None else [100 * end for end in ends],
    }
