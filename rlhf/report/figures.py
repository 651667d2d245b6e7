"""Plots as SVG that stands inside a page: its colors are the page's, so that they change with its scheme."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rlhf.stats.intervals import mean_interval

SERIES = 8  # colors of the page
_INK, _GRID = "#010203", "#040506"
_COLORS = [f"#0a0b0{n}" for n in range(SERIES)]
_PAGE = {_INK: "currentColor", _GRID: "var(--line)"} | {
    color: f"var(--series-{n})" for n, color in enumerate(_COLORS)
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "axes.axisbelow": True,
}
_POINTS = 400  # of a curve


class Curve(NamedTuple):
    """A named line: one run, or several seeds of the same recipe."""

    name: str
    runs: list[list[tuple[float, float]]]
    """Points (x, y) of each run."""
    color: int = 0


class Band(NamedTuple):
    """A named line with intervals: (x, mean, low, high)."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    color: int = 0


class Dot(NamedTuple):
    """A figure with its interval, on a line of its own."""

    label: str
    mean: float
    ends: Sequence[float] | None
    color: int = 0


def over_seeds(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """(x, mean, low, high) at every x that all runs have; 95% by Student's t, NaN ends for a single run."""
    by_x = [dict(run) for run in runs]
    shared = sorted(set.intersection(*map(set, by_x))) if by_x else []
    found = []
    for x in shared:
        y = mean_interval([run[x] for run in by_x])
        found.append((x, y.mean, y.low, y.high))
    return found


def thinned(points: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """At most some hundred points: means of neighbors where there are more."""
    if len(points) <= _POINTS:
        return list(points)
    groups = np.array_split(np.array(points, dtype=float), _POINTS)
    return [tuple(group.mean(axis=0).tolist()) for group in groups]


def curves(key: str, title: str, lines: Sequence[Curve]) -> str:
    """Lines over steps, a band over the seeds of a recipe."""
    with plt.rc_context(_STYLE):
        figure, ax = _axes(4.2, 2.5)
        for line in lines:
            points = thinned(over_seeds(line.runs))
            if not points:
                continue
            xs, mean, low, high = (list(column) for column in zip(*points, strict=True))
            color = _COLORS[line.color % SERIES]
            ax.plot(xs, mean, color=color, linewidth=1.6, label=_label(line.name),
                    marker="o" if len(points) < 3 else None, markersize=3)  # fmt: skip
            if not all(map(math.isnan, low)):
                ax.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
        ax.set_xlabel("step")
        if len(lines) > 1:
            ax.legend(fontsize=8)
        return _svg(figure, key, title)


def bands(key: str, title: str, lines: Sequence[Band], *, mark: float | None = None) -> str:
    """Lines over steps with their intervals and a line at 0; a dashed one where something begins."""
    with plt.rc_context(_STYLE):
        figure, ax = _axes(4.2, 2.5)
        ax.axhline(0, color=_INK, linewidth=0.8)
        for line in lines:
            x, mean, low, high = zip(*line.points, strict=True)
            color = _COLORS[line.color % SERIES]
            ax.plot(x, mean, color=color, linewidth=1.6, label=_label(line.name))
            ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        if mark is not None:
            ax.axvline(mark, color=_INK, linewidth=1, linestyle="--", label=f"over-optimized from {mark:g}")
        ax.set_xlabel("step")
        if len(lines) > 1 or mark is not None:
            ax.legend(fontsize=8)
        return _svg(figure, key, title)


def reliability(key: str, title: str, models: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> str:
    """Predicted against observed share of pairs, a line a model, the diagonal for a calibrated one."""
    with plt.rc_context(_STYLE):
        figure, ax = _axes(4.2, 3.2)
        ax.plot([0.5, 1], [0.5, 1], color=_INK, linewidth=0.8, linestyle="--", label="calibrated")
        for number, (name, bins) in enumerate(models):
            color, known = _COLORS[number % SERIES], [b for b in bins if b["mean"] is not None]
            for found in known:
                if found["ci95"]:
                    ax.plot([found["predicted"]] * 2, found["ci95"], color=color, linewidth=1.2)
            ax.plot([b["predicted"] for b in known], [b["mean"] for b in known], "o-", color=color,
                    markersize=4, linewidth=1.2, label=_label(name))  # fmt: skip
        ax.set_xlabel("predicted probability that the preferred one is better")
        ax.set_ylabel("observed share")
        ax.legend(fontsize=8)
        return _svg(figure, key, title)


def scatter(
    key: str, title: str, groups: Sequence[tuple[str, list[float], list[float]]], x: str, y: str
) -> str:
    """Points (proxy, judge), a color a group."""
    with plt.rc_context(_STYLE):
        figure, ax = _axes(4.2, 3.2)
        for number, (name, xs, ys) in enumerate(groups):
            ax.plot(xs, ys, "o", color=_COLORS[number % SERIES], markersize=3, alpha=0.7, label=_label(name))
        ax.set_xlabel(_label(x))
        ax.set_ylabel(_label(y))
        ax.legend(fontsize=8)
        return _svg(figure, key, title)


def dots(key: str, title: str, rows: Sequence[Dot], *, zero: bool = True, x: str = "") -> str:
    """Figures with intervals below each other."""
    with plt.rc_context(_STYLE):
        figure, ax = _axes(5.2, 0.9 + 0.24 * len(rows))
        for number, row in enumerate(rows):
            color = _COLORS[row.color % SERIES]
            if row.ends:
                ax.plot(row.ends, [number] * 2, color=color, linewidth=2)
            ax.plot([row.mean], [number], "o", color=color, markersize=5)
        if zero:
            ax.axvline(0, color=_INK, linewidth=0.8)
        ax.set_yticks(range(len(rows)), [_label(row.label) for row in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel(x)
        return _svg(figure, key, title)


def bars(key: str, title: str, rows: Sequence[tuple[str, float, int]], x: str) -> str:
    """Horizontal bars (label, length, color)."""
    with plt.rc_context(_STYLE):
        figure, ax = _axes(5.2, 0.9 + 0.24 * len(rows))
        ax.barh(range(len(rows)), [length for _, length, _ in rows], height=0.7,
                color=[_COLORS[color % SERIES] for *_, color in rows])  # fmt: skip
        ax.set_yticks(range(len(rows)), [_label(name) for name, *_ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel(x)
        return _svg(figure, key, title)


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    return plt.subplots(figsize=(width, height), layout="constrained")


def _label(text: str) -> str:
    """A text that matplotlib does not read as a formula, of bearable length."""
    short = text if len(text) <= 40 else f"{text[:37]}..."
    return "".join(c if c.isprintable() else "\ufffd" for c in short).replace("$", r"\$")


def _svg(figure: Figure, key: str, title: str) -> str:
    """The figure as an element of a page: no prolog, names of its own, the page's colors, any width."""
    out = io.StringIO()
    with plt.rc_context({"svg.hashsalt": key}):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=none)
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for color, name in _PAGE.items():
        text = text.replace(color, name)
    return f'<svg role="img" aria-label="{html.escape(title)}"' + text[len("<svg") :]
