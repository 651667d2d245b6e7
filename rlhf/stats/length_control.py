"""What a gain in a judge's score is worth where both responses are equally long.

Judges like length, and training finds that out. Two answers that need no other judge: a regression on the
difference in length, read where it is 0, and the pairs whose lengths are about equal, alone. The first
extrapolates where hardly a pair is near 0; the second has few pairs there: see ``about_equal.pairs``.

Plain numpy in, JSON-able figures out. Shape suffix: ``_N`` pair of responses (before, after) to one prompt.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.stats.clustered import Indices, jackknife
from rlhf.stats.intervals import cluster_mean_interval

Floats = NDArray[np.float64]

ABOUT_EQUAL = 0.1  # two lengths that differ by at most this share of the longer one
_NEWTON_STEPS = 12
_PRIOR_DEVIATION = 10.0  # of both coefficients of the win rate, logits: finite where one side always wins


def length_controlled(
    before: ArrayLike,
    after: ArrayLike,
    length_before: ArrayLike,
    length_after: ArrayLike,
    clusters: ArrayLike,
    weights: ArrayLike | None = None,
) -> dict[str, Any]:
    """Gain and win rate of ``after`` over ``before`` that length does not explain.

    Args:
        before, after: a judge's scores of the two responses of each pair, higher is better, [N] each.
        length_before, length_after: their lengths, tokens, [N] each.
        clusters: the prompt of each pair, an integer; the unit of every interval (delete-a-group jackknife).
        weights: how often each pair counts, >= 0; None = once.

    Returns:
        ``gain``: mean of after - before. ``gain_at_equal_length``: the intercept of its least-squares line
        over the difference in tokens; ``gain_a_token`` its slope. ``win_rate_at_equal_length``: a logistic
        regression of win (1), tie (1/2) or loss (0) on tanh(difference / its deviation), at 0 (the length
        term of Dubois 2024, arXiv 2404.04475, eq. 2). ``about_equal``: ``gain``, ``win_rate`` and the number
        of ``pairs``, the effective one where they have weights, whose lengths differ by at most
        :data:`ABOUT_EQUAL` of the longer one. Figures are
        {mean, ci95, n}, n clusters; what cannot be known, as a slope where all differences are equal, is
        None.

    Raises:
        ValueError: the numbers of entries differ.
    """
    columns = [np.asarray(x, dtype=np.float64).ravel() for x in (before, after, length_before, length_after)]
    x_N, y_N, short_N, long_N = columns
    owner_N = np.asarray(clusters).ravel()
    weights_N = np.ones(x_N.size) if weights is None else np.asarray(weights, dtype=np.float64).ravel()
    if len({column.size for column in (*columns, owner_N, weights_N)}) != 1:
        raise ValueError(f"columns of {[c.size for c in (*columns, owner_N, weights_N)]} entries")
    gain_N, more_N = y_N - x_N, long_N - short_N
    outcome_N = 0.5 * (np.sign(gain_N) + 1.0)
    equal_N = (np.abs(more_N) <= ABOUT_EQUAL * np.maximum(short_N, long_N)) & (weights_N > 0)

    def line_at(index: int) -> dict[str, Any]:
        fit = lambda at: line(more_N[at], gain_N[at], weights_N[at])[index]  # noqa: E731
        return jackknife(fit, owner_N).as_dict()

    def even(at: Indices) -> float:
        return win_rate_at_equal_length(more_N[at], outcome_N[at], weights_N[at])

    def mean(values_N: Floats, where_N: NDArray[np.bool_]) -> dict[str, Any]:
        _, group_N = np.unique(owner_N[where_N], return_inverse=True)
        tops, bottoms = (
            np.bincount(group_N, weights=w) for w in ((values_N * weights_N)[where_N], weights_N[where_N])
        )
        return cluster_mean_interval(tops, bottoms).as_dict()

    return {
        "gain": mean(gain_N, weights_N > 0),
        "gain_at_equal_length": line_at(0),
        "gain_a_token": line_at(1),
        "win_rate_at_equal_length": jackknife(even, owner_N, forward=_logit, back=_sigmoid).as_dict(),
        "about_equal": {
            "gain": mean(gain_N, equal_N),
            "win_rate": mean(outcome_N, equal_N),
            "pairs": round(effective(weights_N[equal_N])),
        },
    }


def effective(weights_N: Floats) -> float:
    """How many equally weighted pairs say as much: (sum w)^2 / sum w^2 (Kish 1965); 0 without any."""
    squares = float(weights_N @ weights_N)
    return float(weights_N.sum()) ** 2 / squares if squares else 0.0


def line(x_N: Floats, y_N: Floats, weights_N: Floats) -> tuple[float, float]:
    """Intercept and slope of the weighted least-squares line of y over x.

    Where all x are 0 the intercept is the mean of y and there is no slope (NaN); where they are all another
    number, there is neither.
    """
    total = float(weights_N.sum())
    if total == 0:
        return math.nan, math.nan
    x, y = float(weights_N @ x_N) / total, float(weights_N @ y_N) / total
    spread = float(weights_N @ np.square(x_N - x))
    if spread <= 1e-12 * total * max(1.0, x * x):
        return (y if x == 0 else math.nan), math.nan
    slope = float(weights_N @ ((x_N - x) * (y_N - y))) / spread
    return y - slope * x, slope


def win_rate_at_equal_length(more_N: Floats, outcome_N: Floats, weights_N: Floats) -> float:
    """sigmoid(a) of the fit of P(win) = sigmoid(a + b tanh(more / deviation of more)); NaN without a pair.

    Greatest posterior under a normal prior of mean 0 on a and b, by Newton's method.

    more_N: tokens that the second response is longer by. outcome_N: 1 = it wins, 1/2 = a tie, 0 = it loses.
    """
    total = float(weights_N.sum())
    if total == 0:
        return math.nan
    middle = float(weights_N @ more_N) / total
    deviation = math.sqrt(float(weights_N @ np.square(more_N - middle)) / total)
    if deviation == 0 and middle != 0:
        return math.nan
    longer_N = np.tanh(more_N / deviation) if deviation else np.zeros_like(more_N)
    design_N2 = np.stack([np.ones_like(longer_N), longer_N], axis=1)
    prior, fit_2 = np.eye(2) / _PRIOR_DEVIATION**2, np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        p_N = 1 / (1 + np.exp(-np.clip(design_N2 @ fit_2, -30, 30)))
        slope_2 = design_N2.T @ (weights_N * (outcome_N - p_N)) - prior @ fit_2
        bend_22 = (design_N2 * (weights_N * p_N * (1 - p_N))[:, None]).T @ design_N2 + prior
        step_2 = np.linalg.solve(bend_22, slope_2)
        fit_2 = fit_2 + np.clip(step_2, -2, 2)
    return _sigmoid(float(fit_2[0]))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
