"""Curves over d = sqrt(KL): smoothing, a score at a given KL, fits of Gao 2022 and what they are worth.

Suffix ``_N``: one entry a point of a curve. Plain numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.stats.intervals import Estimate, student95

Floats = NDArray[np.float64]
MOST_SEEDS = 200


def smooth(values_N: ArrayLike, width: int = 5) -> Floats:
    """Centered moving average; at the ends over what there is."""
    values = np.asarray(values_N, dtype=np.float64)
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def at_kl(kl_N: ArrayLike, values_N: ArrayLike, kl: float) -> float:
    """Value of a curve where its KL, made increasing, first reaches ``kl``; NaN where it never does."""
    rising = np.maximum.accumulate(np.asarray(kl_N, dtype=np.float64))
    if not rising[0] <= kl <= rising[-1]:
        return math.nan
    return float(np.interp(kl, rising, np.asarray(values_N, dtype=np.float64)))


def r_squared(x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Share of the variance of y that a straight line in x explains; NaN where either does not vary."""
    x, y = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if len(x) < 3 or not x.std() or not y.std():
        return math.nan
    return float(np.corrcoef(x, y)[0, 1] ** 2)


@dataclass(frozen=True)
class Fit:
    """R(d) = d (alpha - beta d), or d (alpha - beta log d), beta >= 0, beside the line R(d) = alpha d.

    aic_gain: AIC of the line less that of the curve: above 0 the second parameter is worth it; below 0 too
    where the points bend upwards, which the law does not. peak: the d at which the curve is highest, NaN
    where it is a line.
    """

    alpha: float
    beta: float
    aic_gain: float
    peak: float


def fit_bon(d_N: ArrayLike, gain_N: ArrayLike) -> Fit:
    """Best of n: R(d) = d (alpha - beta d), highest at alpha / 2 beta (Gao 2022, arXiv 2210.10760)."""
    alpha, beta, gain = _fit(d_N, gain_N, np.asarray(d_N, dtype=np.float64))
    return Fit(alpha, beta, gain, alpha / (2 * beta) if beta > 0 else math.nan)


def fit_rl(d_N: ArrayLike, gain_N: ArrayLike) -> Fit:
    """RL: R(d) = d (alpha - beta log d), highest at exp(alpha / beta - 1) (the same)."""
    alpha, beta, gain = _fit(d_N, gain_N, np.log(np.asarray(d_N, dtype=np.float64)))
    return Fit(alpha, beta, gain, math.exp(min(alpha / beta - 1, 50.0)) if beta > 0 else math.nan)


def _fit(d_N: ArrayLike, gain_N: ArrayLike, bend_N: Floats) -> tuple[float, float, float]:
    """alpha and beta >= 0 of d (alpha - beta bend), least squares, and what AIC says against d alpha."""
    d, gain = np.asarray(d_N, dtype=np.float64), np.asarray(gain_N, dtype=np.float64)
    columns = np.stack([d, -d * bend_N], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, gain, rcond=None)
    line = float(d @ gain / (d @ d))
    if beta < 0:
        alpha, beta = line, 0.0
    gain_of_curve = aic(gain - line * d, 1) - aic(gain - columns @ [alpha, beta], 2)
    return float(alpha), float(beta), gain_of_curve


def aic(residuals_N: ArrayLike, parameters: int) -> float:
    """Akaike's criterion with Gaussian errors, N log(RSS / N) + 2 k + 2 k (k + 1) / (N - k - 1), the last for
    small samples (Hurvich and Tsai 1989); k counts the variance too."""
    residuals = np.asarray(residuals_N, dtype=np.float64)
    number, k = len(residuals), parameters + 1
    squares = max(float(residuals @ residuals), 1e-12)
    return number * math.log(squares / number) + 2 * k + 2 * k * (k + 1) / (number - k - 1)


def seeds_needed(estimate: Estimate, bound: float) -> int | None:
    """Seeds with which an interval as of Student's t would leave the bound out, the mean and spread as they
    are; None = more than :data:`MOST_SEEDS`, or not known from one seed."""
    if estimate.n < 2 or math.isnan(estimate.low):
        return None
    half = max(estimate.high - estimate.mean, estimate.mean - estimate.low)  # one end may be cut
    deviation = half * math.sqrt(estimate.n) / student95(estimate.n - 1)
    for n in range(estimate.n, MOST_SEEDS + 1):
        if student95(n - 1) * deviation / math.sqrt(n) < abs(estimate.mean - bound):
            return n
    return None
