import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.loss import head_init_std, normalisation, pair_accuracy, ranked_loss


def _comparisons(seed, batch=4, width=5, ranks=4):
    generator = torch.Generator().manual_seed(seed)
    scores_BK = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    ranks_BK = torch.randint(0, ranks, (batch, width), generator=generator)
    mask_BK = torch.rand(batch, width, generator=generator) < 0.8
    return scores_BK, ranks_BK, mask_BK


def _by_loop(scores_BK, ranks_BK, mask_BK):
    """(loss per row or None, correct per row, pairs per row), one pair at a time."""
    losses, correct, pairs = [], [], []
    for scores, ranks, mask in zip(scores_BK.tolist(), ranks_BK.tolist(), mask_BK.tolist(), strict=True):
        terms, right = [], 0.0
        for i, j in itertools.combinations(range(len(scores)), 2):
            if not (mask[i] and mask[j]) or ranks[i] == ranks[j]:
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            gap = scores[better] - scores[worse]
            terms.append(math.log(1 + math.exp(-gap)))
            right += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
        losses.append(sum(terms) / len(terms) if terms else None)
        correct.append(right)
        pairs.append(len(terms))
    return losses, correct, pairs


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 6))
def test_loss_and_accuracy_equal_a_loop_over_all_pairs(seed, ranks):
    scores_BK, ranks_BK, mask_BK = _comparisons(seed, ranks=ranks)
    scores_BK = scores_BK.round(decimals=0) if seed % 2 else scores_BK  # every other case has equal scores
    losses, correct, pairs = _by_loop(scores_BK, ranks_BK, mask_BK)
    scores_BK[~mask_BK] = float("nan")
    counted = [loss for loss in losses if loss is not None]
    loss, n_correct, n_pairs = ranked_loss(scores_BK, ranks_BK, mask_BK)
    assert float(loss) == pytest.approx(sum(counted) / max(len(counted), 1))
    assert (float(n_correct), int(n_pairs)) == (sum(correct), sum(pairs))
    correct_B, pairs_B = pair_accuracy(scores_BK, ranks_BK, mask_BK)
    assert (correct_B.tolist(), pairs_B.tolist()) == (correct, pairs)


def test_two_responses_give_minus_log_sigmoid_with_its_gradient():
    scores_BK = torch.tensor([[0.3, 1.2], [2.0, -1.0]], requires_grad=True)
    ranks_BK = torch.tensor([[1, 2], [2, 1]])
    loss, _, _ = ranked_loss(scores_BK, ranks_BK, torch.ones(2, 2, dtype=torch.bool))
    gaps = torch.stack([scores_BK[0, 0] - scores_BK[0, 1], scores_BK[1, 1] - scores_BK[1, 0]])
    expected = -torch.nn.functional.logsigmoid(gaps).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, scores_BK)[0], torch.autograd.grad(expected, scores_BK)[0]
    )


def test_equal_scores_cost_log_two_and_count_as_half_right():
    mask_BK = torch.tensor([[True] * 4, [True, True, False, False]])
    ranks_BK = torch.tensor([[3, 1, 2, 4], [1, 2, 0, 0]])
    loss, correct, pairs = ranked_loss(torch.full((2, 4), 7.0), ranks_BK, mask_BK)
    assert float(loss) == pytest.approx(math.log(2))
    assert (float(correct), int(pairs)) == (3.5, 7)


def test_a_comparison_weighs_the_same_however_many_responses_it_has():
    wide = torch.tensor([[4.0, 3.0, 1.0, 0.5]]), torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4).bool()
    narrow = (
        torch.tensor([[0.0, 1.0, 9.0, 9.0]]),
        torch.tensor([[1, 2, 0, 0]]),
        torch.tensor([[1, 1, 0, 0]]).bool(),
    )
    both = [torch.cat(pair) for pair in zip(wide, narrow, strict=True)]
    expected = (ranked_loss(*wide)[0] + ranked_loss(*narrow)[0]) / 2
    torch.testing.assert_close(ranked_loss(*both)[0], expected)


