"""What scores are worth, in numbers: against loops, closed forms, numpy's own and simulations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.card import calibration as calibrate

RNG = np.random.default_rng
SMALL = settings(max_examples=60, deadline=None)


def calibrated(number, seed, slope=1.0):
    """Gaps whose sign is right with probability sigmoid(slope * |gap|)."""
    rng = RNG(seed)
    size = np.abs(rng.normal(scale=1.5, size=number))
    return np.where(rng.random(number) < 1 / (1 + np.exp(-slope * size)), size, -size)


# --- pairs and their outcomes ----------------------------------------------------------------------------


def test_every_ordered_pair_is_there_once_and_no_tied_one():
    ranks = [[1, 0, 1], [0, 2], [2, 0, 1, 0]]
    pairs = calibrate.labeled_pairs(ranks)
    flat = [r for k in ranks for r in k]
    owner = [i for i, k in enumerate(ranks) for _ in k]
    expected = {(i, j) for i in range(9) for j in range(9) if owner[i] == owner[j] and flat[i] < flat[j]}
    assert set(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == expected
    assert len(pairs.better) == len(expected) == 8
    assert pairs.comparison.tolist() == [owner[i] for i in pairs.better]
    assert [len(x) for x in calibrate.labeled_pairs([[0, 0]])] == [0, 0, 0]


def test_equal_scores_are_half_right():
    assert calibrate.right([2.0, 0.0, -1e-9]).tolist() == [1.0, 0.5, 0.0]


def test_losses_have_their_closed_forms_and_do_not_overflow():
    gaps = np.array([-3.0, 0.0, 1.0])
    p = 1 / (1 + np.exp(-gaps))
    assert calibrate.sigmoid(gaps) == pytest.approx(p)
    assert calibrate.log_loss(gaps) == pytest.approx(-np.log(p))
    assert calibrate.brier(gaps) == pytest.approx((1 - p) ** 2)
    with np.errstate(over="raise", invalid="raise"):
        assert calibrate.sigmoid([-1e4, 1e4]).tolist() == [0.0, 1.0]
        assert calibrate.sigmoid([-40.0])[0] == pytest.approx(math.exp(-40), rel=1e-12, abs=0)
        assert calibrate.log_loss([-1e4, 0.0]) == pytest.approx([1e4, math.log(2)])


# --- bins ------------------------------------------------------------------------------------------------


@SMALL
@given(st.integers(1, 60), st.integers(2, 12), st.randoms(use_true_random=False))
def test_bins_of_different_values_differ_by_at_most_one_and_do_not_depend_on_the_order(n, bins, random):
    x = list(range(n))
    random.shuffle(x)
    found = calibrate.equal_bins(x, bins)
    sizes = np.bincount(found, minlength=bins)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(found[np.argsort(x)]) >= 0).all()


def test_equal_values_are_never_torn_apart():
    found = calibrate.equal_bins([5, 1, 5, 5, 2, 5], 3)
    assert len({int(found[i]) for i in (0, 2, 3, 5)}) == 1
    assert calibrate.equal_bins([7.0] * 9, 4).tolist() == [calibrate.equal_bins([7.0], 4)[0]] * 9


def test_the_calibration_table_is_that_of_sorted_slices():
    gaps = calibrated(120, 0)
    by_size = sorted(gaps, key=abs)
    rows = calibrate.calibration_bins(gaps, np.arange(120), 4)
    assert len(rows) == 4
    for row, part in zip(rows, np.split(np.array(by_size), 4), strict=True):
        assert row["pairs"] == 30
        assert row["mean"] == pytest.approx((part > 0).mean())
        assert (row["low"], row["high"]) == (abs(part[0]), abs(part[-1]))
        assert row["mean_gap"] == pytest.approx(np.abs(part).mean())
        assert row["predicted"] == pytest.approx(np.mean([1 / (1 + math.exp(-abs(g))) for g in part]))


def test_the_calibration_error_is_the_weighted_distance_of_the_bins():
    gaps = calibrated(90, 1, slope=0.3)
    rows = calibrate.calibration_bins(gaps, np.arange(90), 7)
    found, _ = calibrate.calibration_error(gaps, np.arange(90), 7)
    expected = sum(r["pairs"] * abs(r["mean"] - r["predicted"]) for r in rows) / 90
    assert found.mean == pytest.approx(expected)
    assert found.low < expected < found.high


def test_the_calibration_error_by_chance_is_what_simulation_gives():
    size = np.abs(RNG(2).normal(size=600))
    p = 1 / (1 + np.exp(-size))
    rng = RNG(3)
    errors = [
        calibrate.calibration_error(np.where(rng.random(600) < p, size, -size), np.arange(600), 10)[0].mean
        for _ in range(200)
    ]
    _, by_chance = calibrate.calibration_error(size, np.arange(600), 10)
    assert by_chance == pytest.approx(np.mean(errors), rel=0.08)


def test_two_pairs_by_hand():
    # both in one bin: predicted (0.5 + 0.7311) / 2, right on 1/2 and 1
    found, _ = calibrate.calibration_error([0.0, 1.0], [0, 1], 1)
    assert found.mean == pytest.approx(0.75 - (0.5 + 1 / (1 + math.exp(-1))) / 2)
    assert math.isnan(calibrate.calibration_error([], [], 5)[0].mean)


# --- the slope -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.3, 1.0, 2.5])
def test_the_slope_is_found_again(slope):
    found = calibrate.slope(calibrated(6000, 4, slope), np.arange(6000))
    assert found.low < slope < found.high
    assert found.mean == pytest.approx(slope, abs=0.15 * slope)


def test_the_slope_has_the_highest_likelihood_and_its_error_is_the_curvature():
    gaps = calibrated(400, 5, 0.7)
    found = calibrate.slope(gaps, np.arange(400))

    def likelihood(b):
        return -sum(math.log1p(math.exp(-b * g)) for g in gaps)

    best, h = found.mean, 1e-3
    assert likelihood(best) > max(likelihood(best + h), likelihood(best - h))
    assert abs(likelihood(best + h) - likelihood(best - h)) / (2 * h) < 1e-3
    curvature = -(likelihood(best + h) - 2 * likelihood(best) + likelihood(best - h)) / h**2
    # of independent pairs and a model that holds, sandwich and information agree
    assert (found.high - found.low) / (2 * 1.959964) == pytest.approx(1 / math.sqrt(curvature), rel=0.1)


def test_the_slope_knows_of_clusters_and_of_units():
    gaps = calibrated(300, 6)
    once, name = calibrate.slope(gaps, np.arange(300)), np.repeat(np.arange(300), 4)
    often, tenfold = calibrate.slope(np.repeat(gaps, 4), name), calibrate.slope(10 * gaps, np.arange(300))
    assert [often.mean, often.low, often.high] == pytest.approx([once.mean, once.low, once.high])
    assert [tenfold.mean, tenfold.low] == pytest.approx([once.mean / 10, once.low / 10])


def test_the_slope_is_covered_by_its_interval_where_prompts_repeat():
    covered = 0
    for seed in range(200):
        rng = RNG([7, seed])
        size, sign = np.abs(rng.normal(size=80)), rng.random(80)
        gaps = np.where(sign < 1 / (1 + np.exp(-size)), size, -size)
        found = calibrate.slope(np.repeat(gaps, 3), np.repeat(np.arange(80), 3))
        covered += found.low <= 1 <= found.high
    assert 0.9 <= covered / 200 <= 0.99


@pytest.mark.parametrize("gaps", [[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0], [0.0, 3.0], []])
def test_without_rights_and_wrongs_there_is_no_slope(gaps):
    assert math.isnan(calibrate.slope(gaps, range(len(gaps))).mean)


def test_a_wild_spread_of_gaps_does_not_throw_newton_off():
    gaps = [1e6, 2e6, 5.0, -1e-3, 3e5, -40.0]
    b = calibrate.slope(gaps, range(6)).mean
    wrong = [g / (1 + math.exp(b * g)) if b * g < 700 else 0.0 for g in gaps]
    assert sum(wrong) == pytest.approx(0, abs=1e-6)
    assert math.isnan(calibrate.slope([1.0, 1.0, -1e-300], [0, 1, 2]).mean)
    # b = -17.84 balances x1 / 2 = x2 exp(-b x2) in these units
    far = calibrate.slope([5e-8, -1.0], [0, 1]).mean
    assert 1.0 / (1.0 + math.exp(-far)) == pytest.approx(2.5e-8, rel=1e-6)


@SMALL
@given(st.lists(st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=20))
def test_newton_ends_where_bisection_does(gaps):
    found = calibrate.slope(gaps, range(len(gaps))).mean
    if min(gaps) > 0 or max(gaps) < 0:
        assert math.isnan(found)
        return
    x = np.array(gaps) / max(map(abs, gaps))
    low, high = -1e9, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        uphill = (x * np.exp(-np.logaddexp(0, middle * x))).sum() > 0
        low, high = (middle, high) if uphill else (low, middle)
    assert found * max(map(abs, gaps)) == pytest.approx(low, rel=1e-4, abs=1e-6)


# --- correlations and length -----------------------------------------------------------------------------


def test_pearson_is_numpy_s_and_unknown_without_spread():
    x, y = RNG(8).normal(size=(2, 40))
    assert calibrate.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert math.isnan(calibrate.pearson(x, np.ones(40)))
    assert math.isnan(calibrate.pearson([1.0], [2.0]))


def test_spearman_sees_order_only_and_shares_ranks_of_ties():
    x = RNG(9).normal(size=50)
    found = calibrate.correlation(x, np.exp(3 * x), np.arange(50), by_rank=True)
    assert found.mean == pytest.approx(1.0)
    tied = calibrate.correlation([1, 2, 2, 3, 4, 5], [2, 1, 3, 3, 6, 5], range(6), by_rank=True)
    assert tied.mean == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4, 5, 6], [2, 1, 3.5, 3.5, 6, 5])[0, 1])


@pytest.mark.parametrize("by_rank", [False, True])
def test_the_interval_of_a_correlation_is_fisher_s_and_knows_of_clusters(by_rank):
    x, noise = RNG(10).normal(size=(2, 1500))
    y = 0.5 * x + noise
    once = calibrate.correlation(x, y, np.arange(1500), by_rank=by_rank)
    width = math.atanh(once.high) - math.atanh(once.low)
    assert width == pytest.approx(2 * 1.96 / math.sqrt(1497), rel=0.2)
    thrice = calibrate.correlation(
        np.repeat(x, 3), np.repeat(y, 3), np.repeat(np.arange(1500), 3), by_rank=by_rank
    )
    assert [thrice.low, thrice.high] == pytest.approx([once.low, once.high], abs=1e-3)


def test_centering_is_within_groups():
    assert calibrate.centered([1, 3, 10, 20, 5], [0, 0, 1, 1, 2]).tolist() == [-1, 1, -5, 5, 0]


def test_what_is_left_without_length_does_not_know_the_length():
    rng = RNG(11)
    owner = np.repeat(np.arange(50), 3)
    length, level = rng.integers(1, 90, 150).astype(float), rng.normal(size=50)
    scores = level[owner] + 0.02 * length + rng.normal(size=150)
    left, effect = calibrate.without_length(scores, length, owner)
    assert abs(calibrate.pearson(calibrate.centered(left, owner), calibrate.centered(length, owner))) < 1e-9
    slopes = np.linalg.lstsq(np.column_stack([length, np.eye(50)[owner]]), scores, rcond=None)[0]
    assert effect == pytest.approx(slopes[0])
    paid, more = calibrate.without_length(scores + 7 * length, length, owner)
    assert paid == pytest.approx(left)
    assert more == pytest.approx(effect + 7)


def test_equal_lengths_take_nothing_away():
    left, effect = calibrate.without_length([1.0, 2.0], [4, 4], [0, 0])
    assert (left.tolist(), effect) == ([1.0, 2.0], 0.0)
