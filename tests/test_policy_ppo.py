"""The PPO loop on a tiny model: it learns, is the same however it is cut, and stops on what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_ppo import LIMIT, TOKENIZER, assert_close, trained, trainer, varied, weights

import policy.ppo.rollout
import policy.ppo.trainer
import policy.ppo.update
from policy.ppo import checks
from policy.ppo.checks import InvariantError
from rlhf.errors import UserError
from rlhf.training.metrics import read_metrics

LETTER = TOKENIZER.decode([40])


def share(said):
    """Share of the one letter that is wanted."""
    return torch.tensor([text.count(LETTER) / LIMIT for text in said.texts])


def test_the_policy_learns_what_is_scored_and_a_high_price_of_kl_holds_it_back(tmp_path):
    log = {}
    for price in (0.005, 1.0):
        folder = tmp_path / str(price)
        options = {"steps": 27, "batch_size": 32, "micro_batch_size": 32, "learning_rate": 2e-2}
        trained(folder, reward_fn=share, kl_coef=price, schedule="constant", **options)
        log[price] = read_metrics(folder)
        assert [row["step"] for row in log[price]] == list(range(1, 28))
        assert log[price][0]["objective/score"] < 0.05
        assert abs(log[price][0]["objective/kl"]) < 1e-4

    def end(price, name):
        return sum(row[name] for row in log[price][-5:]) / 5

    assert end(0.005, "objective/score") > 0.6
    assert end(0.005, "objective/kl") > 10
    assert end(0.005, "policy/entropy") < log[0.005][0]["policy/entropy"]
    assert end(1.0, "objective/score") < 0.2
    assert 0 < end(1.0, "objective/kl_k3") < 5


def test_token_rewards_are_the_score_at_the_end_less_the_price_of_every_token(tmp_path):
    built = trainer(tmp_path, stir=0.2, kl_coef=0.3)
    built.done = 1
    rollout = built.collect_rollout(1)
    rewards = built.reward_shaper(rollout, built.kl_controller.coef)
    for b in range(len(rewards)):
        actions = int(rollout.actions_BR[b].sum())
        expected = -0.3 * (rollout.log_probs_BR[b] - rollout.reference_log_probs_BR[b])[:actions]
        expected[-1] += rollout.scores_B[b]
        torch.testing.assert_close(rewards[b, :actions], expected)
    assert float(rewards.abs().max()) > 0.1


@pytest.mark.parametrize("change", [{"micro_batch_size": 4}, {"trunk": False}, {"rollout_batch_size": 5}])
def test_how_the_work_is_cut_does_not_change_the_weights(change, tmp_path):
    options = {"minibatches": 2, "learning_rate": 1e-3}
    expected = trained(tmp_path / "a", **options)
    fresh = weights(trainer(tmp_path / "b", **options))
    assert max(float((expected[n] - fresh[n]).abs().max()) for n in expected) > 1e-3
    assert_close(trained(tmp_path / "c", **options, **change), expected, atol=1e-5)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    expected = trained(tmp_path / "whole", steps=4, checkpoint_every=2)
    calls = []

    def interrupted(said):
        calls.append(said)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return varied(said)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "parts", steps=4, checkpoint_every=2, reward_fn=interrupted).train()
    again = trainer(tmp_path / "parts", steps=4, checkpoint_every=2)
    assert again.done == 2
    at_two = weights(again)
    again.train()
    assert any(not torch.equal(tensor, at_two[name]) for name, tensor in expected.items())
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, expected[name]), name
    logs = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(tmp_path / part)]
        for part in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_a_step_that_went_far_leaves_out_its_other_epochs(tmp_path):
    for target_kl, updates in ((None, 5), (1e-9, 2), (1e9, 5)):
        folder = tmp_path / str(target_kl)
        trained(folder, steps=1, epochs=5, target_kl=target_kl)
        assert read_metrics(folder)[0]["policy/updates"] == updates


@pytest.mark.parametrize(("schedule", "shares"), [("linear", [1, 0.75, 0.5, 0.25]), ("constant", [1] * 4)])
def test_the_learning_rates_follow_the_schedule(schedule, shares, tmp_path):
    built = trainer(
        tmp_path, steps=4, epochs=1, learning_rate=1e-3, value_learning_rate=2e-3, schedule=schedule
    )
    built.train()
    logged = [row["policy/learning_rate"] for row in read_metrics(tmp_path)]
    assert logged == pytest.approx([1e-3 * part for part in shares])
    rates = [group["lr"] for group in built.runtime.optimizer.param_groups]
    assert rates == pytest.approx([1e-3 * shares[-1], 2e-3 * shares[-1]])


def test_a_response_that_was_cut_is_scored_as_the_recipe_says(tmp_path):
    rewards = {}
    for mode in ("ignore", "replace", "subtract"):
        built = trainer(tmp_path, reward_fn=lambda r: torch.full((len(r.texts),), 5.0), missing_eos=mode,
                        missing_eos_penalty=2.0)  # fmt: skip
        rollout = built.collect_rollout(0)
        rewards[mode] = built.reward_shaper(rollout, built.kl_controller.coef).sum(-1)
    cut = ~rollout.ended_B
    assert bool(cut.any())
    for mode, expected in (("ignore", 5.0), ("replace", -2.0), ("subtract", 3.0)):
        torch.testing.assert_close(rewards[mode][cut], torch.full_like(rewards[mode][cut], expected))
        torch.testing.assert_close(rewards[mode][~cut], torch.full_like(rewards[mode][~cut], 5.0))


# ---- invariants


ACTIONS = torch.tensor([[True, True, False], [True, False, False]])


def test_a_reference_that_is_another_model_is_found():
    log_probs = torch.full((2, 3), -1.0)
    beyond = torch.where(ACTIONS, log_probs, torch.nan)  # what is not an action does not count
    checks.check_reference(log_probs, beyond, ACTIONS)
    off = log_probs.clone()
    off[0, 1] -= 1e-3
    for wrong in (off, torch.full_like(off, torch.nan)):
        with pytest.raises(InvariantError, match="reference is not the model"):
            checks.check_reference(log_probs, wrong, ACTIONS)


def test_a_sampler_that_runs_another_model_is_found():
    log_probs = torch.full((2, 3), -1.0)
    off = log_probs - torch.tensor([[0.3, 0.0, 9.0], [0.0, 9.0, 9.0]])
    assert checks.check_sampler(off, log_probs, ACTIONS, bound=0.11) == pytest.approx(0.1)
    for wrong, bound in ((off, 0.09), (off * torch.nan, 1.0)):
        with pytest.raises(InvariantError, match="max_log_prob_gap"):
            checks.check_sampler(wrong, log_probs, ACTIONS, bound=bound)


def test_a_first_ratio_off_one_is_found():
    checks.check_first_ratio(torch.tensor(1e-4))
    for wrong in (0.1, torch.nan):
        with pytest.raises(InvariantError, match="first ratio"):
            checks.check_first_ratio(torch.tensor(wrong))


def test_a_sequence_that_does_not_end_in_eos_is_found():
    mask = torch.tensor([[False, True, True, True], [True, True, True, False]])
    checks.check_closed(torch.tensor([[0, 5, 6, 1], [5, 6, 1, 0]]), mask, 1)
    with pytest.raises(InvariantError, match="does not end in EOS"):
        checks.check_closed(torch.tensor([[0, 5, 6, 1], [5, 6, 7, 1]]), mask, 1)


@pytest.mark.parametrize(
    ("reward_fn", "message"),
    [
        (lambda said: torch.zeros(len(said.texts) + 1), r"shape \(5,\) for 4"),
        (lambda said: torch.zeros(1), r"shape \(1,\) for 4"),
        (lambda said: torch.zeros(len(said.texts), 1), r"shape \(4, 1\) for 4"),
        (lambda said: torch.tensor([0.0, torch.nan, torch.inf, 1.0]), "2 of 4 scores are not finite"),
    ],
)
def test_scores_must_be_one_finite_number_a_response(reward_fn, message, tmp_path):
    with pytest.raises(InvariantError, match=message):
        trainer(tmp_path, reward_fn=reward_fn, micro_batch_size=4).train()


def shifted(rollout, *names):
    return rollout._replace(**{name: getattr(rollout, name) - 0.1 for name in names})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("reference_log_probs_BR",), "reference is not the model"),
        (("sampled_log_probs_BR",), "max_log_prob_gap"),
        (("log_probs_BR", "reference_log_probs_BR", "sampled_log_probs_BR"), "first ratio"),
    ],
)
def test_the_loop_checks_what_it_collects(names, message, monkeypatch, tmp_path):
    real = policy.ppo.trainer.collect
    monkeypatch.setattr(policy.ppo.trainer, "collect", lambda *a, **k: shifted(real(*a, **k), *names))
    with pytest.raises(InvariantError, match=message):
        trainer(tmp_path).train()
    built = trainer(tmp_path / "unchecked", steps=1)
    built.check_rollout = lambda *_: None
    if message != "first ratio":
        built.train()


def test_a_policy_that_does_not_start_as_the_reference_is_found(tmp_path):
    with pytest.raises(InvariantError, match="reference is not the model"):
        trainer(tmp_path, stir=0.2).train()


# ---- losses and gradients that are not finite


def nan_loss(loss, log_probs):
    return loss * torch.nan


def nan_gradient(loss, log_probs):
    return loss + (log_probs - log_probs.detach()).abs().sum().sqrt()


def spoil(monkeypatch, how, calls):
    """Let some calls of the policy loss, counted from 0, go wrong."""
    real, count = policy.ppo.update.policy_loss, iter(range(10**6))

    def wrong(log_probs, *rest, **options):
        loss, stats = real(log_probs, *rest, **options)
        return (how(loss, log_probs) if next(count) in calls else loss), stats

    monkeypatch.setattr(policy.ppo.update, "policy_loss", wrong)


@pytest.mark.parametrize("how", [nan_loss, nan_gradient])
def test_an_update_that_is_not_finite_is_skipped_counted_and_dumped(how, monkeypatch, tmp_path):
    spoil(monkeypatch, how, {1})  # the second of four micro-batches: the first has left its gradient behind
    built = trainer(tmp_path, steps=1, epochs=1, micro_batch_size=4)
    before = weights(built)
    built.train()
    for name, tensor in weights(built).items():
        assert torch.equal(tensor, before[name]), name
    assert built.nonfinite.count == 1
    assert all(p.grad is None or not p.grad.any() for p in built.backbone.parameters())
    (file,) = (tmp_path / "nonfinite_batches").iterdir()
    assert load_file(file)["ids_BT"].shape[0] == 16
    assert read_metrics(tmp_path)[0]["policy/nonfinite_updates"] == 1
    checkpoint = built.checkpoints.newest()
    assert json.loads((checkpoint / "state.json").read_text())["nonfinite_updates"] == 1


def test_a_run_recovers_from_a_bad_update(monkeypatch, tmp_path):
    spoil(monkeypatch, nan_loss, {0})
    built = trainer(tmp_path, steps=1, epochs=2)
    before = weights(built)
    built.train()
    assert read_metrics(tmp_path)[0]["policy/updates"] == 1
    moved = [n for n, t in weights(built).items() if not torch.equal(t, before[n])]
    assert len(moved) > 10
    assert all(t.isfinite().all() for t in weights(built).values())


def test_too_many_bad_updates_stop_the_run(monkeypatch, tmp_path):
    spoil(monkeypatch, nan_loss, range(100))
    built = trainer(tmp_path, steps=5, epochs=1, max_nonfinite_updates=2)
    with pytest.raises(UserError, match="not finite 3 times"):
        built.train()
    assert len(read_metrics(tmp_path)) == 2
