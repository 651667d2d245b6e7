import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.ppo.loss import PolicyStats, kl_loss, policy_loss, token_weights, value_loss


def _batch(seed=0, batch=6, width=5, spread=0.4):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(batch, width, generator=generator, dtype=torch.float64)

    old_BT = noise() - 2
    logp_BT = old_BT + spread * noise()
    lengths_B = torch.randint(1, width + 1, (batch,), generator=generator)
    return logp_BT, old_BT, noise(), torch.arange(width) < lengths_B[:, None]


def even(mask_BT, number):
    """Every action weighs one part in ``number``."""
    return mask_BT / number


def test_the_policy_loss_equals_a_scalar_loop():
    logp_BT, old_BT, advantages_BT, mask_BT = _batch()
    total, clipped, errors, ratios = 0.0, 0, [], []
    for b, t in mask_BT.nonzero().tolist():
        ratio = float((logp_BT[b, t] - old_BT[b, t]).exp())
        advantage = float(advantages_BT[b, t])
        held = min(max(ratio, 0.8), 1.2)
        total -= min(ratio * advantage, held * advantage)
        clipped += held * advantage < ratio * advantage
        errors.append(abs(ratio - 1))
        ratios.append(ratio)
    n = len(ratios)
    loss, stats = policy_loss(logp_BT, old_BT, advantages_BT, mask_BT, clip=0.2, weights_BT=even(mask_BT, n))
    assert float(loss) == pytest.approx(total / n)
    assert float(stats.ratio) == pytest.approx(sum(ratios) / n)
    assert float(stats.max_ratio_error) == pytest.approx(max(errors))
    assert 0 < clipped < n
    assert float(stats.clip_fraction) == pytest.approx(clipped / n)
    delta = (logp_BT - old_BT)[mask_BT]
    assert float(stats.kl_k3) == pytest.approx(float((delta.exp() - 1 - delta).mean()))


@pytest.mark.parametrize(
    ("ratio", "advantage", "learns"),
    [
        (1.3, 1.0, False),  # already more likely than the clip allows
        (1.3, -1.0, True),
        (0.7, 1.0, True),
        (0.7, -1.0, False),  # already less likely than the clip allows
        (1.1, 1.0, True),
        (0.9, -1.0, True),
    ],
)
def test_the_gradient_stops_only_where_a_further_step_would_leave_the_clip(ratio, advantage, learns):
    old_BT = torch.tensor([[-1.0]])
    logp_BT = (old_BT + torch.tensor([[ratio]]).log()).requires_grad_()
    mask_BT = torch.tensor([[True]])
    loss, stats = policy_loss(
        logp_BT, old_BT, torch.tensor([[advantage]]), mask_BT, clip=0.2, weights_BT=even(mask_BT, 1)
    )
    loss.backward()
    expected = -advantage * ratio if learns else 0.0
    assert float(logp_BT.grad) == pytest.approx(expected)
    assert float(stats.clip_fraction) == (0.0 if learns else 1.0)


@pytest.mark.parametrize("clip", [0.3, None])
def test_the_value_loss_equals_a_scalar_loop(clip):
    values_BT, old_BT, returns_BT, mask_BT = _batch(seed=3)
    total, clipped = 0.0, 0
    for b, t in mask_BT.nonzero().tolist():
        value, old, target = (float(x[b, t]) for x in (values_BT, old_BT, returns_BT))
        held = min(max(value, old - clip), old + clip) if clip else value
        total += max((value - target) ** 2, (held - target) ** 2) / 2
        clipped += (held - target) ** 2 > (value - target) ** 2
    n = int(mask_BT.sum())
    loss, clip_fraction = value_loss(
        values_BT, old_BT, returns_BT, mask_BT, clip=clip, weights_BT=even(mask_BT, n)
    )
    assert float(loss) == pytest.approx(total / n)
    assert clip is None or 0 < clipped < n
    assert float(clip_fraction) == pytest.approx(clipped / n)


