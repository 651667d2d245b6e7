import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.loss import (
    binary_loss,
    centering_penalty,
    head_init_std,
    imitation_loss,
    normalization,
    pair_accuracy,
    plackett_luce_loss,
    ranked_loss,
)


def _comparisons(seed, batch=4, width=5, ranks=4):
    generator = torch.Generator().manual_seed(seed)
    scores_BK = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    ranks_BK = torch.randint(0, ranks, (batch, width), generator=generator)
    mask_BK = torch.rand(batch, width, generator=generator) < 0.8
    return scores_BK, ranks_BK, mask_BK


def _by_loop(scores_BK, ranks_BK, mask_BK):
    """(correct per row, pairs per row), one pair at a time."""
    correct, pairs = [], []
    for scores, ranks, mask in zip(scores_BK.tolist(), ranks_BK.tolist(), mask_BK.tolist(), strict=True):
        right = number = 0
        for i, j in itertools.combinations(range(len(scores)), 2):
            if not (mask[i] and mask[j]) or ranks[i] == ranks[j]:
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            gap = scores[better] - scores[worse]
            number += 1
            right += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
        correct.append(right)
        pairs.append(number)
    return correct, pairs


def _softplus(x):
    return torch.log(1 + torch.exp(x))


def _sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def _mean(terms):
    return sum(terms) / len(terms)


def _pair_mean(term):
    """A row's loss from the loss of a pair: its better score, its worse score, the steps of rank between."""

    def row(scores, ranks):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
        return _mean([term(scores[i], scores[j], ranks[j] - ranks[i]) for i, j in pairs])

    return row


def _choices_row(scores, ranks):
    terms = []
    for score, rank in zip(scores, ranks, strict=True):
        worse = [other for other, other_rank in zip(scores, ranks, strict=True) if other_rank > rank]
        if worse:
            terms.append(-torch.log(torch.exp(score) / sum(torch.exp(x) for x in [score, *worse])))
    return _mean(terms)


def _binary_row(scores, ranks):
    good = [_softplus(-score) for score, rank in zip(scores, ranks, strict=True) if rank == min(ranks)]
    bad = [_softplus(score) for score, rank in zip(scores, ranks, strict=True) if rank > min(ranks)]
    return 0.5 * _mean(good) + 0.5 * _mean(bad)


def _best_row(scores, ranks):
    return -_mean([score for score, rank in zip(scores, ranks, strict=True) if rank == min(ranks)])


def _ranked(**options):
    return functools.partial(ranked_loss, **options)


def _imitation(means_BK, ranks_BK, mask_BK, **normalizer):
    """From log-probabilities a token, so that it has the arguments of the others; lengths 1, 2, 3, ..."""
    lengths_BK = torch.arange(1, means_BK.shape[1] + 1).expand(means_BK.shape)
    return imitation_loss(means_BK * lengths_BK, lengths_BK, ranks_BK, mask_BK, **normalizer)


LOSSES = {  # name: (the loss, the same of one row by a loop, whether a common shift changes it)
    "ranked": (_ranked(), _pair_mean(lambda b, w, _: _softplus(w - b)), False),
    "margin": (_ranked(margin=0.7), _pair_mean(lambda b, w, n: _softplus(w - b + 0.7 * n)), False),
    "label_smoothing": (
        _ranked(label_smoothing=0.2),
        _pair_mean(lambda b, w, _: 0.8 * _softplus(w - b) + 0.2 * _softplus(b - w)),
        False,
    ),
    "label_noise": (
        _ranked(label_noise=0.2),
        _pair_mean(lambda b, w, _: -torch.log(0.8 * _sigmoid(b - w) + 0.2 * _sigmoid(w - b))),
        False,
    ),
    "plackett_luce": (plackett_luce_loss, _choices_row, False),
    "binary": (binary_loss, _binary_row, True),
    "centering": (centering_penalty, _pair_mean(lambda b, w, _: (b + w) ** 2), True),
    "imitation": (_imitation, _best_row, True),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def _gradient(loss, batch, **normalizer):
    """(value, gradient) at a fresh copy of the scores; a NaN on the way back is an error."""
    scores_BK = batch[0].clone().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        value = loss(scores_BK, *batch[1:], **normalizer)
        return value.detach(), torch.autograd.grad(value, scores_BK)[0]


def _row_by_row(row, scores_BK, ranks_BK, mask_BK):
    """Mean of a row's loss over the rows that have an untied pair, one scalar at a time."""
    losses = []
    for b, mask in enumerate(mask_BK.tolist()):
        real = [k for k, is_real in enumerate(mask) if is_real]
        ranks = [int(ranks_BK[b, k]) for k in real]
        if len(set(ranks)) > 1:
            losses.append(row([scores_BK[b, k] for k in real], ranks))
    return _mean(losses) if losses else 0 * scores_BK.sum()


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 6))
def test_accuracy_equals_a_loop_over_all_pairs(seed, ranks):
    scores_BK, ranks_BK, mask_BK = _comparisons(seed, ranks=ranks)
    scores_BK = scores_BK.round(decimals=0) if seed % 2 else scores_BK  # every other case has equal scores
    correct, pairs = _by_loop(scores_BK, ranks_BK, mask_BK)
    scores_BK[~mask_BK] = float("nan")
    correct_B, pairs_B = pair_accuracy(scores_BK, ranks_BK, mask_BK)
    assert (correct_B.tolist(), pairs_B.tolist()) == (correct, pairs)


