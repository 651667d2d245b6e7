"""What a reader needs first: clusters, a bag of words, ceilings, variance, against plain loops."""

import itertools
import math
import random

import numpy as np
import pytest
import scipy
from test_reward_card_figures import card, comparison, found, many, scores_for

from reward.card.baselines import fit_bag_of_words, fit_pairs
from reward.card.calibration import MOST_PAIRS, labeled_pairs, possible_pairs
from reward.card.ceiling import MOST_RESPONSES, annotator_agreement, duplicate_agreement
from reward.card.clusters import clusters, suite_item
from reward.card.report import as_markdown
from reward.card.variance import variance_components
from rlhf.data.comparisons import Comparison, Message


def pair(a, b, prompt="p", group=None, confidence=None):
    return Comparison((Message("user", prompt),), (a, b), (0, 1), "s", confidence, group)


# --- clusters --------------------------------------------------------------------------------------------


def test_the_cluster_is_the_group_then_the_prompt_then_what_shares_a_response():
    grouped = [pair("a", "b", "p", "x"), pair("c", "d", "q", "x"), pair("e", "f", "q")]
    assert (clusters(grouped).of_C.tolist(), clusters(grouped).unit) == ([0, 0, 1], "groups")
    plain = [pair("a", "b", "p"), pair("c", "d", "q"), pair("a", "d", "p")]
    assert (clusters(plain).of_C.tolist(), clusters(plain).unit) == ([0, 1, 0], "prompts")
    one = [pair("a", "b"), pair("c", "d"), pair("b ", "e"), pair("f", "g"), pair("h", "i")]
    assert (clusters(one).of_C.tolist(), clusters(one).unit) == ([0, 1, 0, 2, 3], "sets of responses")
    pool = [pair(a, b) for a, b in itertools.combinations("abcd", 2)]
    assert (clusters(pool).of_C.tolist(), clusters(pool).unit) == ([0, 1, 2, 3, 4, 5], "comparisons")


def test_the_cells_of_a_benchmark_s_item_are_one_cluster():
    item = [pair("a", "b", "p", f"rm_bench:8:{c}:0") for c in range(3)] + [
        pair("a", "b", "q", "rm_bench:9:0:0")
    ]
    assert clusters(item).of_C.tolist() == [0, 0, 0, 1]
    assert suite_item("reward_bench_2:tied:12") == ("rewardbench2", "tied:12")
    assert suite_item("ban plastic: for") is suite_item(None) is None


def test_one_prompt_for_all_still_has_an_interval():
    cs = [pair(f"good {i}", f"bad {i}") for i in range(50)]
    scores = np.where(np.arange(100) % 2 == 0, 1.0, 0.0)
    scores[:20] = scores[:20][::-1]
    told = found(cs, scores)
    assert (told["prompts"], told["unit"], told["clusters"]) == (1, "sets of responses", 50)
    overall = told["accuracy"]["overall"]
    assert overall["n"] == 50
    error = math.sqrt(0.8 * 0.2 / 49)
    assert overall["ci95"] == pytest.approx([0.8 - 1.96 * error, 0.8 + 1.96 * error], abs=0.03)  # Wilson
    page = as_markdown(card(cs, scores))
    assert "50 sets of responses" in page
    assert "all comparisons have one prompt" in page


# --- pairs of very large comparisons ---------------------------------------------------------------------


def test_ten_thousand_responses_to_one_prompt_are_sampled_and_counted():
    ranks = list(range(10_000))
    random.Random(0).shuffle(ranks)
    better, worse, owner = labeled_pairs([ranks, [1, 0]])
    assert better.size == MOST_PAIRS + 1
    assert len(set(zip(better.tolist(), worse.tolist(), strict=True))) == better.size
    assert all(ranks[a] < ranks[b] for a, b in zip(better[:-1], worse[:-1], strict=True))
    assert (better[-1], worse[-1], owner[-1]) == (10_001, 10_000, 1)
    assert np.array_equal(better, labeled_pairs([ranks, [1, 0]])[0])
    assert abs(np.corrcoef(better[:-1], worse[:-1])[0, 1]) < 0.05
    assert possible_pairs(ranks) == 10_000 * 9_999 // 2


def test_all_pairs_stay_where_ties_leave_few_of_many():
    ranks = [1] * 5_000 + [0] + [1] * 4_000
    better, worse, _ = labeled_pairs([ranks])
    assert set(better.tolist()) == {5_000}
    assert sorted(worse.tolist()) == [i for i in range(9_001) if i != 5_000]
    assert possible_pairs(ranks) == 9_000


