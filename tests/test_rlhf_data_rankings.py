"""Pairwise votes as rankings: the fit against closed forms and a direct maximum, the dealing, the counts."""

import itertools
import random
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.comparisons import DUPLICATE, Comparison, Counts, Message, deduplicate, problem
from rlhf.data.rankings import as_rankings, dealt, decided, levels, log_strengths


def vote(winner, loser, prompt="q", group=None, source="s", turned=False):
    sides, ranks = ((loser, winner), (1, 0)) if turned else ((winner, loser), (0, 1))
    return Comparison((Message("user", prompt),), sides, ranks, source, 0.8, group)


def gradient(log_I, winners, losers):
    """Of the penalized log-likelihood, by a plain loop."""
    found = 0.5 - 1 / (1 + np.exp(-log_I))
    for i, j in zip(winners, losers, strict=True):
        chance = 1 / (1 + np.exp(log_I[j] - log_I[i]))
        found[i] += 1 - chance
        found[j] -= 1 - chance
    return found


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda p: p[0] != p[1]), max_size=40))
def test_the_fit_is_where_the_gradient_is_0(votes):
    winners, losers = ([v[k] for v in votes] for k in (0, 1))
    log_I = log_strengths(winners, losers, 6)
    assert abs(gradient(log_I, winners, losers)).max() < 1e-4
    assert np.isfinite(log_I).all()


def test_one_vote_has_a_closed_form():
    # by symmetry w_j = 1 / w_i: 1 - s(2x) + 1/2 - s(x) = 0 with x = log w_i
    (x, y) = log_strengths([0], [1], 2)
    assert x == pytest.approx(-y, abs=1e-5)
    assert 1 / (1 + np.exp(2 * x)) + 0.5 == pytest.approx(1 / (1 + np.exp(-x)), abs=1e-5)


def test_true_strengths_come_back():
    rng = np.random.default_rng(0)
    true_I = rng.normal(size=12)
    pairs = np.array([p for p in itertools.combinations(range(12), 2) for _ in range(200)])
    first = rng.random(len(pairs)) < 1 / (1 + np.exp(true_I[pairs[:, 1]] - true_I[pairs[:, 0]]))
    winners, losers = np.where(first, *pairs.T), np.where(first, *pairs.T[::-1])
    found_I = log_strengths(winners, losers, 12)
    assert np.corrcoef(true_I, found_I)[0, 1] > 0.99
    assert (found_I - found_I.mean()).std() == pytest.approx(true_I.std(), rel=0.1)


def test_equal_strengths_share_a_level():
    assert levels(np.array([0.5, -1.0, 0.5 + 1e-10, 2.0])).tolist() == [1, 2, 1, 0]


def test_a_chain_of_single_votes_is_a_ranking():
    votes = [vote(f"r{i:02d}", f"r{i + 1:02d}") for i in range(44)]
    ((found,), counts) = as_rankings(votes, 64, 1, seed=0)
    assert (found.ranks, counts.agreement) == (tuple(range(45)), 1)


