"""What is measured on scores, and intervals over seeds: plain numpy, no model.

Suffix ``_N``: one entry a comparison (or whatever the item is).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.stats.intervals import Z95, Estimate, mean_interval

Floats = NDArray[np.float64]

# 97.5% quantile of Student's t distribution with 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
BIN_EDGES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf)  # of |score gap|


@dataclass(frozen=True)
class SeedMean:
    """A number measured in one seed, and its standard error over the items of that seed."""

    mean: float
    error: float

    @staticmethod
    def of(items_N: ArrayLike) -> SeedMean:
        """Mean of independent items."""
        values = np.asarray(items_N, dtype=np.float64)
        return SeedMean(float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size))


def over_seeds(seeds: Sequence[SeedMean]) -> Estimate:
    """Mean over seeds with a 95% interval; n is the number of seeds.

    The wider of two: Student's t over the seeds' means (it holds whatever a seed changes: rule, data, initial
    weights, and the items, which are each seed's own), and the normal interval of the items alone, which
    keeps a chance agreement of few seeds from passing for precision. With one seed only the second is known,
    and the interval says nothing about other seeds.
    """
    means = [s.mean for s in seeds]
    items = Z95 * math.sqrt(sum(s.error**2 for s in seeds)) / max(len(seeds), 1)
    centre = mean_interval(means)
    if len(seeds) < 2:
        return Estimate(centre.mean, centre.mean - items, centre.mean + items, len(seeds))
    student = T95[min(len(seeds) - 1, len(T95)) - 1] / Z95 * (centre.high - centre.mean)
    half = max(student, items)
    return Estimate(centre.mean, centre.mean - half, centre.mean + half, len(seeds))


def combine(seeds: Sequence[SeedMean], weights: Sequence[float]) -> SeedMean:
    """A weighted sum of numbers measured on different items of one seed."""
    return SeedMean(
        float(np.dot(weights, [s.mean for s in seeds])),
        math.hypot(*(w * s.error for w, s in zip(weights, seeds, strict=True))),
    )


def slope_weights(x: ArrayLike) -> list[float]:
    """The weights w for which sum w_i y_i is the least-squares slope of y on x."""
    values = np.asarray(x, dtype=np.float64)
    centred = values - values.mean()
    return [float(w) for w in centred / np.square(centred).sum()]


def to_text(credit_N: ArrayLike) -> str:
    """Credits 0, 1/2, 1 as one character each: what a unit keeps of its test pairs."""
    return "".join("0h1"[round(2 * c)] for c in np.asarray(credit_N))


def from_text(text: str) -> Floats:
    """The inverse of :func:`to_text`."""
    return np.array(["0h1".index(c) / 2 for c in text])


def calibration(gap_N: Floats) -> dict[str, Any]:
    """How well sigmoid(gap) tells how often the label agrees with the score.

    gap_N: score of the side labelled good less that of the other. slope: the b that maximises
    sum log sigmoid(b * gap), 1 if calibrated, below 1 if the gaps promise too much (over-confident), with its
    standard error. ece: expected calibration error over bins of |gap|. bins: for each of BIN_EDGES, pairs,
    mean promised and observed agreement (equal scores count 1/2).
    """
    slope, error = _bradley_terry_slope(gap_N)
    size_N = np.abs(gap_N)
    promised_N = _sigmoid(size_N)
    agrees_N = 0.5 * (np.sign(gap_N) + 1.0)
    bins: list[dict[str, Any]] = []
    ece = 0.0
    for low, high in pairwise(BIN_EDGES):
        inside = (size_N >= low) & (size_N < high)
        if not inside.any():
            bins.append({"pairs": 0, "promised": None, "observed": None})
            continue
        promised, observed = float(promised_N[inside].mean()), float(agrees_N[inside].mean())
        ece += abs(promised - observed) * float(inside.mean())
        bins.append({"pairs": int(inside.sum()), "promised": promised, "observed": observed})
    return {
        "slope": slope,
        "slope_error": error,
        "ece": ece,
        "bins": bins,
        "loss": float(np.logaddexp(0.0, -gap_N).mean()),
        "accuracy": float(agrees_N.mean()),
    }


def _bradley_terry_slope(gap_N: Floats) -> tuple[float, float]:
    slope = 1.0
    for _ in range(100):
        p_N = _sigmoid(slope * gap_N)
        gradient = float((gap_N * (1.0 - p_N)).sum())
        curvature = float((gap_N**2 * p_N * (1.0 - p_N)).sum())
        if curvature < 1e-12:  # no gap at all, or nothing but agreement: there is no finite slope
            return math.nan, math.nan
        step = gradient / curvature
        slope += max(-1.0, min(1.0, step))
        if abs(step) < 1e-10:
            break
    return slope, 1.0 / math.sqrt(curvature)


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))