def test_the_page_says_how_many_pairs_are_left_out():
    cs = [
        comparison("p", [f"r {i}" for i in range(150)], list(range(150))),
        comparison("q", ["a", "b"], [0, 1]),
    ]
    told = card(cs, -np.arange(152.0))
    assert told["pairs_left_out"] == 150 * 149 // 2 - MOST_PAIRS
    assert "1,175 pairs of very large comparisons are left out" in as_markdown(told)


# --- bag of words ----------------------------------------------------------------------------------------


def says(rng, word, n):
    words = [str(w) for w in rng.choice(list("bcdefgh"), n)]
    return " ".join([*words, word])


def test_a_bag_of_words_finds_the_word_that_is_preferred():
    rng = np.random.default_rng(0)
    cs = [pair(says(rng, "Kind", 6), says(rng, "rude", 6), f"p{i}") for i in range(60)]
    bag = fit_bag_of_words(cs, seed=0)
    kind, rude, nothing = bag.scores(["kind", "RUDE", "zzz"])
    assert kind > nothing == 0 > rude
    assert (bag.pairs, len(bag.vocabulary)) == (60, 9)
    assert np.array_equal(fit_bag_of_words(cs, seed=0).weights_V, bag.weights_V)


def test_without_a_pair_or_a_word_there_is_no_bag():
    assert fit_bag_of_words([], seed=0) is None
    assert fit_bag_of_words([pair(" ", "  ")], seed=0) is None
    assert fit_bag_of_words([pair("a", "b")], seed=0) is not None  # one pair: the middle penalty


def test_the_fit_is_where_the_gradient_of_the_logistic_loss_is_zero():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 3))
    w = fit_pairs(scipy.sparse.csr_matrix(x), 0.1)
    gradient = 0.1 * w - (x / (1 + np.exp(x @ w))[:, None]).mean(0)
    assert gradient == pytest.approx(np.zeros(3), abs=1e-4)
    assert fit_pairs(x, 0.1) == pytest.approx(w, abs=1e-4)


def test_what_the_model_adds_is_paired():
    cs = many()
    model, bag = scores_for(cs), scores_for(cs, seed=5, skill=0.2)
    told = found(cs, model, bag_R=bag)
    other = found(cs, bag)["accuracy"]["overall"]
    base = told["baselines"]
    assert base["bag_of_words"] == other
    assert base["adds"]["bag_of_words"]["mean"] == pytest.approx(
        told["accuracy"]["overall"]["mean"] - other["mean"]
    )
    assert (
        base["adds"]["bag_of_words"]["ci95"]
        == found(cs, model, against_R=bag)["against"]["difference"]["ci95"]
    )
    assert base["longer_is_better"] == told["length"]["longer_is_better"]
    alike = {g["group"]: g for g in told["accuracy"]["by_better_length"]}["about equal"]
    assert base["like_length"] == {k: v for k, v in alike.items() if k != "group"}
    assert found(cs, model)["baselines"]["bag_of_words"] is None


# --- ceilings --------------------------------------------------------------------------------------------


def test_the_agreement_of_annotators_is_the_mean_of_what_is_known():
    cs = [pair("a", "b", "p", confidence=0.8), pair("a", "c", "q", confidence=0.6), pair("a", "d", "r")]
    told = annotator_agreement(cs, clusters(cs).of_C)
    assert (told["mean"], told["pairs"]) == (pytest.approx(0.7), 2)
    assert annotator_agreement(cs[2:], np.zeros(1, int)) is None


def test_judgments_of_the_same_pair_are_found_whatever_their_order():
    votes = [
        pair("a", "b"),
        pair("b", "a "),
        pair("a", "b"),
        pair("c", "d"),
        pair("c", "d"),
        pair("a", "b", "q"),
    ]
    told = duplicate_agreement(votes)
    assert (told["mean"], told["pairs"]) == (pytest.approx((1 / 3 + 1) / 2), 2)
    turned = [Comparison(v.prompt, v.responses[::-1], v.ranks[::-1], "s") for v in votes[::2]] + votes[1::2]
    assert duplicate_agreement(turned)["mean"] == pytest.approx(told["mean"])
    assert duplicate_agreement(votes[3:4]) is None
    cell = pair("a", "b", "p", "rm_bench:1:0:0")
    assert duplicate_agreement([cell, cell]) is None
    large = comparison("p", [str(i) for i in range(MOST_RESPONSES + 1)], list(range(MOST_RESPONSES + 1)))
    assert duplicate_agreement([large, large]) is None


