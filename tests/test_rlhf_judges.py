"""The gold judge orders sentences as people do, and the annotator errs exactly as often as it says."""

from __future__ import annotations

import itertools
import math
import sys
import zipfile

import numpy as np
import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st

from rlhf.collect import judges
from rlhf.collect.judges import JUDGES, noisy_ranks, pair_agreement, vader
from rlhf.errors import UserError

SENTENCE_POLARITY = DATA / "sentence_polarity" / "sentence_polarity.zip"


def test_vader_orders_obvious_sentences() -> None:
    sentences = [
        "it was a wonderful evening and I loved every minute!",
        "it was a good evening.",
        "it was an evening in the town hall.",
        "it was not a good evening.",
        "it was a horrible, disgusting evening and I hated it!",
    ]
    scores = vader(sentences)
    assert all(better > worse for better, worse in itertools.pairwise(scores))
    assert scores[2] == 0
    assert all(-1 <= score <= 1 for score in scores)
    # A batch is judged text by text: neither the order nor the neighbors matter.
    assert vader(sentences[::-1]) == scores[::-1]
    assert vader([""]) == [0.0]
    assert vader([]) == []
    assert JUDGES["vader"]([()] * 5, sentences) == scores


def test_vader_refuses_one_string() -> None:
    with pytest.raises(TypeError, match="sequence of texts"):
        vader("a good evening")


def test_vader_is_loaded_once_and_its_absence_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judges._vader_analyzer() is judges._vader_analyzer()
    judges._vader_analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        vader(["good"])
    monkeypatch.undo()
    assert vader(["good"])[0] > 0  # the failure must not be remembered


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_every_pair_is_ordered_with_the_bradley_terry_probability(noise: float) -> None:
    gold = [0.62, -0.3, 0.44, 0.0]
    draws = 20_000
    rng = np.random.default_rng(7)
    ranks = np.array([noisy_ranks(gold, noise=noise, rng=rng) for _ in range(draws)])
    for i, j in itertools.combinations(range(len(gold)), 2):
        expected = 1 / (1 + math.exp(-(gold[i] - gold[j]) / noise))
        standard_error = math.sqrt(expected * (1 - expected) / draws)
        assert abs((ranks[:, i] < ranks[:, j]).mean() - expected) < 4 * standard_error, (i, j)


def test_whole_rankings_follow_the_plackett_luce_law() -> None:
    gold, noise, draws = [0.6, 0.1, -0.2], 0.5, 20_000
    rng = np.random.default_rng(11)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        ranks = tuple(noisy_ranks(gold, noise=noise, rng=rng))
        counts[ranks] = counts.get(ranks, 0) + 1
    weights = [math.exp(score / noise) for score in gold]
    for order in itertools.permutations(range(3)):  # order[0] is the best response
        expected, left = 1.0, sum(weights)
        for item in order:
            expected *= weights[item] / left
            left -= weights[item]
        standard_error = math.sqrt(expected * (1 - expected) / draws)
        observed = counts.get(tuple(order.index(item) for item in range(3)), 0) / draws
        assert abs(observed - expected) < 4 * standard_error, order


def test_without_noise_ranks_are_the_sorted_order_with_dense_ties() -> None:
    rng = np.random.default_rng(0)
    assert noisy_ranks([0.0, 0.9, 0.0, -0.4], noise=0, rng=rng) == [1, 0, 1, 2]
    assert noisy_ranks([-0.0, 0.0], noise=0, rng=rng) == [0, 0]
    assert noisy_ranks([], noise=0, rng=rng) == []


