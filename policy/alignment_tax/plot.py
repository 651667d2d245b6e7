"""The picture of the tax table: what every variant gained or lost against the reference, task by task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from rlhf.markdown import number

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_INCH_A_VARIANT, _INCH_A_TASK = 0.22, 0.75


def draw(table: dict[str, Any], file: Path) -> None:
    """Write a PNG: a panel a task with its own unit, a color a variant, gains with their 95% intervals.

    Args:
        table: as written to ``tax.json``.
        file: where to.
    """
    tasks = [task for task in table["tasks"] if task["differences"]]
    variants = list(dict.fromkeys(variant for task in tasks for variant in task["differences"]))
    colors = dict(zip(variants, [f"C{number % 10}" for number in range(len(variants))], strict=True))
    heights = [_INCH_A_TASK + _INCH_A_VARIANT * len(task["differences"]) for task in tasks]
    figure, axes = plt.subplots(
        len(tasks),
        1,
        figsize=(7.5, sum(heights) + 0.6),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for ax, task in zip(axes[:, 0], tasks, strict=True):
        _panel(ax, task, colors)
    figure.suptitle(f"{table['name']}: gain over {table['reference']} (right = better), 95% intervals")
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _panel(ax: Any, task: dict[str, Any], colors: dict[str, Any]) -> None:
    shown = task["differences"]
    for row, (variant, found) in enumerate(shown.items()):
        gain, ends = found["gain"], found["gain_ci95"]
        if gain is None:
            continue
        if ends is not None:
            ax.plot(ends, [row, row], color=colors[variant], linewidth=2)
        ax.plot([gain], [row], "o", color=colors[variant], markersize=5)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(shown)), list(shown), fontsize=8)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.tick_params(axis="x", labelsize=8)
    sign = "" if task["higher_is_better"] else ", sign turned"
    chance = "" if task["chance"] is None else f", chance {number(task['chance'], '.3f')}"
    ax.set_title(
        f"{task['task']}: {task['metric']}{sign} (n = {task['items']}{chance})", fontsize=9, loc="left"
    )
