import math

import pytest
import torch

from policy.ppo.kl import adapt, forward_kl, k1, k2, k3, sequence_kl

SAMPLES = 1_000_000


@pytest.mark.parametrize(
    ("mean", "bias", "spread"),
    [  # relative to the true KL: Schulman's note, p = N(mean, 1), q = N(0, 1)
        (0.1, {k1: 0.0, k2: 0.002, k3: 0.0}, {k1: 20.0, k2: 1.42, k3: 1.42}),
        (1.0, {k1: 0.0, k2: 0.25, k3: 0.0}, {k1: 2.0, k2: 1.73, k3: 1.7}),
    ],
)
def test_the_estimators_have_the_published_bias_and_spread_on_two_gaussians(mean, bias, spread):
    x = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logq, logp = -x.square() / 2, -(x - mean).square() / 2
    true_kl = mean**2 / 2
    for estimator in (k1, k2, k3):
        samples = estimator(logq, logp) / true_kl
        standard_error = float(samples.std()) / math.sqrt(SAMPLES)
        rounding = 0.0005  # of the published bias, three decimals
        assert abs(float(samples.mean()) - 1 - bias[estimator]) < 4 * standard_error + rounding
        assert float(samples.std()) == pytest.approx(spread[estimator], rel=0.02)


def test_k1_and_k3_are_exact_for_an_enumerated_distribution_and_the_direction_is_q_to_p():
    q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    p = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(q), torch.distributions.Categorical(p)
    )
    torch.testing.assert_close((q * k1(q.log(), p.log())).sum(), expected)
    torch.testing.assert_close((q * k3(q.log(), p.log())).sum(), expected)


def test_k2_and_k3_are_never_negative_and_zero_only_at_equality():
    logq = torch.arange(-60, 61) / 20
    logp = torch.zeros_like(logq)
    for estimator in (k2, k3):
        values = estimator(logq, logp)
        assert (values >= 0).all()
        assert (values == 0).nonzero().flatten().tolist() == [60]


def test_k3_keeps_its_digits_at_the_small_differences_of_a_ppo_epoch():
    difference = torch.tensor(1e-3)
    assert float(k3(torch.tensor(0.0), difference)) == pytest.approx(5.0017e-7, rel=1e-3)


def test_sequence_kl_sums_the_actions_of_each_response_and_nothing_else():
    logp_BT = torch.tensor([[-1.0, -2.0, float("nan")], [-1.0, -1.0, -1.0]])
    ref_BT = torch.tensor([[-1.5, -4.0, 7.0], [-0.5, -0.5, -0.5]])
    mask_BT = torch.tensor([[True, True, False], [True, False, True]])
    assert sequence_kl(logp_BT, ref_BT, mask_BT).tolist() == [2.5, -1.0]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 512 / 10_000)),
        (5.4, 0.15 * (1 - 0.1 * 512 / 10_000)),
        (60.0, 0.15 * (1 + 0.2 * 512 / 10_000)),  # held
        (-5.0, 0.15 * (1 - 0.2 * 512 / 10_000)),
    ],
)
def test_the_kl_coefficient_follows_the_clipped_relative_error(kl, expected):
    assert adapt(0.15, kl, target=6.0, horizon=10_000, n=512) == pytest.approx(expected)


@pytest.mark.parametrize(("kl", "target", "horizon"), [(math.nan, 6, 10), (1, 0, 10), (1, 6, 0)])
def test_a_kl_or_target_that_cannot_steer_is_an_error(kl, target, horizon):
    with pytest.raises(ValueError, match="KL"):
        adapt(0.15, kl, target=target, horizon=horizon, n=1)


def test_the_forward_kl_from_samples_of_the_policy_is_exact_over_all_responses():
    """Responses of up to two of three tokens; token 2 ends one, so that lengths differ."""
    g = torch.Generator().manual_seed(1)
    policy, ref = (torch.randn(2, 3, 3, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    paths = [(2,), *((a, b) for a in (0, 1) for b in range(3))]
    rows = torch.zeros(2, len(paths), 2, dtype=torch.float64)
    mask = torch.zeros(len(paths), 2, dtype=torch.bool)
    for n, path in enumerate(paths):
        for t, token in enumerate(path):
            rows[:, n, t] = torch.stack([p[t, path[0] if t else 0, token] for p in (policy, ref)])
            mask[n, t] = True
    rows[:, ~mask] = torch.tensor([[-3.0], [4.0]], dtype=torch.float64)  # padding holds anything
    logp, ref_logp = (torch.where(mask, x, 0.0).sum(-1) for x in rows)
    found = forward_kl(*rows, mask)
    torch.testing.assert_close((logp.exp() * found).sum(), (ref_logp.exp() * (ref_logp - logp)).sum())
    assert (found >= 0).all()
    assert (found > 0).any()
    assert forward_kl(rows[0], rows[0], mask).tolist() == [0.0] * len(paths)
    assert torch.isfinite(forward_kl(rows[0] - 1000, rows[1], mask)).all()