def test_equal_scores_cost_log_two_and_count_as_half_right():
    mask_BK = torch.tensor([[True] * 4, [True, True, False, False]])
    ranks_BK = torch.tensor([[3, 1, 2, 4], [1, 2, 0, 0]])
    batch = torch.full((2, 4), 7.0), ranks_BK, mask_BK
    assert float(ranked_loss(*batch)) == pytest.approx(math.log(2))
    assert [x.tolist() for x in pair_accuracy(*batch)] == [[3.0, 0.5], [6, 1]]


def test_a_fresh_head_scores_unit_gaussian_states_with_variance_almost_one():
    d = 255
    assert head_init_std(d) == 1 / 16
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, d, generator=generator) @ (
        head_init_std(d) * torch.randn(d, 20, generator=generator)
    )
    assert float(scores.var()) == pytest.approx(d / (d + 1), rel=0.1)


def test_normalized_scores_have_mean_zero_and_variance_one():
    scores = 3 * torch.randn(50, generator=torch.Generator().manual_seed(0)) - 7
    gain, offset = normalization(scores)
    assert gain > 0
    normal = gain * scores.double() + offset
    assert float(normal.mean()) == pytest.approx(0, abs=1e-9)
    assert float(normal.var(correction=0)) == pytest.approx(1)


@pytest.mark.parametrize("scores", [[0.1] * 7, [2.0], [], [1.0, math.nan]])
def test_scores_that_do_not_differ_or_are_not_finite_cannot_be_normalized(scores):
    with pytest.raises(ValueError, match=r"zero variance|not finite"):
        normalization(torch.tensor(scores, dtype=torch.float64))


@every_loss
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 6))
def test_every_loss_and_its_gradient_equal_those_of_a_loop_and_ignore_what_is_masked(name, seed, ranks):
    loss, row, _ = LOSSES[name]
    scores_BK, ranks_BK, mask_BK = _comparisons(seed, ranks=ranks)
    value, gradient = _gradient(lambda *batch: _row_by_row(row, *batch), (scores_BK, ranks_BK, mask_BK))
    filled = scores_BK.masked_fill(~mask_BK, (math.nan, math.inf, -1e30)[seed % 3])
    wild = ranks_BK.masked_fill(~mask_BK, (-7, 0, 2**62)[seed % 3])
    found, found_gradient = _gradient(loss, (filled, wild, mask_BK))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-10, atol=1e-10)


@every_loss
def test_every_loss_follows_its_responses_and_only_a_loss_of_levels_feels_a_shift(name):
    loss, _, feels_shift = LOSSES[name]
    scores_BK, ranks_BK, mask_BK = batch = _comparisons(5)
    value, gradient = _gradient(loss, batch)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted, permuted_gradient = _gradient(loss, [x[:, order] for x in batch])
    torch.testing.assert_close(permuted, value)
    torch.testing.assert_close(permuted_gradient, gradient[:, order])
    assert gradient.abs().sum() > 0
    assert torch.allclose(loss(scores_BK + 2, ranks_BK, mask_BK), value) is not feels_shift


@every_loss
def test_every_loss_of_micro_batches_with_a_common_normalizer_adds_up_and_skips_rows_of_ties(name):
    loss = LOSSES[name][0]
    whole = _, ranks_BK, mask_BK = _comparisons(6)
    ranks_BK[0], mask_BK[0] = 1, True  # a row of ties
    rows = 3
    assert all(len(set(r[m].tolist())) > 1 for r, m in zip(ranks_BK[1:], mask_BK[1:], strict=True))
    for normalizer in (rows, float(rows), torch.tensor(rows)):
        parts = [loss(*(x[s] for x in whole), normalizer=normalizer) for s in (slice(0, 2), slice(2, 4))]
        torch.testing.assert_close(sum(parts), loss(*whole))
    value, gradient = _gradient(loss, [x[:1] for x in whole])
    assert float(value) == 0
    assert (gradient == 0).all()


@every_loss
def test_every_loss_of_half_precision_is_float32(name):
    scores_BK, ranks_BK, mask_BK = _comparisons(7)
    half_BK = scores_BK.bfloat16()
    value = LOSSES[name][0](half_BK, ranks_BK, mask_BK)
    assert value.dtype == torch.float32
    if name != "imitation":  # whose test multiplies in half precision
        exact = LOSSES[name][0](half_BK.double(), ranks_BK, mask_BK)
        assert float(value) == pytest.approx(float(exact), rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), margin=st.floats(0.01, 3))
def test_a_margin_is_the_plain_loss_of_scores_raised_by_the_margin_times_their_rank(seed, margin):
    scores_BK, ranks_BK, mask_BK = _comparisons(seed)
    loss = ranked_loss(scores_BK, ranks_BK, mask_BK, margin=margin)
    raised = ranked_loss(scores_BK + margin * ranks_BK.double(), ranks_BK, mask_BK)
    torch.testing.assert_close(loss, raised, rtol=1e-12, atol=1e-12)