def test_what_the_model_adds_to_a_probe_is_paired_on_the_pairs_that_the_probe_knows():
    cs = [pair(f"good {i}", f"bad {i}", f"p{i}") for i in range(40)]
    mine, theirs = np.tile([1.0, 0.0], 40), np.tile([1.0, 0.0], 40)
    for i in (0, 1, 2, 3):
        mine[2 * i : 2 * i + 2] = 0, 1
    for i in (0, 1, 2, 3, 4, 5):
        theirs[2 * i : 2 * i + 2] = 0, 1
    theirs[-4] = np.nan
    probe = found(cs, mine, probes_R={"last": theirs, "best": np.full(80, np.nan)})["probe"]
    assert set(probe) == {"last", "adds_last"}
    assert (probe["last"]["pairs"], probe["last"]["mean"]) == (39, pytest.approx(33 / 39))
    difference = np.array([0.0] * 4 + [1.0] * 2 + [0.0] * 33)  # no more than two pairs differ
    half = 2.0244 * difference.std(ddof=1) / math.sqrt(39)
    assert probe["adds_last"]["mean"] == pytest.approx(2 / 39)
    assert probe["adds_last"]["ci95"] == pytest.approx([2 / 39 - half, 2 / 39 + half], abs=0.003)
    assert found(cs, mine)["probe"] is None


# --- variance --------------------------------------------------------------------------------------------


def test_variance_components_are_those_that_made_the_scores():
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(3000), rng.integers(1, 6, 3000))
    scores = rng.normal(0, 2, 3000)[prompt] + rng.normal(0, 0.5, prompt.size)
    within, between = variance_components(scores, prompt)
    assert within == pytest.approx(0.25, rel=0.05)
    assert between == pytest.approx(4, rel=0.08)
    even = rng.normal(size=(50, 4))  # of equal sizes: the textbook's mean squares
    within, between = variance_components(even.ravel(), np.repeat(np.arange(50), 4))
    assert within == pytest.approx(even.var(axis=1, ddof=1).mean())
    assert between == pytest.approx(max(0, even.mean(1).var(ddof=1) - within / 4))


def test_a_response_in_two_comparisons_counts_once_for_the_variance():
    cs = [pair("a", "b", "p"), pair("a", "c", "p"), pair("d", "e", "q"), pair("f", "g", "r")]
    told = found(cs, [1, 2, 1, 6, 5, 4, 0, 3])["variance"]
    assert told["within"]["responses"] == 7
    within = variance_components(np.array([1, 2, 6, 5, 4, 0, 3.0]), np.array([0, 0, 0, 1, 1, 2, 2]))[0]
    assert told["within"]["mean"] == pytest.approx(within)
    low, high = told["share"]["ci95"]
    assert 0 <= low <= high <= 1
    one = found([pair("a", "b"), pair("c", "d")], [1, 2, 3, 5])["variance"]
    assert one["within"]["mean"] > 0
    assert one["between"]["mean"] is one["share"]["mean"] is None


def test_the_page_begins_with_what_a_reader_needs():
    cs = many()
    told = card(cs, scores_for(cs), bag_R=scores_for(cs, seed=5, skill=0.2))
    figure = {"mean": 0.66, "ci95": [0.6, 0.72], "n": 20}
    told |= {
        "bag_of_words": {"words": 12, "pairs": 34},
        "probe": {"last": figure, "adds_last": figure, "best": {**figure, "layer": 14, "pooling": "mean"}},
        "ceiling": {"annotators": {**figure, "pairs": 7}, "duplicates": None, "noise": None},
        "curve": {
            "of": "probe",
            "points": [{"comparisons": 100, **figure, "pairs": 9, "fitted": 0.6}],
            "fit": None,
        },
    }
    page = as_markdown(told)
    assert page.index("## What a reader needs first") < page.index("## Accuracy")
    for part in (
        "12 words, fitted on 34 training pairs",
        "layer 14, mean",
        "ceiling: annotators | 66.0%",
        "| 7 |",
    ):
        assert part in page
    assert "ceiling: pairs judged again | not known" in page
    assert "ceiling: noise" not in page
    assert "## Variance of the score" in page
    assert "## Learning curve" in page
    bare = as_markdown(card(cs, scores_for(cs)))
    assert "bag of words | not known" in bare
    assert "linear probe | not known" in bare
