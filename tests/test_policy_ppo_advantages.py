import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ppo import trainer

from policy.ppo.advantages import estimate_advantages, gae, leave_one_out, length_adaptive_lam
from policy.ppo.kl import ESTIMATORS
from policy.ppo.metrics import rollout_metrics
from policy.ppo.reward_shaping import penalize_length, penalize_missing_eos, token_rewards


def _episodes(seed, batch=4, width=6):
    generator = torch.Generator().manual_seed(seed)
    rewards_BT = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    values_BT = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    lengths_B = torch.randint(0, width + 1, (batch,), generator=generator)
    return rewards_BT, values_BT, torch.arange(width) < lengths_B[:, None]


def _gae_by_loop(rewards, values, gamma, lam):
    advantages, following, value = [], 0.0, 0.0
    for reward, now in zip(reversed(rewards), reversed(values), strict=True):
        following = reward + gamma * value - now + gamma * lam * following
        value = now
        advantages.insert(0, following)
    return advantages


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_equals_a_scalar_loop_over_each_episode_and_ignores_the_padding(seed, gamma, lam):
    rewards_BT, values_BT, mask_BT = _episodes(seed)
    expected_BT = torch.zeros_like(rewards_BT)
    for b, length in enumerate(mask_BT.sum(dim=-1).tolist()):
        row = _gae_by_loop(rewards_BT[b, :length].tolist(), values_BT[b, :length].tolist(), gamma, lam)
        expected_BT[b, :length] = torch.tensor(row, dtype=torch.float64)
    rewards_BT[~mask_BT] = float("nan")
    values_BT[~mask_BT] = float("nan")
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages_BT, expected_BT)
    torch.testing.assert_close(returns_BT[mask_BT], (expected_BT + values_BT)[mask_BT])
    assert (returns_BT[~mask_BT] == 0).all()


def estimated(rewards_BT, values_BT, mask_BT, **options):
    options = {"algorithm": "ppo", "gamma": 0.9, "lam": 0.95, "samples": 1, "whiten": False} | options
    return estimate_advantages(rewards_BT, values_BT, mask_BT, all_reduce=lambda t: t, **options)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), lam=st.floats(0, 1), lam_value=st.floats(0, 1))
def test_the_returns_may_have_a_lambda_of_their_own(seed, lam, lam_value):
    rewards_BT, values_BT, mask_BT = _episodes(seed)
    advantages_BT, returns_BT = estimated(rewards_BT, values_BT, mask_BT, lam=lam, lam_value=lam_value)
    for b, length in enumerate(mask_BT.sum(dim=-1).tolist()):
        rewards, values = rewards_BT[b, :length].tolist(), values_BT[b, :length].tolist()
        policy, towards = (_gae_by_loop(rewards, values, 0.9, each) for each in (lam, lam_value))
        assert advantages_BT[b, :length].tolist() == pytest.approx(policy)
        assert returns_BT[b, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(towards, values, strict=True)]
        )


def test_a_lambda_of_1_trains_the_value_towards_the_discounted_rewards():
    rewards_BT, values_BT, mask_BT = _episodes(3)
    _, returns_BT = estimated(rewards_BT, values_BT, mask_BT, lam=0.3, lam_value=1.0)
    for b, length in enumerate(mask_BT.sum(dim=-1).tolist()):
        for t in range(length):
            total = sum(0.9 ** (k - t) * float(rewards_BT[b, k]) for k in range(t, length))
            assert float(returns_BT[b, t]) == pytest.approx(total)


def test_a_longer_response_has_a_larger_lambda():
    mask_BT = torch.arange(40) < torch.tensor([[40], [20], [10], [4], [0]])
    lam_B = length_adaptive_lam(mask_BT, 0.2)
    assert lam_B.tolist() == pytest.approx([1 - 1 / 8, 1 - 1 / 4, 1 - 1 / 2, 0.0, 0.0])
    rewards_BT, values_BT, _ = (torch.randn(5, 40, dtype=torch.float64) for _ in range(3))
    adaptive = estimated(rewards_BT, values_BT, mask_BT, lam=0.95, lam_length=0.2)
    for b, lam in enumerate(lam_B.tolist()):
        alone_BT, _ = gae(rewards_BT[[b]], values_BT[[b]], mask_BT[[b]], gamma=0.9, lam=lam)
        torch.testing.assert_close(adaptive[0][[b]], alone_BT, rtol=1e-6, atol=1e-6)
    _, plain_BT = estimated(rewards_BT, values_BT, mask_BT, lam=0.95)
    torch.testing.assert_close(adaptive[1], plain_BT, rtol=0, atol=0)  # the value's own stays


