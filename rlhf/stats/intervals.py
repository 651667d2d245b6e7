"""A measured number and how far it can be trusted: means, shares and differences with 95% intervals.

Plain numpy in, plain floats out. Too little data is a result, not an error: without an observation
everything is NaN, with a single one only the interval is (a share of one trial still has an interval).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNBOUNDED, AT_LEAST_0, SHARE = (-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)  # of a quantity
Z95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution


@dataclass(frozen=True)
class Estimate:
    """A number, the ends of its 95% interval, and the number of independent units behind it."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Give {mean, ci95: [low, high], n} for JSON; what is not known (NaN) becomes None."""
        return {"mean": _known(self.mean), "ci95": _ends(self), "n": self.n}

    def cut(self, bounds: tuple[float, float]) -> Estimate:
        """With the interval cut at the bounds of the quantity, such as 0 and 1 of a share.

        No truth is beyond them, so nothing is lost of the coverage. Not beyond the mean: an estimate of a KL
        may be below 0 itself.
        """
        low, high = (float(np.clip(end, *bounds)) for end in (self.low, self.high))
        return Estimate(self.mean, min(low, self.mean), max(high, self.mean), self.n)


def mean_interval(x: ArrayLike, freedom: int | None = None) -> Estimate:
    """Mean of independent observations: mean +- t s / sqrt(n), with s^2 = sum (x - mean)^2 / (n - 1).

    x: any shape, every entry one observation, few of them, such as seeds, too. freedom: degrees of freedom of
    Student's t; None = n - 1.
    """
    values = _floats(x)
    if values.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    t = student95(values.size - 1 if freedom is None else freedom)
    return _around(mean, float(values.std(ddof=1)) / math.sqrt(values.size), int(values.size), t)


@functools.cache
def student95(freedom: int) -> float:
    """97.5% quantile of Student's t distribution."""
    from scipy.special import stdtrit  # here, since it takes a while to load and few ask for it

    return float(stdtrit(freedom, 0.975))


def cluster_mean_interval(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Ratio of sums over clusters, with a standard error that holds when a cluster's items are dependent.

    numerators, denominators: one entry per cluster, for instance correct pairs and pairs of one prompt.
    R = sum a / sum b; se = sqrt(G / (G - 1) * sum (a_g - R b_g)^2) / sum b; interval R +- t se, t of G - 1
    degrees of freedom, since clusters may be few. Clusters with denominator 0 are left out; n is the number
    G of the others.

    Linearized ratio estimator: Cochran, Sampling Techniques (1977), section 6.4, with the cluster correction.
    """
    a, b = _same_length(numerators, denominators)
    a, b = a[b != 0], b[b != 0]
    clusters, total = int(a.size), float(b.sum())
    if clusters == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    ratio = float(a.sum()) / total
    if clusters == 1:
        return Estimate(ratio, math.nan, math.nan, 1)
    squares = float(np.square(a - ratio * b).sum())
    error = math.sqrt(clusters / (clusters - 1) * squares) / abs(total)
    return _around(ratio, error, clusters, student95(clusters - 1))


def paired_difference(before: ArrayLike, after: ArrayLike) -> dict[str, Any]:
    """Mean change of the same items, after minus before: mean(d) +- t s_d / sqrt(n) with d = after - before.

    before, after: one entry per item, in the same order. Returns {before, after, diff, ci95: [low, high], n};
    what is not known is None. The interval is that of the difference, and is narrower than the two separate
    ones wherever the items agree on what is hard.
    """
    x, y = _same_length(before, after)
    change = mean_interval(y - x)
    return {
        "before": _known(mean_interval(x).mean),
        "after": _known(mean_interval(y).mean),
        "diff": _known(change.mean),
        "ci95": _ends(change),
        "n": change.n,
    }


def proportion_interval(k: int, n: int) -> Estimate:
    """Share of successes k / n with its Wilson score interval, which stays inside [0, 1].

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4 n^2)) / (1 + z^2 / n), p = k / n. Wilson (1927).
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes in {n} trials")
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    return wilson(k / n, n, n)


def wilson(p: float, trials: float, n: int, z: float = Z95) -> Estimate:
    """Wilson score interval of a share p of ``trials``, which need not be whole (scipy's have to be)."""
    z2_n = z**2 / trials
    center = (p + z2_n / 2) / (1 + z2_n)
    half = z * math.sqrt(p * (1 - p) / trials + z2_n / (4 * trials)) / (1 + z2_n)
    return Estimate(p, 0.0 if p == 0 else center - half, 1.0 if p == 1 else center + half, n)


def win_rate(before: ArrayLike, after: ArrayLike) -> Estimate:
    """Share of items on which ``after`` beats ``before``, a tie counting 1/2.

    before, after: one score per item, higher is better, in the same order. The interval is that of
    :func:`mean_interval` over the outcomes 1, 1/2, 0.
    """
    x, y = _same_length(before, after)
    return mean_interval(0.5 * (np.sign(y - x) + 1.0))


def _floats(x: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(x, dtype=np.float64).ravel()


def _same_length(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _floats(x), _floats(y)
    if first.size != second.size:
        raise ValueError(f"{first.size} values cannot be paired with {second.size}")
    return first, second


def _around(mean: float, standard_error: float, n: int, t: float) -> Estimate:
    return Estimate(mean, mean - t * standard_error, mean + t * standard_error, n)


def _known(x: float) -> float | None:
    return None if math.isnan(x) else x


def _ends(estimate: Estimate) -> list[float] | None:
    ends = [estimate.low, estimate.high]
    return None if any(math.isnan(end) for end in ends) else ends
