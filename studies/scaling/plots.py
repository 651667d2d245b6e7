"""The plots of the study, figures against N; the only file of it that knows matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from studies.scaling import objectives
from studies.scaling.claims import GONE
from studies.scaling.data.items import TASKS
from studies.scaling.figures import LOSS, WORD, Figure, Study
from studies.scaling.plan import ARMS, BASE, PPO
from studies.scaling.report import PLOTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter


def draw_all(study: Study, rows: objectives.Rows, folder: Path) -> list[Path]:
    """Write every plot; returns the files."""
    made: dict[int, Any] = {5: _distillation(study), 6: _tax(study), 19: _inverse(study)}
    if rows:
        made[1] = _objectives(rows)
    files = []
    for number, figure in sorted(made.items()):
        figure.tight_layout()
        files.append(folder / PLOTS[number][0])
        figure.savefig(files[-1], dpi=110, metadata={"Software": None})
        plt.close(figure)
    return files


def _objectives(rows: objectives.Rows) -> Any:
    canvas, ax = plt.subplots(figsize=(5, 3.8))
    for data in (objectives.RANKED, objectives.BINARY):
        _line(ax, objectives.gap(rows, data), f"{data} pairs")
    _finish(ax, "preference model less imitation", "share right", zero=True)
    return canvas


def _distillation(study: Study) -> Any:
    canvas, ax = plt.subplots(figsize=(5, 3.8))
    _line(ax, study.distillation("kl_recovered"), "KL that is gone")
    _line(ax, study.distillation("log_prob_recovered"), "log-prob that is recovered")
    ax.axhline(GONE, color="grey", linewidth=0.7)
    _finish(ax, "context distillation", "share")
    return canvas


def _tax(study: Study) -> Any:
    canvas, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for ax, measure, unit in zip(axes, (LOSS, WORD), ("nats a byte", "share of last words"), strict=True):
        for arm in ARMS:
            if arm != BASE:
                _line(ax, study.tax(measure, arm), arm)
        _finish(ax, f"tax on {measure[0]}", unit, zero=True)
    return canvas


def _inverse(study: Study) -> Any:
    canvas, axes = plt.subplots(1, len(TASKS), figsize=(3.6 * len(TASKS), 3.8), sharey=True)
    for ax, task in zip(axes, TASKS, strict=True):
        for arm in (BASE, PPO):
            _line(ax, study.level(task, "acc", arm), arm)
        ax.axhline(0.5, color="grey", linewidth=0.7)
        _finish(ax, task, "share right")
    return canvas


def _line(ax: Any, figure: Figure, label: str) -> None:
    """A figure's rungs with their intervals, and the fitted line where there is one."""
    x = [rung.size for rung in figure.rungs]
    estimates = figure.estimates
    y = [e.mean for e in estimates]
    error = [_lengths([e.mean - e.low for e in estimates]), _lengths([e.high - e.mean for e in estimates])]
    (line, *_) = ax.errorbar(x, y, yerr=error, marker="o", markersize=3, linestyle="", capsize=2, label=label)
    trend = figure.trend
    if trend is None:
        ax.plot(x, y, color=line.get_color(), linewidth=0.7)
    else:
        ends = np.log([x[0], x[-1]])
        ax.plot([x[0], x[-1]], trend.intercept + trend.slope.mean * ends, color=line.get_color(), linewidth=1)


def _lengths(values: Sequence[float]) -> list[float]:
    """Lengths of error bars; none where an interval is not known."""
    return [max(0.0, v) if np.isfinite(v) else 0.0 for v in values]


def _finish(ax: Any, title: str, unit: str, *, zero: bool = False) -> None:
    ax.margins(x=0.15)
    if zero:
        ax.axhline(0.0, color="grey", linewidth=0.7)
    ax.set(xscale="log", xlabel="N", ylabel=unit, title=title)
    ax.xaxis.set_minor_formatter(NullFormatter())  # their labels would stand on each other
    ax.legend(fontsize=7)