@given(st.integers(2, 40), st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))
def test_each_item_is_dealt_once_a_pass_in_groups_of_the_size(items, most, passes, seed):
    groups = dealt(items, most, passes, random.Random(seed))
    assert all(2 <= len(group) == len(set(group)) <= most for group in groups)
    assert len({frozenset(group) for group in groups}) == len(groups)
    assert {i for group in groups for i in group} == set(range(items))
    if items <= most:
        assert len(groups) == 1
    elif most > 2:
        assert max(Counter(i for group in groups for i in group).values()) <= passes
        assert {len(group) for group in groups} <= {
            items // -(-items // most),
            -(-items // -(-items // most)),
        }


def test_a_pool_becomes_rankings_by_strength_and_says_so():
    texts = [f"r{i:02d}" for i in range(20)]
    votes = [
        vote(a, b, group="g", turned=i % 2 == 0) for i, (a, b) in enumerate(itertools.combinations(texts, 2))
    ]
    found, counts = as_rankings(votes, 5, 3, seed=1)
    assert len(found) == 12
    assert all(problem(c) is None for c in found)
    assert all(c.responses == tuple(sorted(c.responses)) and c.ranks == (0, 1, 2, 3, 4) for c in found)
    assert set(Counter(r for c in found for r in c.responses).values()) == {3}
    assert {(c.group, c.source, c.confidence) for c in found} == {("g", "s", None)}
    assert counts.agreement == 1
    assert str(counts) == (
        "rankings: 190 pairs over 1 pools of 1 prompts became 12 rankings; the Bradley-Terry fit agrees with "
        "the vote in 1.000 of the pairs"
    )


def test_what_no_vote_connects_is_never_ranked_together():
    votes = [
        vote("a", "b", group="g"),
        vote("b", "c", group="h"),
        vote("x", "y"),
        vote("a", "x", prompt="other"),
    ]
    found, counts = as_rankings(votes, 9, 4, seed=0)
    assert [(c.prompt[0].content, c.responses, c.ranks, c.group) for c in found] == [
        ("q", ("a", "b", "c"), (0, 1, 2), None),
        ("q", ("x", "y"), (0, 1), None),
        ("other", ("a", "x"), (0, 1), None),
    ]
    assert (counts.pairs, counts.pools, counts.prompts) == (4, 3, 2)


def test_votes_that_cancel_out_are_left_out_and_counted():
    circle = [vote("a", "b"), vote("b", "c"), vote("c", "a")]
    found, counts = as_rankings(
        [*circle, vote("x", "y", prompt="p"), vote("y", "x", prompt="p")], 9, 4, seed=0
    )
    assert found == []
    assert (counts.rankings, counts.tied, counts.agreement) == (0, 2, 0.5)


def test_longer_comparisons_stay_or_are_dealt_with_their_own_order():
    texts = tuple(f"r{i:02d}" for i in range(10))
    long = Comparison((Message("user", "q"),), texts, tuple(i // 3 for i in range(10)), "s", 0.9, "g")
    short = Comparison((Message("user", "q"),), texts[:3], (0, 1, 1), "s")
    found, counts = as_rankings([long, short], 4, 2, seed=0)
    assert found[-1] == short
    assert (counts.kept, counts.redealt, counts.pairs, counts.agreement) == (1, 1, 0, None)
    for c in found[:-1]:
        assert (c.group, c.confidence) == ("g", 0.9)
        for (a, m), (b, n) in itertools.combinations(zip(c.responses, c.ranks, strict=True), 2):
            assert (m < n) == (int(a[1:]) // 3 < int(b[1:]) // 3)


def test_what_is_dealt_depends_on_the_pool_and_the_seed_alone():
    texts = [f"r{i}" for i in range(9)]
    votes = [vote(a, b) for a, b in itertools.combinations(texts, 2)]
    (once, _), (more, _) = (
        as_rankings(x, 3, 2, 0) for x in (votes, [vote("a", "b", prompt="p"), *votes[::-1]])
    )
    assert once == more[1:]
    assert as_rankings(votes, 3, 2, 1)[0] != once


def test_ten_thousand_responses_to_one_prompt_are_dealt_in_seconds():
    start, rng = time.monotonic(), random.Random(0)
    votes = [vote(f"r{i}", f"r{rng.randrange(10_000)}x") for i in range(10_000)]
    votes += [vote("hub", f"r{i}") for i in range(10_000)]
    found, counts = as_rankings(votes, 9, 2, seed=0)
    assert counts.pools == 1
    assert max(len(c.responses) for c in found) == 9
    assert time.monotonic() - start < 20


SAME = [vote("a", "b"), vote("b", "a"), vote("a ", "b", turned=True), vote("a", "b")]


def test_repeated_pairs_are_votes_where_the_recipe_says_so():
    counts = Counts(read=4)
    assert len(deduplicate(SAME, counts)) == 2
    assert counts.dropped == {DUPLICATE: 2}
    assert as_rankings(deduplicate(SAME, counts), 9, 1, seed=0)[1].tied == 1
    counts = Counts(read=4)
    votes = deduplicate(SAME, counts, "votes")
    assert (len(votes), counts.dropped) == (4, {})
    ((found,), made) = as_rankings(votes, 9, 1, seed=0)
    assert (found.responses, found.ranks, made.agreement) == (("a", "b"), (0, 1), 0.75)
    long = replace(SAME[0], responses=("a", "b", "c"), ranks=(0, 1, 2))
    assert deduplicate([long, long], Counts(read=2), "votes") == [long]


def test_votes_on_a_pair_are_decided_by_more_than_half_of_them():
    others = [vote("a", "b", group="g"), vote("a", "b", "p"), vote("b", "a", "p"), vote("x", "y")]
    counts = Counts(read=8)
    first, grouped, last = decided([*SAME, *others], counts)
    assert first == replace(SAME[0], confidence=0.75)
    assert (grouped, last) == (others[0], others[-1])
    assert counts.dropped == {"further votes on a pair": 4, "votes without a majority": 1}
    assert counts.kept == 3
    assert decided([SAME[1], *SAME], Counts())[0].confidence == 0.6
