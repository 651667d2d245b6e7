"""Intervals of items in dependent clusters: against plain formulas, loops and simulated coverage."""

import math

import numpy as np
import pytest

from rlhf.stats import clustered as clusters
from rlhf.stats.intervals import (
    Z95,
    mean_interval,
    proportion_interval,
    student95,
    wilson,
)


def ends(estimate):
    return [estimate.mean, estimate.low, estimate.high]


def test_sums_are_those_of_a_loop_whatever_the_clusters_are_called():
    values, names = [1.0, 2.5, 4.0, 8.0, 16.0], [7, -3, 7, 100, -3]
    sums, counts = clusters.sums(values, names)
    expected = {
        name: [v for v, n in zip(values, names, strict=True) if n == name] for name in sorted(set(names))
    }
    assert sums.tolist() == [sum(v) for v in expected.values()]
    assert counts.tolist() == [len(v) for v in expected.values()]


def test_values_without_a_cluster_are_refused():
    with pytest.raises(ValueError, match="3 values in clusters of 2"):
        clusters.sums([1, 2, 3], [0, 1])


def test_the_mean_of_independent_items_has_the_plain_interval():
    x = np.random.default_rng(0).normal(size=50)
    assert ends(clusters.mean(x, np.arange(50))) == pytest.approx(ends(mean_interval(x)))


@pytest.mark.parametrize("of", [clusters.mean, clusters.share])
def test_saying_everything_three_times_makes_nothing_more_certain(of):
    x = np.random.default_rng(1).integers(0, 2, 40).astype(float)
    once, thrice = of(x, np.arange(40)), of(np.repeat(x, 3), np.repeat(np.arange(40), 3))
    assert ends(thrice) == pytest.approx(ends(once))
    assert thrice.n == 40


def test_a_share_of_independent_trials_has_nearly_wilson_s_interval():
    k, n = 37, 60
    found = clusters.share([1.0] * k + [0.0] * (n - k), np.arange(n))
    # the standard error has n - 1, Wilson's has n and the normal quantile
    assert ends(found) == pytest.approx(ends(proportion_interval(k, n)), abs=4e-3)


@pytest.mark.parametrize("outcome", [0, 1])
def test_outcomes_that_are_all_alike_are_as_certain_as_the_number_of_clusters_allows(outcome):
    found = clusters.share([outcome] * 12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    assert ends(found) == pytest.approx(ends(proportion_interval(4 * outcome, 4)))


def test_a_share_without_spread_between_clusters_is_not_certain():
    found = clusters.share([1, 0, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    assert ends(found) == pytest.approx(ends(wilson(4 / 8, 8, 4, student95(3))))
    nearly = clusters.share([1, 0, 0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3])
    assert ends(nearly) == pytest.approx(ends(wilson(5 / 8, 8, 4, student95(3))))


def test_one_cluster_is_one_trial_and_none_is_unknown():
    one = clusters.share([1, 1, 0, 1], [5, 5, 5, 5])
    assert (one.mean, one.n) == (0.75, 1)
    assert 0 < one.low < 0.25
    assert one.high == pytest.approx(0.97, abs=0.03)
    assert clusters.share([], []).n == 0
    assert math.isnan(clusters.share([], []).mean)


def test_the_interval_of_a_share_covers_the_truth_where_clusters_depend():
    rng = np.random.default_rng(2)
    owner, covered, naive = np.repeat(np.arange(60), 6), 0, 0
    for _ in range(400):
        p = rng.beta(3, 1.2, size=60)  # each prompt has its own difficulty
        outcomes = (rng.random(360) < p[owner]).astype(float)
        truth = 3 / 4.2
        found, simple = clusters.share(outcomes, owner), proportion_interval(int(outcomes.sum()), 360)
        covered += found.low <= truth <= found.high
        naive += simple.low <= truth <= simple.high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.9


def test_the_jackknife_of_a_mean_is_the_formula():
    x = np.random.default_rng(4).normal(size=80)
    found = clusters.jackknife(lambda kept: float(x[kept].mean()), np.arange(80))
    assert ends(found) == pytest.approx(ends(mean_interval(x)))


def test_the_jackknife_leaves_out_whole_clusters():
    x = np.random.default_rng(5).normal(size=80)
    twice = np.repeat(x, 2)
    found = clusters.jackknife(lambda kept: float(twice[kept].mean()), np.repeat(np.arange(80), 2))
    assert ends(found) == pytest.approx(ends(mean_interval(x)))
    assert found.n == 80


def test_few_groups_do_for_many_clusters():
    x = np.random.default_rng(6).normal(size=3000)
    calls = []

    def mean(kept):
        calls.append(len(kept))
        return float(x[kept].mean())

    found = clusters.jackknife(mean, np.arange(3000))
    assert calls == [3000, *[2985] * 200]
    width, expected = found.high - found.low, mean_interval(x)
    assert width == pytest.approx(expected.high - expected.low, rel=0.25)


def test_the_jackknife_is_symmetric_on_the_scale_it_is_given():
    x = np.random.default_rng(7).lognormal(size=60)
    found = clusters.jackknife(lambda k: float(x[k].mean()), np.arange(60), forward=math.log, back=math.exp)
    assert found.high / found.mean == pytest.approx(found.mean / found.low)


def test_a_statistic_off_the_scale_or_undefined_has_no_interval():
    def always(value):
        return clusters.jackknife(lambda kept: value, np.arange(9), forward=math.atanh, back=math.tanh)

    for value in (1.0, math.nan):
        assert math.isnan(always(value).low)
        assert always(value).n == 9
    once = clusters.jackknife(lambda k: 0.0 if len(k) == 9 else math.nan, np.arange(9))
    assert math.isnan(once.high)


def test_few_clusters_are_covered_as_often_as_many():
    """With the normal quantile these intervals of five or six clusters cover 0.87 to 0.90 of the time."""
    rng, owner, runs = np.random.default_rng(8), np.repeat(np.arange(6), 4), 600
    covered, normal = np.zeros(3), np.zeros(3)
    for _ in range(runs):
        x = (rng.normal(size=6) + 1)[owner] + 0.3 * rng.normal(size=24)
        right = (rng.random(24) < rng.beta(6, 4, size=6)[owner]).astype(float)
        found = (
            (clusters.mean(x, owner), 1.0),
            (clusters.jackknife(lambda kept, x=x: float(x[kept].mean()), owner), 1.0),
            (clusters.share(right, owner), 0.6),
        )
        for i, (e, truth) in enumerate(found):
            covered[i] += e.low <= truth <= e.high
            normal[i] += abs(e.mean - truth) <= (e.high - e.low) / 2 * Z95 / student95(5)
    assert (covered / runs >= 0.93).all(), covered / runs
    assert (normal[:2] / runs <= 0.92).all()