def test_a_comparison_of_ties_is_not_counted_and_a_batch_of_them_has_zero_loss_and_gradient():
    scores_BK = torch.tensor([[1.0, 2.0], [0.0, 3.0]], requires_grad=True)
    mask_BK = torch.ones(2, 2, dtype=torch.bool)
    with_tie = ranked_loss(scores_BK, torch.tensor([[1, 1], [2, 1]]), mask_BK)[0]
    alone = ranked_loss(scores_BK[1:], torch.tensor([[2, 1]]), mask_BK[1:])[0]
    torch.testing.assert_close(with_tie, alone)
    loss, correct, pairs = ranked_loss(scores_BK, torch.ones(2, 2, dtype=torch.long), mask_BK)
    loss.backward()
    assert (float(loss.detach()), float(correct), int(pairs)) == (0, 0, 0)
    assert (scores_BK.grad == 0).all()


def test_the_loss_depends_on_neither_order_nor_padding_nor_a_common_shift():
    scores_BK, ranks_BK, mask_BK = _comparisons(5)
    loss = ranked_loss(scores_BK, ranks_BK, mask_BK)[0]
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        ranked_loss(scores_BK[:, order], ranks_BK[:, order], mask_BK[:, order])[0], loss
    )
    wider = [
        torch.cat([x, torch.full((4, 2), filler, dtype=x.dtype)], dim=1)
        for x, filler in ((scores_BK, float("nan")), (ranks_BK, 0), (mask_BK, False))
    ]
    wider[0].requires_grad_()
    wide_loss = ranked_loss(*wider)[0]
    torch.testing.assert_close(wide_loss.detach(), loss)
    wide_loss.backward()
    assert wider[0].grad.isfinite().all()
    torch.testing.assert_close(ranked_loss(scores_BK + 100, ranks_BK, mask_BK)[0], loss)


def test_micro_batches_with_a_common_normaliser_add_up_to_the_whole():
    whole = _comparisons(6)
    rows = sum(loss is not None for loss in _by_loop(*whole)[0])
    parts = [ranked_loss(*(x[s] for x in whole), normaliser=rows)[0] for s in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), ranked_loss(*whole)[0])


def test_scores_in_half_precision_are_compared_in_float32():
    loss, _, _ = ranked_loss(
        torch.tensor([[1.0, 0.99609375]], dtype=torch.bfloat16),
        torch.tensor([[1, 2]]),
        torch.ones(1, 2, dtype=torch.bool),
    )
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-0.00390625)), rel=1e-6)


def test_a_fresh_head_scores_unit_gaussian_states_with_variance_almost_one():
    d = 255
    assert head_init_std(d) == 1 / 16
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20_000, d, generator=generator) @ (
        head_init_std(d) * torch.randn(d, 20, generator=generator)
    )
    assert float(scores.var()) == pytest.approx(d / (d + 1), rel=0.1)


def test_normalised_scores_have_mean_zero_and_variance_one():
    scores = 3 * torch.randn(50, generator=torch.Generator().manual_seed(0)) - 7
    gain, offset = normalisation(scores)
    assert gain > 0
    normal = gain * scores.double() + offset
    assert float(normal.mean()) == pytest.approx(0, abs=1e-9)
    assert float(normal.var(correction=0)) == pytest.approx(1)


@pytest.mark.parametrize("scores", [[0.1] * 7, [2.0], []])
def test_scores_that_do_not_differ_cannot_be_normalised(scores):
    with pytest.raises(ValueError, match="zero variance"):
        normalisation(torch.tensor(scores, dtype=torch.float64))


def test_scores_that_are_not_finite_cannot_be_normalised():
    with pytest.raises(ValueError, match="not finite"):
        normalisation(torch.tensor([1.0, float("nan")]))