@given(
    gold=st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8),
    noise=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ranks_are_dense_and_repeat_with_the_seed(gold: list[float], noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks = noisy_ranks(gold, noise=noise, rng=rng)
    assert len(ranks) == len(gold)
    assert all(type(rank) is int for rank in ranks)
    assert set(ranks) == set(range(max(ranks) + 1))
    if noise == 0:
        assert ranks == [sorted(set(gold), reverse=True).index(score) for score in gold]
    assert ranks == noisy_ranks(gold, noise=noise, rng=np.random.default_rng(seed))
    # The stream moves on by the same amount whatever the noise.
    other = np.random.default_rng(seed)
    noisy_ranks(gold, noise=1.5, rng=other)
    assert rng.random() == other.random()


def test_different_seeds_give_different_annotators() -> None:
    rankings = {
        tuple(noisy_ranks([0.0] * 6, noise=0.3, rng=np.random.default_rng(seed))) for seed in range(20)
    }
    assert len(rankings) > 10


@pytest.mark.parametrize("noise", [-0.1, math.nan, math.inf])
def test_an_impossible_noise_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match="noise must be finite"):
        noisy_ranks([0.0, 1.0], noise=noise, rng=np.random.default_rng(0))


@pytest.mark.parametrize("gold", [[0.0, math.nan], [math.inf, 0.0], [[0.0, 1.0]]])
def test_scores_that_cannot_be_ranked_are_refused(gold: list[float]) -> None:
    with pytest.raises(ValueError, match="finite scores"):
        noisy_ranks(gold, noise=0.3, rng=np.random.default_rng(0))


def test_pair_agreement_by_hand() -> None:
    assert pair_agreement([0.9, 0.5, 0.1], [0, 1, 2]) == (3.0, 3)
    assert pair_agreement([0.9, 0.5, 0.1], [2, 1, 0]) == (0.0, 3)
    assert pair_agreement([0.9, 0.5, 0.1], [1, 0, 2]) == (2.0, 3)
    assert pair_agreement([0.9, 0.5, 0.1], [0, 1, 1]) == (2.0, 2)  # a tied label is no pair
    assert pair_agreement([0.5, 0.5, 0.1], [0, 1, 2]) == (2.5, 3)  # equal gold: half right
    assert pair_agreement([0.5, 0.5], [0, 0]) == (0.0, 0)
    assert pair_agreement([], []) == (0.0, 0)
    with pytest.raises(ValueError, match="zip"):
        pair_agreement([0.5, 0.5], [0])


def test_no_scorer_beats_the_ceiling_that_pair_agreement_measures() -> None:
    rng = np.random.default_rng(3)
    noise = 0.4
    agreeing = expected = other = pairs = 0.0
    for _ in range(5_000):
        gold = rng.uniform(-1, 1, size=4)
        ranks = noisy_ranks(gold.tolist(), noise=noise, rng=rng)
        for i, j in itertools.combinations(range(4), 2):
            expected += 1 / (1 + math.exp(-abs(gold[i] - gold[j]) / noise))
        right, number = pair_agreement(gold.tolist(), ranks)
        agreeing, pairs = agreeing + right, pairs + number
        other += pair_agreement((gold + rng.normal(0, 0.2, size=4)).tolist(), ranks)[0]
    assert pairs == 30_000
    # Pairs of one prompt share responses, so the error is a little above the 0.0025 of independent pairs.
    assert abs(agreeing / pairs - expected / pairs) < 0.012
    assert other / pairs < agreeing / pairs - 0.005


@pytest.mark.skipif(
    not SENTENCE_POLARITY.is_file(), reason=f"needs the Pang and Lee 2005 sentences at {SENTENCE_POLARITY}"
)
def test_vader_separates_reviewers_sentences() -> None:
    with zipfile.ZipFile(SENTENCE_POLARITY) as archive:
        positive, negative = (
            archive.read(f"sentence_polarity/rt-polarity.{side}").decode("latin-1").splitlines()[::5]
            for side in ("pos", "neg")
        )
    assert len(positive) == len(negative) == 1067
    high, low = np.array(vader(positive)), np.array(vader(negative))
    # The probability that a positive sentence outscores a negative one, ties counting half.
    wins = (high[:, None] > low).mean() + 0.5 * (high[:, None] == low).mean()
    # Measured: 0.711 here and 0.695 on all 10,662 sentences; the sign of the score is right for 63 in 100.
    # One sentence of a film review is hard for a lexicon; the lab needs a known judge, not a perfect one.
    assert wins > 0.68
