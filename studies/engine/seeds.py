"""Numbers measured in several seeds, and intervals over them: plain numpy, no model.

Suffix ``_N``: one entry an item (a comparison, a question).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.stats.intervals import Z95, Estimate, student95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SeedMean:
    """A number measured in one seed.

    error: standard error over the items of that seed, NaN where it is not known. items: one value an item,
    where they are to be paired with those of other measurements; their mean is ``mean``.
    """

    mean: float
    error: float = math.nan
    items: Floats | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(items_N: ArrayLike) -> SeedMean:
        """Mean of independent items."""
        values = np.asarray(items_N, dtype=np.float64)
        return SeedMean(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size), values)


def over_seeds(seeds: Sequence[SeedMean]) -> Estimate:
    """Mean over seeds with a 95% interval; n is the number of seeds.

    The wider of two: Student's t over the seeds' means (it holds whatever a seed changes: rule, data, initial
    weights, and the items, which are each seed's own), and the normal interval of the items alone, which
    keeps a chance agreement of few seeds from passing for precision. With one seed only the second is known,
    and the interval says nothing about other seeds.
    """
    means, number = np.array([s.mean for s in seeds]), len(seeds)
    half = Z95 * math.sqrt(sum(s.error**2 for s in seeds)) / number
    if number > 1:
        student = student95(number - 1) * float(means.std(ddof=1)) / math.sqrt(number)
        half = max(student, half)
    mean = float(means.mean())
    return Estimate(mean, mean - half, mean + half, number)


def combine(seeds: Sequence[SeedMean], weights: Sequence[float]) -> SeedMean:
    """A weighted sum of numbers measured on different items of one seed."""
    return SeedMean(
        float(np.dot(weights, [s.mean for s in seeds])),
        math.hypot(*(w * s.error for w, s in zip(weights, seeds, strict=True))),
    )


def slope_weights(x: ArrayLike) -> list[float]:
    """The weights w for which sum w_i y_i is the least-squares slope of y on x."""
    values = np.asarray(x, dtype=np.float64)
    centered = values - values.mean()
    return [float(w) for w in centered / np.square(centered).sum()]
