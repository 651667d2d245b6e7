"""The curves of an arm, and figures of it that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlhf.stats.intervals import AT_LEAST_0, SHARE, UNBOUNDED, Estimate
from studies.engine.results import Results
from studies.engine.seeds import SeedMean, over_seeds
from studies.ppo.fits import Floats, at_kl, smooth

GOLD, KL = "gold", "kl"
BOUNDS = {GOLD: (-1.0, 1.0), KL: AT_LEAST_0, "eos": SHARE, "distinct_2": SHARE}
"""Of columns; the gold score is VADER's."""
LAST = 0.1  # share of the steps that an arm's end is
Run = dict[str, Any]


class Curves:
    """The finished policies and best of n of a study, seed by seed."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.seeds: list[int] = results.values("policy", "seed")
        self.arms: list[str] = list(
            dict.fromkeys(u.settings["arm"] for u in results.units if u.kind == "policy")
        )

    def runs(self, arm: str) -> list[Run]:
        """The results of an arm, one a seed."""
        return self.results.by_seed("policy", arm=arm)

    def over(self, arm: str, of: Callable[[Run], float]) -> Estimate:
        """A figure of an arm over the seeds."""
        return estimate([of(run) for run in self.runs(arm)])

    def at_end(self, arm: str, name: str) -> Estimate:
        """A column at the end of an arm, its interval cut at the column's bounds."""
        return self.over(arm, end(name)).cut(BOUNDS.get(name, UNBOUNDED))

    def less(self, arm: str, other: str, of: Callable[[Run], float]) -> Estimate:
        """The same less that of another arm, paired by seed."""
        pairs = zip(self.runs(arm), self.runs(other), strict=True)
        return estimate([of(one) - of(two) for one, two in pairs])

    def at_equal_kl(self, arm: str, other: str) -> Estimate:
        """Gold score at the end of an arm less that of another where it has the same KL, or, where it never
        gets as far, the other's at its end less the arm's where that has its KL."""
        return estimate([_at_equal_kl(*pair) for pair in zip(self.runs(arm), self.runs(other), strict=True)])

    def base(self, run: int) -> float:
        """Mean gold score of the rung itself, of the seed with this number."""
        return float(self.results.by_seed("pairs", closed=False)[run]["gold"])


def estimate(values: Sequence[float]) -> Estimate:
    """Over the seeds that have a value; no interval with fewer than two."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return Estimate(known[0] if known else math.nan, math.nan, math.nan, len(known))
    return over_seeds([SeedMean(value, 0.0) for value in known])


def known_mean(values: ArrayLike) -> float:
    """Mean of what is known; NaN where nothing is."""
    every = np.asarray(values, dtype=np.float64)
    known = every[~np.isnan(every)]
    return float(known.mean()) if known.size else math.nan


def column(run: Run, name: str) -> Floats:
    """A column of a run's steps; NaN where a step has none."""
    return np.array([math.nan if x is None else x for x in run["steps"][name]], dtype=np.float64)


def end(name: str) -> Callable[[Run], float]:
    """Mean of a column over the last tenth of the steps."""
    return lambda run: known_mean(column(run, name)[-few(run) :])


def early(name: str) -> Callable[[Run], float]:
    """Mean of a column over the first tenth of the steps."""
    return lambda run: known_mean(column(run, name)[: few(run)])


def few(run: Run) -> int:
    """A tenth of a run's steps."""
    return max(1, round(LAST * len(run["steps"]["kl"])))


def peak_gold(run: Run) -> float:
    """Highest smoothed gold score of a run."""
    return float(smooth(column(run, "gold")).max())


def drop(run: Run) -> float:
    """How far the gold score falls from its peak to the end."""
    return peak_gold(run) - end("gold")(run)


def _at_equal_kl(run: Run, other: Run) -> float:
    curves = [(smooth(column(r, "kl")), smooth(column(r, "gold"))) for r in (run, other)]
    found = at_kl(*curves[1], end("kl")(run))
    if not math.isnan(found):
        return end("gold")(run) - found
    return at_kl(*curves[0], end("kl")(other)) - end("gold")(other)
