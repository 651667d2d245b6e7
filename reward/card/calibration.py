"""What a reward model's scores are worth, in numbers: pairs, calibration, length. No torch.

A gap is the score of the response that the annotator preferred minus that of the other one: > 0 is right,
0 counts 1/2. Suffixes: ``_N`` pair, ``_R`` response (all responses of all comparisons in one row), ``_K``
response of one prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from rlhf.stats import clustered
from rlhf.stats.clustered import Floats, Indices
from rlhf.stats.intervals import Estimate, student95

MOST_PAIRS = 10_000  # of one comparison
_MOST_LISTED = 2_000_000  # pairs of one comparison, ties included, that are put in a list
_NEWTON_STEPS = 100


class Pairs(NamedTuple):
    """Pairs of responses of one comparison; every field has one entry a pair."""

    better: Indices
    """Position of the preferred response among all responses."""
    worse: Indices
    """Position of the other one."""
    comparison: Indices
    """Position of the comparison."""


def labeled_pairs(ranks: Sequence[Sequence[int]]) -> Pairs:
    """All pairs that the labels order; a tie is no pair.

    ranks: of every comparison its ranks, 0 = best; the responses of all comparisons are numbered in order.
    Of a comparison with more than :data:`MOST_PAIRS` pairs that many are drawn, the same ones every time.
    """
    parts = [np.empty((0, 3), dtype=np.intp)]
    first = 0
    for comparison, ranks_K in enumerate(ranks):
        rank_K = np.asarray(ranks_K, dtype=np.int64)
        i_P, j_P = _pairs_of(rank_K)
        ordered = rank_K[i_P] < rank_K[j_P]
        a_P, b_P = np.where(ordered, i_P, j_P), np.where(ordered, j_P, i_P)
        parts.append(np.stack([first + a_P, first + b_P, np.full(a_P.size, comparison)], axis=1))
        first += len(ranks_K)
    table = np.concatenate(parts).astype(np.intp)
    return Pairs(table[:, 0], table[:, 1], table[:, 2])


def possible_pairs(ranks_K: Sequence[int]) -> int:
    """Number of pairs of one comparison that its ranks order."""
    ties = Counter(ranks_K).values()
    return math.comb(len(ranks_K), 2) - sum(math.comb(n, 2) for n in ties)


def _pairs_of(rank_K: NDArray[np.int64]) -> tuple[Indices, Indices]:
    """Positions i < j of different rank, all of them or :data:`MOST_PAIRS` drawn without replacement."""
    k = rank_K.size
    listed = math.comb(k, 2)
    if listed <= MOST_PAIRS or (listed <= _MOST_LISTED and possible_pairs(rank_K.tolist()) <= MOST_PAIRS):
        i_P, j_P = np.triu_indices(k, 1)
        kept = rank_K[i_P] != rank_K[j_P]
        return i_P[kept], j_P[kept]
    # the first response is uniform over those that have a pair, by the number of their pairs
    _, of_K, count = np.unique(rank_K, return_inverse=True, return_counts=True)
    partners_K = k - count[of_K]
    random, codes = np.random.default_rng(k), np.empty(0, dtype=np.int64)
    number = min(MOST_PAIRS, int(partners_K.sum()) // 2)
    while codes.size < number:  # pairs as i * k + j, i < j
        i_P = random.choice(k, 2 * number, p=partners_K / partners_K.sum())
        j_P = random.integers(0, k, 2 * number)
        kept = rank_K[i_P] != rank_K[j_P]
        low_P, high_P = np.minimum(i_P, j_P)[kept], np.maximum(i_P, j_P)[kept]
        codes = np.unique(np.concatenate([codes, low_P.astype(np.int64) * k + high_P]))
    codes = np.sort(random.permutation(codes)[:number])
    return (codes // k).astype(np.intp), (codes % k).astype(np.intp)


def right(gaps: ArrayLike) -> Floats:
    """1 where the gap is positive, 0 where it is negative, 1/2 at 0, [N]."""
    return np.heaviside(np.asarray(gaps, dtype=np.float64), 0.5)


def sigmoid(x: ArrayLike) -> Floats:
    """1 / (1 + exp(-x)), exact in both tails: the probability that a score gap predicts (Bai 2022)."""
    return np.exp(-log_loss(x))


def log_loss(gaps: ArrayLike) -> Floats:
    """-log sigmoid(gap) of every pair, nats, [N]; log 2 for a model that says nothing."""
    return np.logaddexp(0.0, -np.asarray(gaps, dtype=np.float64))


def brier(gaps: ArrayLike) -> Floats:
    """(1 - sigmoid(gap))^2 of every pair, [N]; 1/4 for a model that says nothing (Brier 1950)."""
    return np.square(1.0 - sigmoid(gaps))


def equal_bins(x: ArrayLike, bins: int) -> Indices:
    """The bin 0..bins-1 of every value, ascending, with equal numbers; equal values stay together."""
    values = np.asarray(x, dtype=np.float64).ravel()
    share = (scipy.stats.rankdata(values) - 0.5) / max(values.size, 1)
    return np.minimum(np.floor(share * bins + 1e-9), bins - 1).astype(np.intp)


def calibration_bins(gaps: ArrayLike, clusters: ArrayLike, bins: int) -> list[dict[str, Any]]:
    """Accuracy against prediction in bins of equal count by absolute gap; empty bins are left out.

    Each bin has its ends ``low`` and ``high``, means of the absolute gap (``mean_gap``) and of its sigmoid
    (``predicted``, the share that should be right), the share that is, as an estimate, and its ``pairs``.
    """
    gaps_N, clusters_N = np.asarray(gaps, dtype=np.float64), np.asarray(clusters)
    size_N, bin_N = np.abs(gaps_N), equal_bins(np.abs(gaps_N), bins)
    found = []
    for number in np.unique(bin_N):
        inside = bin_N == number
        size = size_N[inside]
        found.append(
            {
                "low": float(size.min()),
                "high": float(size.max()),
                "mean_gap": float(size.mean()),
                "predicted": float(sigmoid(size).mean()),
                **clustered.share(right(gaps_N[inside]), clusters_N[inside]).as_dict(),
                "pairs": int(inside.sum()),
            }
        )
    return found


def calibration_error(gaps: ArrayLike, clusters: ArrayLike, bins: int) -> tuple[Estimate, float]:
    """Expected calibration error, and what chance alone makes of it.

    Mean over the pairs of |accuracy - prediction| of their bin (ECE; Naeini 2015, with equal counts). The
    prediction is P(A over B) folded to >= 1/2, that is sigmoid(|gap|). The interval takes the direction of
    each bin's error as given: too narrow near the second number, which a perfectly calibrated model would
    show on as many independent pairs with the same gaps: a bin of n pairs is then off by
    sqrt(2 / pi * sum p (1 - p)) / n on average, p the predictions.
    """
    gaps_N = np.asarray(gaps, dtype=np.float64)
    if not gaps_N.size:
        return clustered.UNKNOWN, math.nan
    bin_N, predicted_N = equal_bins(np.abs(gaps_N), bins), sigmoid(np.abs(gaps_N))
    off_N, number = right(gaps_N) - predicted_N, int(bin_N.max()) + 1
    sign_B = np.sign(np.bincount(bin_N, weights=off_N, minlength=number))
    spread_B = np.bincount(bin_N, weights=predicted_N * (1 - predicted_N), minlength=number)
    by_chance = float(np.sqrt(2 / math.pi * spread_B).sum()) / gaps_N.size
    return clustered.mean(sign_B[bin_N] * off_N, clusters), by_chance


def slope(gaps: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Slope b of P(right) = sigmoid(b * gap): 1 = calibrated, < 1 over-confident, 0 = the gaps say nothing.

    Maximum likelihood of the logistic regression without intercept (Cox 1958), by Newton's method; standard
    error from the information and the clusters' scores (sandwich). Multiplying the scores by b calibrates
    them. NaN where no slope is the best one: all gaps are 0, or none is negative, or none is positive.
    """
    gaps_N, names = np.asarray(gaps, dtype=np.float64).ravel(), np.asarray(clusters)
    number = int(np.unique(names).size)
    if not (gaps_N > 0).any() or not (gaps_N < 0).any():
        return Estimate(math.nan, math.nan, math.nan, number)
    unit = float(np.sqrt(np.mean(np.square(gaps_N))))
    x_N = gaps_N / unit
    b = _best_slope(x_N)
    if number == 1 or math.isnan(b):
        return Estimate(b / unit, math.nan, math.nan, number)
    wrong_N = sigmoid(-b * x_N)
    information = float((np.square(x_N) * wrong_N * sigmoid(b * x_N)).sum())
    score_G, _ = clustered.sums(x_N * wrong_N, names)
    error = math.sqrt(number / (number - 1) * float(np.square(score_G).sum())) / information
    half = student95(number - 1) * error
    return Estimate(b / unit, (b - half) / unit, (b + half) / unit, number)