def test_grpo_divides_by_the_deviation_of_the_samples_of_a_prompt_and_dr_grpo_does_not():
    # two prompts of three samples; the samples of a prompt stand two rows apart
    rewards_BT = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0], [4.0, 6.0], [3.0, 3.0], [10.0, 0.0]])
    mask_BT = torch.ones(6, 2, dtype=torch.bool)
    mask_BT[4, 1] = False
    rewards_BT[4, 1] = 0.0
    values_BT = torch.full((6, 2), 7.0)
    plain_BT, returns_BT = estimated(rewards_BT, values_BT, mask_BT, algorithm="dr_grpo", samples=3)
    assert plain_BT[:, 0].tolist() == pytest.approx([-1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert returns_BT[:, 0].tolist() == [1.0, 10.0, 2.0, 10.0, 3.0, 10.0]
    divided_BT, _ = estimated(rewards_BT, values_BT, mask_BT, algorithm="grpo", samples=3)
    assert divided_BT[:, 0].tolist() == pytest.approx([-1.0, 0.0, 0.0, 0.0, 1.0, 0.0], abs=2e-4)
    assert divided_BT[4].tolist() == [divided_BT[4, 0], 0.0]
    twice_BT, _ = estimated(10 * rewards_BT, values_BT, mask_BT, algorithm="grpo", samples=3)
    torch.testing.assert_close(twice_BT, divided_BT, rtol=0, atol=2e-4)  # the scale of a prompt is gone
    loo_BT, _ = estimated(rewards_BT, values_BT, mask_BT, algorithm="rloo", samples=3)
    torch.testing.assert_close(loo_BT, 1.5 * plain_BT)


@pytest.mark.parametrize("row", [[False, True, True], [True, False, True]])
def test_an_action_behind_padding_is_refused(row):
    x_BT = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="padding on the right"):
        gae(x_BT, x_BT, torch.tensor([row]), gamma=1.0, lam=1.0)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), kl_coef=st.floats(0, 2), estimator=st.sampled_from(["k1", "k2", "k3"]))
def test_every_action_pays_the_estimate_that_is_asked_for_and_the_last_one_has_the_score(
    seed, kl_coef, estimator
):
    logp_BT, ref_BT, mask_BT = _episodes(seed)
    mask_BT[:, 0] = True
    scores_B = torch.arange(1.0, 5.0, dtype=torch.float64)
    expected_BT = torch.where(mask_BT, -kl_coef * ESTIMATORS[estimator](logp_BT, ref_BT), 0)
    expected_BT[range(4), mask_BT.sum(dim=-1) - 1] += scores_B
    logp_BT[~mask_BT] = float("nan")
    rewards_BT = token_rewards(scores_B, logp_BT, ref_BT, mask_BT, kl_coef=kl_coef, estimator=estimator)
    torch.testing.assert_close(rewards_BT, expected_BT)


def test_a_policy_that_likes_its_tokens_more_than_the_reference_does_pays():
    mask_BT = torch.tensor([[True, True, False]])
    logp_BT, ref_BT = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    rewards_BT = token_rewards(torch.tensor([3.0]), logp_BT, ref_BT, mask_BT, kl_coef=0.1)
    torch.testing.assert_close(rewards_BT, torch.tensor([[-0.05, 3.1, 0.0]]))


def test_a_response_without_any_action_is_refused():
    x_BT = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        token_rewards(torch.ones(2), x_BT, x_BT, torch.tensor([[True, False], [False, False]]), kl_coef=0.1)


def test_a_missing_eos_replaces_the_score_or_lowers_it():
    scores_B, ended_B = torch.tensor([2.0, 2.0, -5.0]), torch.tensor([True, False, False])
    assert penalize_missing_eos(scores_B, ended_B, penalty=1.0).tolist() == [2.0, -1.0, -1.0]
    lowered_B = penalize_missing_eos(scores_B, ended_B, penalty=1.0, mode="subtract")
    assert lowered_B.tolist() == [2.0, 1.0, -6.0]
    with pytest.raises(ValueError, match="reward a missing EOS"):
        penalize_missing_eos(scores_B, ended_B, penalty=-1.0)
    with pytest.raises(ValueError, match="neither"):
        penalize_missing_eos(scores_B, ended_B, penalty=1.0, mode="add")


def test_only_tokens_beyond_the_target_cost():
    scores_B, lengths_B = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2, 3, 7])
    assert penalize_length(scores_B, lengths_B, penalty=0.25, target=3).tolist() == [1.0, 1.0, 0.0]
    assert penalize_length(scores_B, lengths_B, penalty=0.25, target=0).tolist() == [0.5, 0.25, -0.75]


def test_a_single_sample_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="two samples"):
        leave_one_out(torch.ones(1, 3))


def test_while_the_value_warms_up_it_learns_the_rewards_and_a_random_one_explains_nothing(tmp_path):
    built = trainer(tmp_path, steps=3, value_warmup=1, lam=0.5, batch_size=64, micro_batch_size=64)
    rollout = built.collect_rollout(0)
    guess_B1 = 5 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    rollout = rollout._replace(values_BR=guess_B1.expand_as(rollout.values_BR) * rollout.actions_BR)
    rewards_BR = built.reward_shaper(rollout, 0.0)

    def explained():
        _, returns_BR = built.estimate_advantages(rollout, rewards_BR)
        found = rollout_metrics(built.runtime, rollout, rewards_BR, returns_BR, 64)
        return returns_BR, found["value/explained_variance"]

    returns_BR, share = explained()
    to_come_BR = rewards_BR.flip(-1).cumsum(-1).flip(-1) * rollout.actions_BR
    torch.testing.assert_close(returns_BR, to_come_BR, atol=1e-4, rtol=1e-4)
    assert share < 0.1
    built.done = 1
    assert explained()[1] > 0.4  # bootstrapped: the guess explains itself
