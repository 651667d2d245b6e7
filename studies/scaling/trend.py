"""The trend of a figure over a ladder: its slope on ln N, with a 95% interval. Plain numpy, no model.

The line is the least-squares line through the rungs' means, y = intercept + slope * ln N, every rung counting
the same. That the trend is straight in ln N is an assumption; ``misfit`` tells how far a rung is from it.

Where the interval comes from:

``seeds``, with two seeds or more at every rung: the slope is a weighted sum of the rungs, so every seed has
its own, from its own world, text, weights and items. The interval is the wider of two
(``seeds.over_seeds``): Student's t over the seeds' slopes, and the normal interval of the items alone. With
items that all rungs of a seed have met, the weighted sum is taken item by item, so that what makes an item
hard cancels. It holds for this ladder: it says how far another seed would move the slope, not how far another
rung would. With few seeds it is wide (t is 12.7 for two, 4.3 for three), and it takes seeds for normal.

``residuals``, with one seed: the wider of the classical interval of least squares, slope +- t(n - 2) * s /
sqrt(sum (x - mean x)^2) with s^2 = residuals^2 / (n - 2), and that of the items. It takes departures from the
line for independent normal noise of one size; models of one family depart together, and the interval is then
too narrow. With three rungs t is 12.7.

Fewer than three different sizes: no trend. Two points lie on a line whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.stats.intervals import Estimate, student95
from studies.engine.seeds import SeedMean, combine, over_seeds, slope_weights

LEAST_RUNGS = 3
SEEDS, RESIDUALS = "seeds", "residuals"


@dataclass(frozen=True)
class Trend:
    """A fitted line.

    slope: a unit of ln N; its n is the number of seeds (``residuals``: of rungs). misfit: largest distance of
    a rung's mean from the line.
    """

    slope: Estimate
    intercept: float
    misfit: float
    rungs: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        """The trend for JSON."""
        return {
            "slope": self.slope.as_dict(),
            "misfit": None if math.isnan(self.misfit) else self.misfit,
            "rungs": self.rungs,
            "method": self.method,
        }


def fit(sizes: Sequence[float], points: Sequence[Sequence[SeedMean]]) -> Trend | None:
    """The trend of a figure.

    sizes: N of every rung. points: for each rung one point a seed, in the order of the seeds. None with fewer
    than three different sizes.

    Raises:
        ValueError: the rungs have different numbers of seeds.
    """
    if len({len(seeds) for seeds in points}) > 1 or len(points) != len(sizes):
        raise ValueError("every rung needs the same seeds")
    if len(set(sizes)) < LEAST_RUNGS:
        return None
    x = np.log(np.asarray(sizes, dtype=np.float64))
    weights = slope_weights(x)
    slopes = [_slope(of_seed, weights) for of_seed in zip(*points, strict=True)]
    means = np.array([np.mean([p.mean for p in seeds]) for seeds in points])
    centre = float(np.mean([s.mean for s in slopes]))
    intercept = float(means.mean() - centre * x.mean())
    distance = means - intercept - centre * x
    slope = over_seeds(slopes)
    if len(slopes) == 1:
        half = max(_residual_half(x, distance), slope.high - centre)
        slope = Estimate(centre, centre - half, centre + half, len(sizes))
    method = SEEDS if len(slopes) > 1 else RESIDUALS
    return Trend(slope, intercept, float(np.abs(distance).max()), len(sizes), method)


def _slope(of_seed: Sequence[SeedMean], weights: Sequence[float]) -> SeedMean:
    """The slope of one seed: paired by item where the items are the same, else with independent errors."""
    items = [s.items for s in of_seed if s.items is not None]
    if len(items) == len(of_seed) and len({*map(len, items)}) == 1 and len(items[0]) > 1:
        return SeedMean.of(np.asarray(weights) @ np.asarray(items))
    return combine(of_seed, weights)


def _residual_half(x: NDArray[np.float64], distance: NDArray[np.float64]) -> float:
    freedom = len(x) - 2
    spread = math.sqrt(float(np.square(distance).sum()) / freedom)
    return student95(freedom) * spread / math.sqrt(float(np.square(x - x.mean()).sum()))