def _best_slope(x_N: Floats) -> float:
    """Where sum log sigmoid(b x) is largest; NaN where Newton's method, from b = 0, does not find it."""
    b = 0.0
    for _ in range(_NEWTON_STEPS):
        wrong_N = sigmoid(-b * x_N)
        information = float((np.square(x_N) * wrong_N * sigmoid(b * x_N)).sum())
        if information == 0:
            break
        step = float((x_N * wrong_N).sum()) / information
        b += step
        if abs(step) < 1e-9 * max(1.0, abs(b)):
            return b
    return math.nan


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Product-moment correlation; NaN where one of them does not vary."""
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (x, y))
    if a.size < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale > 0 else math.nan


def correlation(x: ArrayLike, y: ArrayLike, clusters: ArrayLike, *, by_rank: bool = False) -> Estimate:
    """Pearson's correlation, or Spearman's (``by_rank``), with a jackknife interval on Fisher's z scale."""
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (x, y))

    def statistic(kept: Indices) -> float:
        some = (a[kept], b[kept])
        return pearson(*map(scipy.stats.rankdata, some)) if by_rank else pearson(*some)

    return clustered.jackknife(statistic, clusters, forward=math.atanh, back=math.tanh)


def centered(x: ArrayLike, groups: ArrayLike) -> Floats:
    """Values minus the mean of their group."""
    values = np.asarray(x, dtype=np.float64).ravel()
    _, owner, count = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return values - (np.bincount(owner, weights=values) / count)[owner]


def without_length(scores: ArrayLike, lengths: ArrayLike, comparisons: ArrayLike) -> tuple[Floats, float]:
    """Scores without the linear effect of length within comparisons, [R], and that effect per unit of length.

    The effect is the least-squares slope of centered scores on centered lengths; 0 where no length varies.
    """
    scores_R = np.asarray(scores, dtype=np.float64).ravel()
    lengths_R = centered(lengths, comparisons)
    square = float(lengths_R @ lengths_R)
    effect = float(lengths_R @ centered(scores_R, comparisons)) / square if square > 0 else 0.0
    return scores_R - effect * np.asarray(lengths, dtype=np.float64).ravel(), effect
