import itertools

import pytest
import torch

from policy.advantages import gae, token_rewards
from policy.loss import policy_loss, value_loss
from rlhf.sequences import action_mask

EOS = 0


def _batch(seed=0, batch=6, width=5, spread=0.4):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(batch, width, generator=generator, dtype=torch.float64)

    old_BT = noise() - 2
    logp_BT = old_BT + spread * noise()
    lengths_B = torch.randint(1, width + 1, (batch,), generator=generator)
    return logp_BT, old_BT, noise(), torch.arange(width) < lengths_B[:, None]


@pytest.mark.parametrize("vocabulary", [2, 3])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_first_gradient_is_the_exact_policy_gradient_of_an_enumerated_policy(vocabulary, kl_coef):
    """All responses of up to two tokens, EOS ends one early; J = E[score] - kl_coef * KL, with a baseline."""
    generator = torch.Generator().manual_seed(vocabulary)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first_V, second_VV = draw(vocabulary).requires_grad_(), draw(vocabulary, vocabulary).requires_grad_()
    ref_first_V, ref_second_VV = draw(vocabulary), draw(vocabulary, vocabulary)
    baseline, baseline_V = draw(1), draw(vocabulary)
    responses_BT = torch.tensor(
        [[EOS, EOS], *itertools.product(range(1, vocabulary), range(vocabulary))],
    )
    scores_B = draw(len(responses_BT))
    mask_BT = action_mask(responses_BT, EOS)
    a_B, b_B = responses_BT.unbind(dim=1)

    def log_probs(first_V, second_VV):
        step_1 = first_V.log_softmax(-1)[a_B]
        step_2 = second_VV.log_softmax(-1)[a_B, b_B]
        return torch.stack([step_1, step_2], dim=1)

    logp_BT, ref_BT = log_probs(first_V, second_VV), log_probs(ref_first_V, ref_second_VV)
    probability_B = (logp_BT * mask_BT).sum(dim=1).exp()
    assert float(probability_B.detach().sum()) == pytest.approx(1)

    objective = (probability_B * (scores_B - kl_coef * ((logp_BT - ref_BT) * mask_BT).sum(dim=1))).sum()
    exact = torch.autograd.grad(objective, [first_V, second_VV], retain_graph=True)

    old_BT = logp_BT.detach()
    values_BT = torch.stack([baseline.expand(len(a_B)), baseline_V[a_B]], dim=1)
    rewards_BT = token_rewards(scores_B, old_BT, ref_BT, mask_BT, kl_coef=kl_coef)
    advantages_BT, _ = gae(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=1.0)
    weighted_BT = probability_B.detach()[:, None] * advantages_BT  # every response as often as it is drawn
    loss, stats = policy_loss(logp_BT, old_BT, weighted_BT, mask_BT, clip=0.2, normaliser=1.0)
    estimated = torch.autograd.grad(loss, [first_V, second_VV])
    for got, expected in zip(estimated, exact, strict=True):
        torch.testing.assert_close(-got, expected)
        assert float(expected.abs().max()) > 0.01
    assert float(stats.max_ratio_error) == 0
    assert float(stats.clip_fraction) == 0


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
    loss, stats = policy_loss(logp_BT, old_BT, advantages_BT, mask_BT, clip=0.2, normaliser=n)
    assert float(loss) == pytest.approx(total / n)
    assert float(stats.ratio) == pytest.approx(sum(ratios) / n)
    assert float(stats.max_ratio_error) == pytest.approx(max(errors))
    assert 0 < clipped < n
    assert float(stats.clip_fraction) == pytest.approx(clipped / n)
    delta = (logp_BT - old_BT)[mask_BT]
    assert float(stats.kl_k2) == pytest.approx(float(delta.square().mean() / 2))
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
    loss, stats = policy_loss(logp_BT, old_BT, torch.tensor([[advantage]]), mask_BT, clip=0.2, normaliser=1.0)
    loss.backward()
    expected = -advantage * ratio if learns else 0.0
    assert float(logp_BT.grad) == pytest.approx(expected)
    assert float(stats.clip_fraction) == (0.0 if learns else 1.0)