@pytest.mark.parametrize(("value", "learns"), [(1.5, False), (-1.5, True), (1.1, True)])
def test_a_value_that_moved_beyond_its_clip_towards_the_return_stops_learning(value, learns):
    values_BT = torch.tensor([[value]], requires_grad=True)
    old_BT, returns_BT, mask_BT = torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[True]])
    loss, clip_fraction = value_loss(
        values_BT, old_BT, returns_BT, mask_BT, clip=0.2, weights_BT=even(mask_BT, 1)
    )
    loss.backward()
    assert float(values_BT.grad) == pytest.approx(value - 3.0 if learns else 0.0)
    assert float(clip_fraction) == (0.0 if learns else 1.0)


# ---- weights


def parts_of(rows, data):
    """A partition of rows into at least one part."""
    owners = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    return [part for part in ([i for i in range(rows) if owners[i] == o] for o in range(3)) if part]


MASKS = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=6)
).filter(lambda rows: any(map(any, rows)))  # fmt: skip


@given(mask=MASKS, level=st.sampled_from(["token", "sequence"]), data=st.data())
def test_the_weights_of_a_minibatch_sum_to_one_however_its_rows_are_spread_over_processes(mask, level, data):
    mask_BT = torch.tensor(mask)
    parts = parts_of(len(mask), data)
    whole_BT = torch.full(mask_BT.shape, torch.nan)
    for rows in parts:
        others = [mask_BT[other] for other in parts if other is not rows]

        def all_sum(own, others=others):
            """The sum over processes of what each would hand in: its actions, or its responses with any."""
            counts = [other.sum() if level == "token" else other.any(-1).sum() for other in others]
            return own + sum(counts)

        whole_BT[rows] = token_weights(mask_BT[rows], level, all_sum)
    assert float(whole_BT.sum()) == pytest.approx(1)
    assert (whole_BT[~mask_BT] == 0).all()
    by_row = whole_BT.sum(-1)[mask_BT.any(-1)]
    if level == "token":
        torch.testing.assert_close(whole_BT[mask_BT], torch.full_like(whole_BT[mask_BT], 1 / mask_BT.sum()))
    else:
        torch.testing.assert_close(by_row, torch.full_like(by_row, 1 / len(by_row)))


def test_the_levels_are_the_mean_over_actions_and_the_mean_of_means():
    logp_BT, old_BT, advantages_BT, mask_BT = _batch(seed=5)
    ratios = (logp_BT - old_BT).exp() * -advantages_BT
    means = torch.stack([row[m].mean() for row, m in zip(ratios, mask_BT, strict=True)])
    for level, expected in (("token", ratios[mask_BT].mean()), ("sequence", means.mean())):
        weights_BT = token_weights(mask_BT, level, lambda x: x)
        loss, _ = policy_loss(logp_BT, old_BT, advantages_BT, mask_BT, weights_BT=weights_BT, clip=None)
        torch.testing.assert_close(loss, expected, check_dtype=False)
    assert abs(float(ratios[mask_BT].mean() - means.mean())) > 1e-3
    with pytest.raises(ValueError, match="neither 'token' nor 'sequence'"):
        token_weights(mask_BT, "row", lambda x: x)


