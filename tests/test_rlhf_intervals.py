"""Intervals and tests against the standard library, scipy, and simulated coverage."""

import json
import math
import statistics
import warnings

import numpy as np
import pytest
from scipy import stats

from rlhf.stats.intervals import (
    Z95,
    Estimate,
    cluster_mean_interval,
    mean_interval,
    paired_difference,
    proportion_interval,
    win_rate,
)
from rlhf.stats.tests import sign_test

RUNS = 2000


def _covered(estimates, truth):
    return sum(e.low <= truth <= e.high for e in estimates) / len(estimates)


def _close_to_95(share):
    return abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / RUNS)


def test_z_is_the_normal_quantile():
    assert pytest.approx(statistics.NormalDist().inv_cdf(0.975)) == Z95


def test_the_mean_interval_is_student_s_and_covers_95_percent_of_few_observations_too():
    x = [1.0, 4.0, 2.0, 8.0]
    half = 3.182446 * statistics.stdev(x) / 2  # of three degrees of freedom
    estimate = mean_interval(x)
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (
        pytest.approx(3.75),
        pytest.approx(3.75 - half),
        pytest.approx(3.75 + half),
        4,
    )
    for number in (6, 200):
        draws = np.random.default_rng(0).normal(2, 3, size=(RUNS, number))
        assert _close_to_95(_covered([mean_interval(row) for row in draws], 2))


def test_with_clusters_of_one_the_cluster_interval_is_student_s():
    x = np.random.default_rng(0).integers(0, 2, size=60)
    got, expected = cluster_mean_interval(x, np.ones(60)), mean_interval(x)
    for name in ("mean", "low", "high", "n"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name))


def test_repeating_the_items_of_a_cluster_does_not_narrow_its_interval():
    x, b = np.array([1.0, 0, 2, 3, 1]), np.array([2.0, 1, 3, 3, 4])
    once, often = cluster_mean_interval(x, b), cluster_mean_interval(10 * x, 10 * b)
    assert (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))


def test_the_cluster_interval_covers_95_percent_where_pairs_of_a_prompt_agree_and_the_naive_one_does_not():
    rng = np.random.default_rng(0)
    clustered, naive = [], []
    for _ in range(RUNS):
        pairs = rng.integers(1, 11, size=150)
        ease = rng.beta(1.4, 0.6, size=150)  # mean 0.7; every prompt has its own
        correct = rng.binomial(pairs, ease)
        clustered.append(cluster_mean_interval(correct, pairs))
        naive.append(proportion_interval(int(correct.sum()), int(pairs.sum())))
    assert _close_to_95(_covered(clustered, 0.7))
    assert _covered(naive, 0.7) < 0.85


def test_clusters_without_a_pair_are_left_out():
    assert cluster_mean_interval([1, 0, 3], [2, 0, 4]) == cluster_mean_interval([1, 3], [2, 4])


def test_the_paired_difference_is_the_interval_of_the_differences_after_minus_before():
    before, after = [1.0, 2.0, 3.0, 10.0], [2.0, 2.5, 4.5, 11.0]
    result = paired_difference(before, after)
    change = mean_interval([1.0, 0.5, 1.5, 1.0])
    assert result == {
        "before": 4.0,
        "after": 5.0,
        "diff": 1.0,
        "ci95": [pytest.approx(change.low), pytest.approx(change.high)],
        "n": 4,
    }
    assert result["ci95"][0] > 0  # although the two separate intervals overlap widely


def test_the_proportion_interval_solves_the_score_equation():
    """Wilson's ends are the shares q for which k / n lies z standard errors OF q away."""
    for k, n in ((3, 10), (1, 40), (117, 221), (40, 40), (0, 7)):
        estimate = proportion_interval(k, n)
        for q in (estimate.low, estimate.high):
            assert abs(k / n - q) == pytest.approx(Z95 * math.sqrt(q * (1 - q) / n), abs=1e-9)
        assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1


def test_an_impossible_count_is_an_error():
    for k, n in ((-1, 3), (4, 3), (0, -1)):
        with pytest.raises(ValueError, match="successes"):
            proportion_interval(k, n)


def test_the_win_rate_counts_a_tie_as_half_and_higher_after_as_a_win():
    estimate = win_rate([0, 0, 0, 0], [1, 2, 0, -1])
    assert estimate.mean == 0.625
    expected = mean_interval([1, 1, 0.5, 0])
    assert (estimate.low, estimate.high) == (expected.low, expected.high)


def test_with_one_observation_or_none_the_interval_is_unknown_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n, mean in ((0, None), (1, 0.5)):
            x, ones = [0.5] * n, [1.0] * n
            expected = {"mean": mean, "ci95": None, "n": n}
            assert mean_interval(x).as_dict() == expected
            assert cluster_mean_interval(x, ones).as_dict() == expected
            assert win_rate(x, x).as_dict() == expected
            difference = paired_difference(x, ones)
            assert difference["before"] == mean
            assert difference["ci95"] is None
            json.dumps(difference, allow_nan=False)
        assert proportion_interval(0, 0).as_dict() == {"mean": None, "ci95": None, "n": 0}
        assert proportion_interval(1, 1).low > 0.2


def test_what_is_known_is_plain_json():
    assert json.loads(json.dumps(mean_interval(np.arange(3.0)).as_dict(), allow_nan=False))["n"] == 3
    assert Estimate(1.0, 0.5, 1.5, 3).as_dict() == {"mean": 1.0, "ci95": [0.5, 1.5], "n": 3}


def test_values_that_cannot_be_paired_are_an_error():
    for function in (paired_difference, win_rate, cluster_mean_interval):
        with pytest.raises(ValueError, match="paired"):
            function([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 0), (0, 6), (3, 4), (20, 9), (700, 600)])
def test_the_sign_test_is_scipy_s_exact_one(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected)


def test_a_ratio_of_negative_sums_has_its_ends_in_order():
    one, other = (
        cluster_mean_interval([1.0, 2.0, 4.0], [2.0, 3.0, 4.0]),
        cluster_mean_interval([-1.0, -2.0, -4.0], [-2.0, -3.0, -4.0]),
    )
    assert one.low < one.mean < one.high
    assert other == one
