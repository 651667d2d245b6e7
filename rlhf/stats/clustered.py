"""Means, shares and correlations of items that come in dependent clusters, with 95% intervals.

The items of a cluster (pairs of one prompt, say) may depend on each other, clusters are independent. Plain
numpy in, :class:`Estimate` out, whose ``n`` is the number of clusters. Suffixes: ``_N`` item, ``_G`` cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.stats.intervals import Estimate, cluster_mean_interval, student95, wilson

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

JACKKNIFE_GROUPS = 200  # of clusters, at most, each left out once; with fewer clusters each is a group
UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)


def sums(values: ArrayLike, clusters: ArrayLike) -> tuple[Floats, Floats]:
    """Sum of the values and number of items of every cluster, [G] each.

    values, clusters: one entry per item; a cluster is an integer, and its name does not matter.
    """
    values_N = np.asarray(values, dtype=np.float64).ravel()
    clusters_N = np.asarray(clusters).ravel()
    if values_N.size != clusters_N.size:
        raise ValueError(f"{values_N.size} values in clusters of {clusters_N.size}")
    _, owner_N, count_G = np.unique(clusters_N, return_inverse=True, return_counts=True)
    sum_G = np.bincount(owner_N, weights=values_N, minlength=count_G.size)
    return sum_G.astype(np.float64), count_G.astype(np.float64)


def mean(values: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Mean over the items, every item counting the same (Cochran 1977, section 6.4)."""
    return cluster_mean_interval(*sums(values, clusters))


def share(values: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Mean of outcomes in [0, 1], with a Wilson interval that stays there and knows of the clusters.

    The number of trials of the interval is the effective one, p (1 - p) / se^2 with the standard error of
    :func:`mean`, and at most the number of items (Dean and Pagano 2015 compare such intervals); its quantile
    is Student's, of one degree of freedom less than clusters. Where all outcomes are 0, or all are 1, or in
    one cluster, no error is estimated: the trials are the clusters, the quantile is the normal one.
    """
    plain = mean(values, clusters)
    p, number = plain.mean, plain.n
    if number == 0:
        return plain
    items = np.asarray(values).size
    if number == 1 or p in (0.0, 1.0):
        return wilson(p, number, number)
    t = student95(number - 1)
    error = (plain.high - plain.low) / (2 * t)
    trials = float(items) if error == 0 else min(p * (1 - p) / error**2, float(items))
    return wilson(p, trials, number, t)


def jackknife(
    statistic: Callable[[Indices], float],
    clusters: ArrayLike,
    *,
    forward: Callable[[float], float] = float,
    back: Callable[[float], float] = float,
) -> Estimate:
    """A statistic of the items, with the delete-a-group jackknife interval (Kott 2001), by Student's t.

    Args:
        statistic: takes the indices of the items that stay; NaN where it is not defined.
        clusters: one integer per item; the items of a cluster go together.
        forward: the scale on which the interval is symmetric, ``math.atanh`` for a correlation.
        back: its inverse.
    """
    _, owner_N = np.unique(np.asarray(clusters).ravel(), return_inverse=True)
    if not owner_N.size:
        return UNKNOWN
    number = int(owner_N.max()) + 1
    parts = min(JACKKNIFE_GROUPS, number)
    part_N = owner_N % parts
    whole = statistic(np.arange(owner_N.size))
    unknown = Estimate(whole, math.nan, math.nan, number)
    if parts == 1 or math.isnan(whole):
        return unknown
    left_out = [statistic(np.flatnonzero(part_N != part)) for part in range(parts)]
    try:
        middle, others = forward(whole), np.array([forward(x) for x in left_out])
    except (ValueError, OverflowError):  # a correlation of 1 has no place on the scale
        return unknown
    error = math.sqrt((parts - 1) / parts * float(np.square(others - others.mean()).sum()))
    if not math.isfinite(middle) or not math.isfinite(error):
        return unknown
    half = student95(parts - 1) * error
    return Estimate(whole, back(middle - half), back(middle + half), number)
