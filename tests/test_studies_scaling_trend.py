import math
from dataclasses import replace

import numpy as np
import pytest

from rlhf.stats.intervals import student95
from studies.engine.seeds import SeedMean
from studies.scaling.trend import RESIDUALS, SEEDS, fit

SIZES = (196_608.0, 1_572_864.0, 5_308_416.0)
X = np.log(SIZES)
MANY = tuple(np.exp(np.arange(10.0, 17.0)))  # seven rungs


def points(values):
    """values [rung][seed] as points without an error over items."""
    return [[SeedMean(float(y)) for y in seeds] for seeds in values]


def test_the_slope_is_that_of_polyfit_over_the_means_of_the_rungs():
    values = np.random.default_rng(0).standard_normal((3, 4))
    slope, intercept = np.polyfit(X, values.mean(axis=1), 1)
    found = fit(SIZES, points(values))
    assert found.slope.mean == pytest.approx(slope)
    assert found.intercept == pytest.approx(intercept)
    assert found.misfit == pytest.approx(
        np.abs(values.mean(axis=1) - np.polyval([slope, intercept], X)).max()
    )
    assert (found.method, found.rungs, found.slope.n) == (SEEDS, 3, 4)


def test_the_interval_over_seeds_is_students_t_of_the_slopes_of_the_seeds():
    values = np.random.default_rng(1).standard_normal((3, 3))
    slopes = [np.polyfit(X, values[:, s], 1)[0] for s in range(3)]
    half = 4.302653 * np.std(slopes, ddof=1) / math.sqrt(3)
    found = fit(SIZES, points(values)).slope
    assert found.high - found.mean == pytest.approx(half, rel=1e-4)
    assert found.mean - found.low == pytest.approx(half, rel=1e-4)


@pytest.mark.parametrize("rungs", [3, 5, 7])
def test_the_interval_of_one_seed_is_the_classical_one_of_least_squares(rungs):
    x = np.log(MANY[:rungs])
    y = np.random.default_rng(rungs).standard_normal(rungs)
    _, covariance = np.polyfit(x, y, 1, cov=True)
    found = fit(MANY[:rungs], points(y[:, None]))
    assert found.slope.high - found.slope.mean == pytest.approx(
        student95(rungs - 2) * math.sqrt(covariance[0, 0])
    )
    assert (found.method, found.slope.n) == (RESIDUALS, rungs)


def coverage(sizes, seeds, rng, *, spread, items, runs=1500):
    """How often the interval holds the true slope 0.1."""
    x, held = np.log(sizes), 0
    for _ in range(runs):
        truth = 0.1 * x[:, None] + spread * rng.standard_normal((len(sizes), seeds))
        seen = [[SeedMean(float(y + items * rng.standard_normal()), items) for y in row] for row in truth]
        slope = fit(sizes, seen).slope
        held += slope.low <= 0.1 <= slope.high
    return held / runs


@pytest.mark.parametrize(("sizes", "seeds"), [(SIZES, 3), (SIZES, 5), (MANY, 1)])
def test_the_interval_holds_the_truth_95_times_in_100(sizes, seeds):
    found = coverage(sizes, seeds, np.random.default_rng(2), spread=0.3, items=1e-9)
    assert abs(found - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1500)


def test_seeds_that_agree_by_chance_do_not_hide_the_noise_of_the_items():
    found = coverage(SIZES, 3, np.random.default_rng(3), spread=0.0, items=0.3)
    assert found > 0.95  # the wider of two intervals covers more often


def test_items_that_all_rungs_met_are_paired():
    rng = np.random.default_rng(4)
    hard = 3.0 * rng.standard_normal(50)
    rungs = [hard + 0.2 * x + 0.01 * rng.standard_normal(50) for x in X]
    found = fit(SIZES, [[SeedMean.of(r)] for r in rungs]).slope
    by_item = [np.polyfit(X, [r[i] for r in rungs], 1)[0] for i in range(50)]
    assert found.mean == pytest.approx(np.mean(by_item))
    apart = fit(SIZES, [[replace(SeedMean.of(r), items=None)] for r in rungs]).slope
    assert apart.high - apart.low > 10 * (found.high - found.low)


def test_two_rungs_have_no_trend():
    assert fit(SIZES[:2], points([[1.0, 2.0], [2.0, 3.0]])) is None


def test_what_is_not_known_stays_unknown():
    found = fit(SIZES, [[SeedMean(1.0)], [SeedMean(math.nan)], [SeedMean(2.0)]])
    assert math.isnan(found.slope.mean)
    assert found.as_dict()["slope"] == {"mean": None, "ci95": None, "n": 3}
    assert found.as_dict()["misfit"] is None


def test_three_models_of_two_sizes_have_no_trend_and_equal_sizes_do_no_harm():
    assert fit((1.0, 1.0, 2.0), points([[1.0]] * 3)) is None
    values = np.random.default_rng(5).standard_normal((4, 1))
    x = np.log([1.0, 1.0, 2.0, 5.0])
    assert fit((1.0, 1.0, 2.0, 5.0), points(values)).slope.mean == pytest.approx(
        np.polyfit(x, values[:, 0], 1)[0]
    )


@pytest.mark.parametrize("values", [[[1.0, 2.0], [1.0], [1.0, 2.0]], [[1.0]] * 2])
def test_a_ladder_with_holes_is_refused(values):
    with pytest.raises(ValueError, match="same seeds"):
        fit(SIZES, points(values))
