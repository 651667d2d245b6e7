"""Best of n: the estimator against enumeration, the bounds against exact distributions, what is drawn."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_evaluate import backbone_and_dialogue

from policy.evaluate import best_of_n as module
from policy.evaluate.before_after import reward_fn_of, sample_and_score
from policy.evaluate.best_of_n import (
    best_of_n,
    draw,
    kl_bound,
    powers_of_two,
    rank_weights,
    ranked,
    tied_share,
    win_rate_bound,
)
from policy.ppo.checks import InvariantError
from rlhf.data.comparisons import Message
from rlhf.models.backbone import REFERENCE

# --- the estimator ---------------------------------------------------------------------------------------


def worth_of_best(proxy, values):
    """The value of the response with the highest proxy; of several, the mean."""
    best = [v for p, v in zip(proxy, values, strict=True) if p == max(proxy)]
    return sum(best) / len(best)


def by_subsets(proxy, values, n):
    subsets = itertools.combinations(range(len(proxy)), n)
    return np.mean([worth_of_best([proxy[i] for i in s], [values[i] for i in s]) for s in subsets])


scores = st.integers(-3, 3).map(float)  # few values, so that most examples have ties


@given(st.lists(st.tuples(scores, st.floats(-9, 9)), min_size=1, max_size=7))
def test_the_estimate_is_the_mean_over_all_subsets_with_or_without_ties(pairs):
    proxy, values = zip(*pairs, strict=True)
    for n in range(1, len(pairs) + 1):
        assert best_of_n([proxy], [values], n)[0] == pytest.approx(by_subsets(proxy, values, n), abs=1e-9)


def test_without_ties_the_order_of_the_samples_does_not_matter_and_every_row_stands_alone():
    rng = np.random.default_rng(0)
    proxy, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    shuffled = np.stack([rng.permutation(6) for _ in range(3)])
    again = [np.take_along_axis(x, shuffled, 1) for x in (proxy, values)]
    for n in range(1, 7):
        expected = [by_subsets(list(p), list(v), n) for p, v in zip(proxy, values, strict=True)]
        assert best_of_n(proxy, values, n) == pytest.approx(expected)
        assert best_of_n(*again, n) == pytest.approx(expected)


def test_ties_are_the_average_over_all_orders_of_the_tied():
    proxy, values = [1.0, 0.0, 1.0, 1.0, 0.0], np.array([5.0, 1.0, -2.0, 3.0, 7.0])
    orders = [o for o in itertools.permutations(range(5)) if [proxy[i] for i in o] == sorted(proxy)]
    assert len(orders) == 12
    for n in range(1, 6):
        weights = rank_weights(5, n)
        assert best_of_n([proxy], [values], n)[0] == pytest.approx(
            np.mean([values[list(order)] @ weights for order in orders])
        )
    assert ranked(proxy, values) == pytest.approx([4, 4, 2, 2, 2])


def test_it_is_unbiased_for_fresh_samples_of_a_distribution_with_ties():
    outcomes = [(0.0, 1.0, 0.2), (1.0, 4.0, 0.3), (1.0, -2.0, 0.1), (2.0, 3.0, 0.4)]  # proxy, value, share

    def expected(count, figure):
        total = 0.0
        for draws in itertools.product(outcomes, repeat=count):
            proxy, values, shares = zip(*draws, strict=True)
            total += math.prod(shares) * figure(proxy, values)
        return total

    for n in (1, 2, 3):
        truth = expected(n, worth_of_best)
        estimate = expected(4, lambda proxy, values, n=n: best_of_n([proxy], [values], n)[0])
        assert estimate == pytest.approx(truth), n


@pytest.mark.parametrize("samples", [5, 64, 1000])
def test_the_best_of_the_first_whole_numbers_has_its_closed_form(samples):
    ranks = np.arange(1.0, samples + 1)[None]
    for n in {1, 2, 3, samples // 2, samples - 1, samples}:
        assert best_of_n(ranks, ranks, n)[0] == pytest.approx(n * (samples + 1) / (n + 1), rel=1e-9)


def test_the_weights_do_not_overflow():
    for n in (1, 2, 1500, 2999, 3000):  # 3000 over 1500 is beyond a float
        weights = rank_weights(3000, n)
        assert weights.shape == (3000,)
        assert weights.sum() == pytest.approx(1, rel=1e-9)
        assert (weights >= 0).all()


def test_where_the_proxy_is_the_gold_more_responses_are_never_worse():
    gold = np.random.default_rng(2).integers(0, 5, size=(6, 16)).astype(float)
    curve = np.array([best_of_n(gold, gold, n) for n in range(1, 17)])
    assert (np.diff(curve, axis=0) >= -1e-12).all()
    assert (curve[-1] > curve[0]).all()
    against = np.array([best_of_n(-gold, gold, n) for n in range(1, 17)])
    assert (np.diff(against, axis=0) <= 1e-12).all()  # a proxy that is wrong makes it worse


def test_what_cannot_be_estimated_is_refused():
    for samples, n in ((4, 5), (4, 0), (0, 1)):
        with pytest.raises(ValueError, match="samples"):
            rank_weights(samples, n)
    with pytest.raises(ValueError, match="shape"):
        best_of_n([[1.0, 2.0]], [[1.0]], 1)
    with pytest.raises(ValueError, match="shape"):
        best_of_n([1.0, 2.0], [1.0, 2.0], 1)
    for bound in (kl_bound, win_rate_bound):
        with pytest.raises(ValueError, match="best of 0"):
            bound(0)


def test_powers_of_two_stop_at_the_number_of_samples():
    assert [powers_of_two(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8]]
    assert powers_of_two(1000)[-1] == 512


def test_ties_are_counted_within_a_prompt():
    assert tied_share([[1.0, 2.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]]) == 3 / 8
    assert tied_share([[1.0, 2.0]]) == 0


# --- the bounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "kl"), [(1, 0.0), (4, 0.636), (16, 1.835), (64, 3.175), (256, 4.549), (1000, 5.909)]
)
def test_the_kl_of_best_of_n_is_the_published_one(n, kl):
    assert kl_bound(n) == pytest.approx(kl, abs=5e-4)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_kl_bounds_that_of_equal_outcomes_and_is_reached_by_many_of_them(n):
    gaps = []
    for outcomes in (2, 10, 10_000):
        edges = (np.arange(outcomes + 1) / outcomes) ** n
        share = np.diff(edges)  # of each outcome, worst first, among the best of n
        kl = float((share * np.log(np.maximum(share, 1e-300) * outcomes)).sum())
        gaps.append(kl_bound(n) - kl)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 1e-2


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_win_rate_bound_is_reached_by_the_judge_that_chooses_and_by_no_other(n):
    def wins(gold):
        orders = list(itertools.permutations(range(n + 1)))  # proxies of the n and of the one response
        outcomes = [np.sign(gold[order[max(range(n), key=order.__getitem__)]] - gold[order[-1]])
                    for order in orders]  # fmt: skip
        return np.mean([(1 + outcome) / 2 for outcome in outcomes])

    assert wins(range(n + 1)) == pytest.approx(win_rate_bound(n))
    for gold in itertools.product(range(3), repeat=n + 1):  # gold score of the response with each proxy
        assert wins(gold) <= win_rate_bound(n) + 1e-12


# --- the driver ------------------------------------------------------------------------------------------

PROMPTS = [(Message("user", text),) for text in ("one", "and two", "three or so")]


@pytest.fixture(scope="module")
def model():
    return backbone_and_dialogue(stir=0.3, max_response_tokens=6)


REWARD_FNS = {
    "gold": reward_fn_of(lambda prompts, texts: [float(sum(map(ord, t)) % 97) for t in texts]),
    "reward": reward_fn_of(lambda prompts, texts: [float(len(set(t))) for t in texts]),
}


def drawn(model, *, samples=4, seed=0, batch_size=5, prompts=PROMPTS, reward_fns=REWARD_FNS, **options):
    return draw(*model, prompts, reward_fns, samples=samples, seed=seed, temperature=1.0,
                batch_size=batch_size, **options)[0]  # fmt: skip


def test_the_best_of_more_is_better_by_the_score_that_chooses(model):
    done = []
    proxy = drawn(model, samples=16, progress=done.append)["reward"]
    assert proxy.shape == (3, 16)
    assert sum(done) == 48
    curve = [best_of_n(proxy, proxy, n).mean() for n in powers_of_two(16)]
    assert (np.diff(curve) > 0).all()


def test_it_is_the_reference_that_answers(model):
    backbone, _ = model
    few = drawn(model)
    adapter = [parameter for name, parameter in backbone.named_parameters() if "lora_B" in name]
    weights = [parameter.clone() for parameter in adapter]
    try:
        for parameter in adapter:
            parameter.data.zero_()
        without = drawn(model)
    finally:
        for parameter, weight in zip(adapter, weights, strict=True):
            parameter.data.copy_(weight)
    assert {k: v.tolist() for k, v in few.items()} == {k: v.tolist() for k, v in without.items()}


def test_neither_batches_nor_further_samples_or_prompts_change_what_was_drawn(model):
    few, many = drawn(model, samples=3), drawn(model, samples=5, batch_size=2)
    for name in REWARD_FNS:
        assert few[name].tolist() == many[name][:, :3].tolist()
        assert few[name][:2].tolist() == drawn(model, samples=3, prompts=PROMPTS[:2])[name].tolist()
    assert few["gold"].tolist() != drawn(model, samples=3, seed=1)["gold"].tolist()
    assert all(len(set(row)) > 1 for row in many["gold"].tolist())  # each sample has numbers of its own


def test_the_random_numbers_are_not_those_of_the_comparison(model, monkeypatch):
    backbone, dialogue = model
    options = {"seed": 0, "temperature": 1.0, "batch_size": 3}
    side = sample_and_score(backbone, REFERENCE, dialogue, PROMPTS, REWARD_FNS, **options)
    assert drawn(model, samples=1)["gold"][:, 0].tolist() != side.scores["gold"]
    uniforms = module.uniforms

    def those_of_before(seed, purpose, prompt, rows, width):
        return uniforms(seed, "evaluate", 0, [prompt], width)

    monkeypatch.setattr(module, "uniforms", those_of_before)
    assert drawn(model, samples=1)["gold"][:, 0].tolist() == side.scores["gold"]


def test_equal_prompts_stand_next_to_each_other(model):
    seen = []

    def length(responses):
        seen.extend(responses.prompts)
        return torch.tensor([float(len(text)) for text in responses.texts])

    drawn(model, samples=4, reward_fns={"length": length})
    assert seen == [prompt for prompt in PROMPTS for _ in range(4)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_cannot_be_ranked_is_refused(model, bad):
    reward_fns = REWARD_FNS | {"reward": lambda responses: torch.tensor([bad, *[1.0] * 11])}
    with pytest.raises(InvariantError, match="1 of 12 scores by reward are not finite"):
        drawn(model, reward_fns=reward_fns, batch_size=12)
