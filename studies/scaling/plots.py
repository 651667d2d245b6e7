"""The plots of the study, figures against N."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter

from studies.engine.plots import level, line, panels
from studies.engine.results import Results
from studies.scaling import objectives
from studies.scaling.claims import GONE
from studies.scaling.data.items import TASKS
from studies.scaling.figures import LOSS, WORD, Figure, Study
from studies.scaling.plan import ARMS, BASE, PPO
from studies.scaling.report import PLOTS


def canvases(study: Study, rows: Results | None) -> dict[str, Any]:
    """Every plot by its file name."""
    made = {1: _objectives(rows)} if rows else {}
    made |= {5: _distillation(study), 6: _tax(study), 19: _inverse(study)}
    return {PLOTS[number][0]: canvas for number, canvas in made.items()}


def _objectives(rows: Results) -> Any:
    canvas, axes = panels(1, 1, width=5)
    for data in (objectives.RANKED, objectives.BINARY):
        _draw(axes[0][0], objectives.gap(rows, data), f"{data} pairs")
    _finish(axes[0][0], "preference model less imitation", "share right", at=0.0)
    return canvas


def _distillation(study: Study) -> Any:
    canvas, axes = panels(1, 1, width=5)
    _draw(axes[0][0], study.distillation("kl_recovered"), "KL that is gone")
    _draw(axes[0][0], study.distillation("log_prob_recovered"), "log-prob that is recovered")
    _finish(axes[0][0], "context distillation", "share", at=GONE)
    return canvas


def _tax(study: Study) -> Any:
    canvas, axes = panels(1, 2, width=4.75)
    for ax, measure, unit in zip(axes[0], (LOSS, WORD), ("nats a byte", "share of last words"), strict=True):
        for arm in ARMS:
            if arm != BASE:
                _draw(ax, study.tax(measure, arm), arm)
        _finish(ax, f"tax on {measure[0]}", unit, at=0.0)
    return canvas


def _inverse(study: Study) -> Any:
    canvas, axes = panels(1, len(TASKS), width=3.6, shared=True)
    for ax, task in zip(axes[0], TASKS, strict=True):
        for arm in (BASE, PPO):
            _draw(ax, study.level(task, "acc", arm), arm)
        _finish(ax, task, "share right", at=0.5)
    return canvas


def _draw(ax: Any, figure: Figure, label: str) -> None:
    """A figure's rungs with their intervals, and the fitted line where there is one."""
    x = [rung.size for rung in figure.rungs]
    estimates, trend = figure.estimates, figure.trend
    color = line(ax, x, estimates, label, linestyle="").get_color()
    if trend is None:
        ax.plot(x, [e.mean for e in estimates], color=color, linewidth=0.7)
    else:
        ends = [x[0], x[-1]]
        ax.plot(ends, trend.intercept + trend.slope.mean * np.log(ends), color=color, linewidth=1)


def _finish(ax: Any, title: str, unit: str, *, at: float) -> None:
    """Title, axes, and the value ``at`` which the figures are held against."""
    ax.margins(x=0.15)
    level(ax, at)
    ax.set(xscale="log", xlabel="N", ylabel=unit, title=title)
    ax.xaxis.set_minor_formatter(NullFormatter())  # their labels would stand on each other
    ax.legend(fontsize=7)
