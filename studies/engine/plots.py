"""Lines with intervals, and the files of plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from rlhf.stats.intervals import Estimate

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def panels(rows: int, columns: int, *, width: float, height: float = 3.8, shared: bool = False) -> Any:
    """A canvas and its panels [rows, columns]; width and height of a panel in inches."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, sharey=shared, squeeze=False)


def line(ax: Any, x: Sequence[float], estimates: Sequence[Estimate], label: str, **style: Any) -> Any:
    """Means with their intervals; no bar where an interval is not known. Returns the line."""
    y = [e.mean for e in estimates]
    error = [[_length(e.mean - e.low) for e in estimates], [_length(e.high - e.mean) for e in estimates]]
    look = {"marker": "o", "markersize": 3, "linewidth": 1.2, "elinewidth": 0.7, "capsize": 2} | style
    return ax.errorbar(x, y, yerr=error, label=label, **look)[0]


def level(ax: Any, y: float, **options: Any) -> None:
    """A thin gray line at a value."""
    ax.axhline(y, color="gray", linewidth=0.7, **options)


def save(canvases: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every canvas under its file name; returns the files."""
    files = []
    for name, canvas in canvases.items():
        canvas.tight_layout()
        files.append(folder / name)
        canvas.savefig(files[-1], dpi=110, metadata={"Software": None})
        plt.close(canvas)
    return files


def _length(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else 0.0