def test_micro_batches_of_both_losses_add_up_to_the_whole_with_their_gradients():
    logp_BT, old_BT, advantages_BT, mask_BT = _batch(seed=1)
    n = mask_BT.sum()

    def run(rows):
        x_BT = logp_BT[rows].clone().requires_grad_()
        rest = old_BT[rows], advantages_BT[rows], mask_BT[rows]
        loss, stats = policy_loss(x_BT, *rest, clip=0.2, normaliser=n)
        v_loss, v_clipped = value_loss(x_BT, *rest, clip=0.3, normaliser=n)
        (loss + v_loss).backward()
        return loss.detach(), stats, v_loss.detach(), v_clipped, x_BT.grad

    whole, first, second = run(slice(0, 6)), run(slice(0, 1)), run(slice(1, 6))
    torch.testing.assert_close(first[0] + second[0], whole[0])
    torch.testing.assert_close(first[1].plus(second[1]), whole[1])
    torch.testing.assert_close(first[2] + second[2], whole[2])
    torch.testing.assert_close(first[3] + second[3], whole[3])
    torch.testing.assert_close(torch.cat([first[4], second[4]]), whole[4])


def test_what_stands_in_the_padding_changes_neither_losses_nor_gradients():
    logp_BT, old_BT, third_BT, mask_BT = _batch(seed=2)
    results = []
    for filler in (0.0, float("nan"), 1e9):
        inputs = [torch.where(mask_BT, x, filler) for x in (logp_BT, old_BT, third_BT)]
        inputs[0].requires_grad_()
        loss, stats = policy_loss(*inputs, mask_BT, clip=0.2, normaliser=7.0)
        v_loss, v_clipped = value_loss(*inputs, mask_BT, clip=0.3, normaliser=7.0)
        (grad_BT,) = torch.autograd.grad(loss + v_loss, inputs[0])
        results.append((loss.detach(), *stats, v_loss.detach(), v_clipped, grad_BT))
        assert (grad_BT[~mask_BT] == 0).all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_the_value_loss_equals_a_scalar_loop():
    values_BT, old_BT, returns_BT, mask_BT = _batch(seed=3)
    total, clipped = 0.0, 0
    for b, t in mask_BT.nonzero().tolist():
        value, old, target = (float(x[b, t]) for x in (values_BT, old_BT, returns_BT))
        held = min(max(value, old - 0.3), old + 0.3)
        total += max((value - target) ** 2, (held - target) ** 2) / 2
        clipped += (held - target) ** 2 > (value - target) ** 2
    n = int(mask_BT.sum())
    loss, clip_fraction = value_loss(values_BT, old_BT, returns_BT, mask_BT, clip=0.3, normaliser=n)
    assert float(loss) == pytest.approx(total / n)
    assert 0 < clipped < n
    assert float(clip_fraction) == pytest.approx(clipped / n)


def test_without_a_clip_the_value_loss_is_half_the_mean_squared_error():
    values_BT, old_BT, returns_BT, mask_BT = _batch(seed=4)
    loss, clip_fraction = value_loss(
        values_BT, old_BT, returns_BT, mask_BT, clip=None, normaliser=int(mask_BT.sum())
    )
    expected = torch.nn.functional.mse_loss(values_BT[mask_BT], returns_BT[mask_BT]) / 2
    torch.testing.assert_close(loss, expected)
    assert float(clip_fraction) == 0


@pytest.mark.parametrize(("value", "learns"), [(1.5, False), (-1.5, True), (1.1, True)])
def test_a_value_that_moved_beyond_its_clip_towards_the_return_stops_learning(value, learns):
    values_BT = torch.tensor([[value]], requires_grad=True)
    old_BT, returns_BT, mask_BT = torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([[True]])
    loss, clip_fraction = value_loss(values_BT, old_BT, returns_BT, mask_BT, clip=0.2, normaliser=1.0)
    loss.backward()
    assert float(values_BT.grad) == pytest.approx(value - 3.0 if learns else 0.0)
    assert float(clip_fraction) == (0.0 if learns else 1.0)
