"""Length control: nothing is left where length explains all, everything where it explains nothing."""

import numpy as np
import pytest

from policy.evaluate.best_of_n import best_of_figures, best_of_n, chosen_weights, rank_weights
from rlhf.stats.length_control import length_controlled, line, win_rate_at_equal_length

N = 300


def pairs(*, by_length, gain, noise=0.5, longer=6.0, seed=0, samples=2):
    """Scores whose difference is gain + by_length a token + noise; the second side is longer on average."""
    rng = np.random.default_rng(seed)
    short, long = rng.integers(20, 60, N).astype(float), None
    long = np.maximum(1, short + np.round(rng.normal(longer, 8, N)))
    level = rng.normal(size=N)
    before = level + by_length * short
    after = level + by_length * long + gain + noise * rng.normal(size=N)
    return before, after, short, long, np.arange(N) // samples


def holds(figure, truth):
    low, high = figure["ci95"]
    return low <= truth <= high


def test_where_length_explains_everything_nothing_is_left():
    found = length_controlled(*pairs(by_length=0.2, gain=0.0))
    assert found["gain"]["ci95"][0] > 0.8  # 6 tokens at 0.2 each
    assert holds(found["gain_at_equal_length"], 0)
    assert abs(found["gain_at_equal_length"]["mean"]) < 0.15
    assert holds(found["gain_a_token"], 0.2)
    assert holds(found["win_rate_at_equal_length"], 0.5)
    assert found["about_equal"]["gain"]["mean"] < 0.4 < found["gain"]["mean"]
    exact = length_controlled(*pairs(by_length=0.2, gain=0.0, noise=0.0))
    assert exact["gain_at_equal_length"]["mean"] == pytest.approx(0, abs=1e-9)
    assert exact["gain_at_equal_length"]["ci95"] == pytest.approx([0, 0], abs=1e-9)


def test_where_it_explains_nothing_all_of_the_gain_is_left():
    found = length_controlled(*pairs(by_length=0.0, gain=1.0, noise=1.0))
    for figure in (found["gain"], found["gain_at_equal_length"], found["about_equal"]["gain"]):
        assert holds(figure, 1)
        assert figure["ci95"][0] > 0.6
    assert found["win_rate_at_equal_length"]["ci95"][0] > 0.7
    assert holds(found["gain_a_token"], 0)
    assert found["gain"]["n"] == found["gain_at_equal_length"]["n"] == N // 2  # prompts, not pairs


def test_shorter_and_better_is_found_behind_a_judge_that_likes_length():
    found = length_controlled(*pairs(by_length=0.2, gain=1.0, longer=-10.0))
    assert found["gain"]["ci95"][1] < 0
    assert found["gain_at_equal_length"]["ci95"][0] > 0.7
    assert found["win_rate_at_equal_length"]["ci95"][0] > 0.5


def test_the_interval_covers_the_truth():
    hits = [
        holds(length_controlled(*pairs(by_length=0.1, gain=0.3, seed=s))["gain_at_equal_length"], 0.3)
        for s in range(20)
    ]
    assert 0.8 <= np.mean(hits) <= 1


def test_the_line_is_the_least_squares_line():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=30), rng.normal(size=30), rng.random(30)
    slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(w))
    assert line(x, y, w) == pytest.approx((intercept, slope))
    assert line(np.zeros(3), np.arange(3.0), np.ones(3))[0] == 1
    assert np.isnan(line(np.full(3, 2.0), np.arange(3.0), np.ones(3))).all()
    assert np.isnan(line(x, y, 0 * w)).all()


def test_the_win_rate_is_that_of_a_logistic_regression():
    rng = np.random.default_rng(0)
    more = rng.normal(size=20_000) * 4
    p = 1 / (1 + np.exp(-(0.7 + 1.5 * np.tanh(more / more.std()))))
    won = (rng.random(20_000) < p).astype(float)
    found = win_rate_at_equal_length(more, won, np.ones(20_000))
    assert found == pytest.approx(1 / (1 + np.exp(-0.7)), abs=0.01)
    assert win_rate_at_equal_length(np.zeros(8), np.full(8, 0.5), np.ones(8)) == pytest.approx(0.5)
    assert 0.9 < win_rate_at_equal_length(np.zeros(8), np.ones(8), np.ones(8)) < 1