@settings(max_examples=50)
@given(mask=MASKS, seed=st.integers(0, 10_000), level=st.sampled_from(["token", "sequence"]), data=st.data())
def test_losses_and_gradients_ignore_what_is_outside_the_mask_and_add_up_over_any_parts(
    mask, seed, level, data
):
    mask_BT = torch.tensor(mask)
    generator = torch.Generator().manual_seed(seed)
    clean = [torch.randn(mask_BT.shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    weights_BT = token_weights(mask_BT, level, lambda x: x).double()

    def run(rows, filler):
        x, *rest = (torch.where(mask_BT, t, filler)[rows] for t in clean)
        x.requires_grad_()
        options = {"weights_BT": weights_BT[rows]}
        m = mask_BT[rows]
        loss, stats = policy_loss(x, rest[0], rest[1], m, clip=0.2, dual_clip=1.5, **options)
        error, clipped = value_loss(x, rest[0], rest[2], m, clip=0.2, **options)
        prices = [kl_loss(x, rest[0], m, estimator=estimator, **options) for estimator in ("k2", "k3")]
        total = loss + 3 * error + sum(prices)
        (grad,) = torch.autograd.grad(total, x)
        return torch.stack([loss, error, *prices, clipped]).detach(), grad, stats

    everything = list(range(len(mask)))
    sums, grad, stats = run(everything, 0.0)
    for filler in (torch.nan, torch.inf, -1e30):
        torch.testing.assert_close(run(everything, filler), (sums, grad, stats), rtol=0, atol=0)
    parts = parts_of(len(mask), data)
    pieces = [run(rows, torch.nan) for rows in parts]
    torch.testing.assert_close(sum(piece[0] for piece in pieces), sums)
    torch.testing.assert_close(functools.reduce(PolicyStats.plus, [piece[2] for piece in pieces]), stats)
    for rows, piece in zip(parts, pieces, strict=True):
        torch.testing.assert_close(piece[1], grad[rows])


# ---- clips


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual", "expected"),
    [
        (10.0, -1.0, None, 10.0),
        (10.0, -1.0, 3.0, 3.0),  # one action cannot rule the update
        (2.0, -1.0, 3.0, 2.0),
        (0.1, -1.0, 3.0, 0.8),  # the ordinary clip
        (10.0, 1.0, 3.0, -1.2),  # nothing changes where the advantage is positive
        (0.1, 1.0, 3.0, -0.1),
    ],
)
def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage_only(ratio, advantage, dual, expected):
    logp_BT = torch.tensor([[ratio]]).log().requires_grad_()
    one = torch.ones(1, 1)
    loss, stats = policy_loss(
        logp_BT, 0 * one, advantage * one, one > 0, weights_BT=one, clip=0.2, dual_clip=dual
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected)
    stopped = abs(expected - -advantage * ratio) > 1e-6
    assert float(logp_BT.grad) == pytest.approx(0.0 if stopped else expected)
    assert float(stats.clip_fraction) == float(stopped)


def test_without_a_clip_the_loss_is_the_weighted_ratio_and_never_stops_the_gradient():
    logp_BT, old_BT, advantages_BT, mask_BT = _batch(seed=6, spread=3.0)
    x_BT = logp_BT.clone().requires_grad_()
    loss, stats = policy_loss(x_BT, old_BT, advantages_BT, mask_BT, weights_BT=even(mask_BT, 4), clip=None)
    expected = torch.where(mask_BT, -advantages_BT * (logp_BT - old_BT).exp() / 4, 0)
    torch.testing.assert_close(loss, expected.sum())
    torch.testing.assert_close(torch.autograd.grad(loss, x_BT)[0], expected)
    assert float(stats.clip_fraction) == 0


@pytest.mark.parametrize(
    ("estimator", "loss", "slope"),
    [("k2", 0.5 * 0.49, 0.7), ("k3", math.exp(-0.7) - 1 + 0.7, 1 - math.exp(-0.7))],
)
def test_the_price_of_the_kl_is_the_weighted_estimate_with_its_slope(estimator, loss, slope):
    logp_BT = torch.tensor([[-1.0, -5.0]], requires_grad=True)
    mask_BT = torch.tensor([[True, False]])
    got = kl_loss(
        logp_BT, torch.tensor([[-1.7, 3.0]]), mask_BT, weights_BT=0.5 * mask_BT, estimator=estimator
    )
    got.backward()
    assert float(got.detach()) == pytest.approx(loss / 2, rel=1e-5)
    assert logp_BT.grad.tolist() == [[pytest.approx(slope / 2, rel=1e-5), 0.0]]


def test_k1_as_a_loss_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="only k2 and k3"):
        kl_loss(one, one, one > 0, weights_BT=one, estimator="k1")