def test_label_noise_bounds_the_loss_of_a_wrong_label_and_stays_finite_far_out():
    ranks_BK, mask_BK = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    for noise in (0.05, 1e-9, 1e-50):  # the last is 0 in float32, its logarithm is not
        for lead, expected in ((-1e4, -math.log(noise)), (1e4, -math.log1p(-noise)), (0.0, math.log(2))):
            scores_BK = torch.tensor([[lead, 0.0]])
            value, gradient = _gradient(_ranked(label_noise=noise), (scores_BK, ranks_BK, mask_BK))
            assert float(value) == pytest.approx(expected, rel=1e-6, abs=1e-30)
            assert float(gradient[0, 0]) == pytest.approx(noise - 0.5 if lead == 0 else 0.0)


@pytest.mark.parametrize("options", [(0.1, 0.1), (-0.1, 0), (0, 1), (1, 0), (0, math.nan)])
def test_smoothing_and_noise_are_shares_and_exclude_each_other(options):
    smoothing, noise = options
    with pytest.raises(ValueError, match="one of them 0"):
        ranked_loss(*_comparisons(0), label_smoothing=smoothing, label_noise=noise)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]))
def test_of_two_responses_the_whole_order_is_the_pair_to_the_bit(seed, scale):
    scores_BK, ranks_BK, mask_BK = _comparisons(seed, batch=6, width=2, ranks=2)
    batch = (scale * scores_BK.float(), ranks_BK, mask_BK)
    value, gradient = _gradient(plackett_luce_loss, batch)
    pair_value, pair_gradient = _gradient(_ranked(), batch)
    assert torch.equal(value, pair_value)
    torch.testing.assert_close(gradient, pair_gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_the_likelihoods_of_all_orders_sum_to_one_and_have_luces_marginals(width):
    scores_K = torch.randn(width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    orders = list(itertools.permutations(range(width)))  # orders[n][k]: the rank of response k
    mask_BK = torch.ones(1, width, dtype=torch.bool)
    likelihood = [
        math.exp(-(width - 1) * float(plackett_luce_loss(scores_K[None], torch.tensor([order]), mask_BK)))
        for order in orders
    ]
    assert sum(likelihood) == pytest.approx(1)
    for i, j in itertools.permutations(range(width), 2):
        before = sum(p for p, order in zip(likelihood, orders, strict=True) if order[i] < order[j])
        assert before == pytest.approx(float(_sigmoid(scores_K[i] - scores_K[j])))
    for i in range(width):
        first = sum(p for p, order in zip(likelihood, orders, strict=True) if order[i] == 0)
        assert first == pytest.approx(float(scores_K.softmax(dim=0)[i]))


def test_tied_responses_are_chosen_each_against_what_is_worse_only():
    scores_K = torch.tensor([0.4, -1.0, 2.0, 0.1])
    mask_BK = torch.ones(1, 4, dtype=torch.bool)
    one_best = plackett_luce_loss(scores_K[None], torch.tensor([[1, 1, 0, 1]]), mask_BK)
    torch.testing.assert_close(one_best, torch.nn.functional.cross_entropy(scores_K, torch.tensor(2)))
    two_best = plackett_luce_loss(scores_K[None], torch.tensor([[0, 1, 0, 1]]), mask_BK)
    first, second = (-scores_K[[i, 1, 3]].log_softmax(dim=0)[0] for i in (0, 2))
    torch.testing.assert_close(two_best, (first + second) / 2)
    one_worst = (scores_K[None], torch.tensor([[0, 3, 0, 0]]), mask_BK)
    torch.testing.assert_close(plackett_luce_loss(*one_worst), ranked_loss(*one_worst))


def test_scores_far_apart_give_a_finite_likelihood_and_gradient():
    batch = torch.tensor([[-1e4, 0.0, 1e4]]), torch.tensor([[0, 1, 2]]), torch.ones(1, 3).bool()
    value, gradient = _gradient(plackett_luce_loss, batch)
    assert float(value) == pytest.approx((2e4 + 1e4) / 2)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, -0.5, 1.0]]))


def test_imitation_looks_at_the_best_responses_only_and_divides_by_their_tokens():
    unknown = math.nan
    log_probs_BK = torch.tensor([[-6.0, unknown, -1.0], [unknown, -8.0, unknown]], requires_grad=True)
    lengths_BK = torch.tensor([[3, 0, 4], [0, 2, 0]])
    ranks_BK, mask_BK = torch.tensor([[0, 1, 0], [1, 0, 0]]), torch.tensor([[True] * 3, [True, True, False]])
    loss = imitation_loss(log_probs_BK, lengths_BK, ranks_BK, mask_BK)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(((6 / 3 + 1 / 4) / 2 + 8 / 2) / 2)
    torch.testing.assert_close(log_probs_BK.grad, torch.tensor([[-1 / 12, 0.0, -1 / 16], [0.0, -1 / 4, 0.0]]))