def test_what_cannot_be_known_is_none_and_ties_of_length_are_no_trouble():
    always = length_controlled([0.0, 1.0, 2.0], [1.0, 2.0, 4.0], [8.0] * 3, [16.0] * 3, range(3))
    assert always["gain_at_equal_length"]["mean"] is None
    assert always["about_equal"] == {
        "gain": {"mean": None, "ci95": None, "n": 0}, "win_rate": {"mean": None, "ci95": None, "n": 0},
        "pairs": 0,
    }  # fmt: skip
    same = length_controlled([0.0, 1.0, 2.0], [1.0, 2.0, 4.0], [8.0] * 3, [8.0] * 3, range(3))
    at_equal, gain = same["gain_at_equal_length"], same["gain"]
    assert at_equal["mean"] == pytest.approx(gain["mean"])
    assert at_equal["ci95"] == pytest.approx(gain["ci95"])
    assert same["gain_a_token"]["mean"] is None
    assert same["about_equal"]["pairs"] == 3
    with pytest.raises(ValueError, match="entries"):
        length_controlled([0.0], [1.0, 2.0], [1.0, 1.0], [1.0, 1.0], [0, 1])


def test_a_weight_counts_as_often_as_it_says():
    columns = [np.array(c) for c in ([0.0, 1.0, 2.0], [1.0, 0.0, 5.0], [9.0, 9.5, 8.0], [9.0, 10.0, 8.0])]
    weighted = length_controlled(*columns, [0, 1, 2], [1, 2, 0])
    repeated = length_controlled(*(c[[0, 1, 1]] for c in columns), [0, 1, 1])
    assert weighted["gain_at_equal_length"]["mean"] == pytest.approx(repeated["gain_at_equal_length"]["mean"])
    assert weighted["gain"]["mean"] == pytest.approx(repeated["gain"]["mean"])
    assert weighted["about_equal"]["pairs"] == 2


# --- best of n -------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_best_of_n_in_the_samples_own_order():
    proxy = np.array([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 0.0, 2.0]])
    for n in (1, 2, 4):
        weights = chosen_weights(proxy, n)
        assert weights.sum(axis=1) == pytest.approx([1, 1])
        values = np.array([[5.0, -1.0, 2.0, 0.5], [0.0, 4.0, 9.0, 1.0]])
        assert (weights * values).sum(axis=1) == pytest.approx(best_of_n(proxy, values, n))
    assert chosen_weights(proxy[:1], 2)[0] == pytest.approx(rank_weights(4, 2)[[3, 1, 2, 0]])


def test_best_of_n_by_a_proxy_that_is_length_gains_nothing_at_equal_length():
    rng = np.random.default_rng(1)
    lengths, own = rng.integers(5, 50, (80, 8)).astype(float), rng.integers(5, 50, 80).astype(float)
    scores, before = {"reward": 0.1 * lengths}, {"reward": 0.1 * own}
    found = best_of_figures(
        scores, before, before, np.zeros(80), proxy="reward", judge="reward", lengths=(lengths, own)
    )
    first, last = found["rows"][0], found["rows"][-1]
    assert last["length_controlled"]["gain"]["ci95"][0] > 1
    assert last["length_controlled"]["gain_at_equal_length"]["mean"] == pytest.approx(0, abs=1e-9)
    assert last["length"]["mean"] > first["length"]["mean"] == pytest.approx(lengths.mean())
    bare = best_of_figures(scores, before, before, np.zeros(80), proxy="reward", judge="reward")
    assert "length_controlled" not in bare["rows"][0]


def test_pairs_of_about_equal_length_are_counted_by_what_their_weights_are_worth():
    scores, lengths, owner = np.arange(6.0), np.full(6, 20.0), np.arange(6)

    def count(w):
        found = length_controlled(scores, scores + 1, lengths, lengths, owner, w)
        return found["about_equal"]["pairs"]

    assert count(None) == count([3.0] * 6) == 6
    assert count([1, 0, 0, 0, 0, 0]) == count([1, 1e-6, 1e-6, 0, 0, 0]) == 1
    assert count([2, 1, 1, 0, 0, 0]) == 3  # 16 / 6
    assert count([0.0] * 6) == 0
