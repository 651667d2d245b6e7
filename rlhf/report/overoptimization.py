"""The verdict on over-optimization on a run's page: in words, both scores and their gap over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.report import figures
from rlhf.report.blocks import Block
from rlhf.report.gather import Run
from rlhf.stats.intervals import Z95
from rlhf.stats.overoptimization import WINDOW, series, verdict

_NAMES = {"proxy": "reward model", "test": "test model", "gap": "gap"}


def verdict_of(run: Run) -> dict[str, Any] | None:
    """The verdict on a run's PPO as far as it is, None without one or where its log makes no sense."""
    made = run.stages.get("ppo")
    if made is None or not made.metrics:
        return None
    try:
        return verdict(made.metrics, _steps(run), made.results.get("kept_step"))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def notices(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """What has to be read before anything else: runs in which the reward seems to be exploited."""
    found = [(run, verdict_of(run)) for run in runs]
    loud = ("over-optimized", "signs of a collapse")
    return [(run, each["text"]) for run, each in found if each and each["verdict"] in loud]


def overoptimized(runs: Sequence[Run]) -> list[Block]:
    """The section of the page."""
    blocks = []
    for n, run in enumerate(runs):
        found = verdict_of(run)
        if found is None:
            continue
        name = "" if len(runs) == 1 else f"{run.name}: "
        blocks.append(Block(text=f"{name}{found['text']}"))
        if "gap" not in found:
            continue
        sources = [(run, "ppo/metrics.jsonl")]
        for title, sides in (
            ("Rise of both scores, standard deviations of the start", ("proxy", "test")),
            ("Gap: the reward model's rise less the test model's", ("gap",)),
        ):
            lines = [
                figures.Band(_NAMES[side], _smooth(run, side), color) for color, side in enumerate(sides)
            ]
            svg = figures.bands(f"over-{n}-{sides[0]}", title, lines, mark=found["onset"])
            blocks.append(Block(f"{name}{title}; 95% bands", sources, svg=svg))
    return blocks or [Block(text="No log of PPO.")]


def _steps(run: Run) -> int:
    planned = (run.recipe.get("ppo") or {}).get("steps")
    return planned if isinstance(planned, int) and planned > 0 else len(run.stages["ppo"].metrics)


def _smooth(run: Run, side: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) over the windows around each one."""
    of = series(run.stages["ppo"].metrics, side, _steps(run))
    found = []
    for n, step in enumerate(of.step_N):
        around = slice(max(0, n - WINDOW // 2), n + WINDOW // 2 + 1)
        mean, errors = float(of.value_N[around].mean()), of.error_N[around]
        half = Z95 * math.sqrt(float(np.square(errors).sum())) / len(errors)
        found.append((float(step), mean, mean - half, mean + half))
    return found
