"""The loss between several solutions of one target, beyond them, and in random directions.

A barrier is by how much the loss at (1 - a) x_i + a x_j is above the straight line through the losses of
the solutions x_i and x_j (Frankle 2020, arXiv 1912.05671), at its highest over a: inside (0 < a < 1) it is
at most 0 where the loss is convex, outside it is at least 0 there. A random direction, from either solution
and no further than the points inside and outside are from the nearer of the two, tells a hull that is good
from a loss that is flat everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from rlhf.stats.intervals import Estimate, mean_interval, student95

INSIDE, OUTSIDE, RANDOM = (0.25, 0.5, 0.75), (-0.5, -0.25, 1.25, 1.5), (0.25, 0.5)
_ROUNDING = 1e-6  # of a loss, relative: what pairs differ by no more than is no spread
_MOST = 100  # solutions that a reader is advised to train


class Point(NamedTuple):
    """A weighted sum of the solutions, and a step away from it."""

    weights: tuple[float, ...]
    """They sum to one."""
    toward: tuple[int, int] | None = None
    """The step is in the random direction that stands for that from the one solution to the other."""
    share: float = 0.0
    """Its length as a share of the distance of the two."""


def compare(
    number: int, loss: Callable[[Point], float], *, tick: Callable[[], object] = int
) -> dict[str, Any]:
    """Losses of ``number`` solutions and around them, as figures; ``tick`` is called after each.

    Intervals are over pairs of solutions (:func:`over_pairs`).
    """

    def at(point: Point) -> float:
        found = loss(point)
        tick()
        return found

    def one(i: int) -> tuple[float, ...]:
        return tuple(float(i == n) for n in range(number))

    ends = [at(Point(one(i))) for i in range(number)]
    pairs: list[tuple[dict[float, float], float]] = []
    for i, j in combinations(range(number), 2):
        above = {}
        for a in (*INSIDE, *OUTSIDE):
            weights = tuple((1 - a) * x + a * y for x, y in zip(one(i), one(j), strict=True))
            above[a] = at(Point(weights)) - ((1 - a) * ends[i] + a * ends[j])
        both = ((i, j), (j, i))
        astray = [at(Point(one(way[0]), way, share)) - ends[way[0]] for way in both for share in RANDOM]
        pairs.append((above, max(astray)))
    inside, outside = ([max(above[a] for a in side) for above, _ in pairs] for side in (INSIDE, OUTSIDE))
    random = [most for _, most in pairs]
    differences = {
        name: [x - y for x, y in zip(inside, theirs, strict=True)]
        for name, theirs in (("outside", outside), ("random", random))
    }
    estimates = {name: over_pairs(values, number) for name, values in differences.items()}
    return {
        "ends": ends,
        "centroid": at(Point((1 / number,) * number)) - sum(ends) / number,
        "along": [
            [a, over_pairs([above[a] for above, _ in pairs], number).as_dict()]
            for a in sorted((*INSIDE, *OUTSIDE))
        ],
        "inside": over_pairs(inside, number).as_dict(),
        "outside": over_pairs(outside, number).as_dict(),
        "random": over_pairs(random, number).as_dict(),
        "less": {name: estimate.as_dict() for name, estimate in estimates.items()},
        "verdict": verdict(list(estimates.values()), _ROUNDING * max(map(abs, ends))),
        "solutions_needed": max(needed(values, number) for values in differences.values()),
    }


def points_of(number: int) -> int:
    """How many losses :func:`compare` asks for."""
    return number + 1 + math.comb(number, 2) * (len(INSIDE) + len(OUTSIDE) + 2 * len(RANDOM))


def over_pairs(values: Sequence[float], number: int) -> Estimate:
    """Mean over the pairs of ``number`` solutions: mean +- t s / sqrt(pairs), t with number - 1 degrees of
    freedom, since pairs share solutions and are not as many independent ones."""
    return mean_interval(values, number - 1)


def verdict(differences: Sequence[Estimate], noise: float = 0.0) -> str:
    """On `the hull is better than what is outside it, and than random directions`, by the 95% intervals of
    barrier inside less each: SUPPORTED where all are below 0, CONTRADICTED where one is above 0. An interval
    no wider than ``noise`` says nothing: the pairs do not differ."""
    if any(difference.high - difference.low <= noise for difference in differences):
        return "UNDECIDED"
    if any(difference.low > 0 for difference in differences):
        return "CONTRADICTED"
    return "SUPPORTED" if all(difference.high < 0 for difference in differences) else "UNDECIDED"


def needed(values: Sequence[float], number: int) -> int:
    """How many solutions would tell this mean from 0 at this spread between pairs; at most 100 is said."""
    spread, mean = float(np.std(values, ddof=1)) if len(values) > 1 else math.inf, abs(float(np.mean(values)))
    for more in range(number, _MOST):
        if student95(more - 1) * spread / math.sqrt(math.comb(more, 2)) < mean:
            return more
    return _MOST
