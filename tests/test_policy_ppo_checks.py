"""What stops a run: invariants that do not hold, scores that are none, updates that are not finite, a KL."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_ppo import SMALL, trainer, weights

import policy.ppo.trainer
import policy.ppo.update
from policy.ppo import checks
from policy.ppo.checks import GuardedScore, InvariantError, time_limit
from policy.ppo.rollout import Responses
from rlhf.errors import UserError
from rlhf.training.metrics import read_metrics

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


def gap_check(bound=None, precision="bfloat16"):
    return checks.SamplerGap(bound, precision, lambda gaps: [gaps])


LOG_PROBS = torch.full((2, 3), -1.0)
OFF = torch.tensor([[0.3, 0.0, 9.0], [0.0, 9.0, 9.0]])  # the actions' mean is 0.1


def test_a_sampler_that_runs_another_model_is_found():
    found = gap_check(0.11)(LOG_PROBS - OFF, LOG_PROBS, ACTIONS)
    assert found == {"policy/sampler_gap": pytest.approx(0.1), "policy/sampler_gap_p99": pytest.approx(0.3)}
    for wrong, bound in ((OFF, 0.09), (OFF * torch.nan, 1.0)):
        with pytest.raises(InvariantError, match="max_log_prob_gap"):
            gap_check(bound)(LOG_PROBS - wrong, LOG_PROBS, ACTIONS)


def test_the_bound_of_the_sampler_follows_from_the_rounding_before_the_first_update(capsys):
    check = gap_check()
    check(LOG_PROBS - OFF, LOG_PROBS, ACTIONS)
    assert check.floor == (pytest.approx(0.1), pytest.approx(0.3))
    assert capsys.readouterr().out == (
        "ppo: before the first update sampling and training differ by 0.1 nats a token "
        "(99th percentile 0.3), the rounding of bfloat16; on average they may by 0.4\n"
    )
    check(LOG_PROBS - 3.9 * OFF, LOG_PROBS, ACTIONS)
    again = gap_check()
    again.restore(json.loads(json.dumps(check.state())))
    for kept in (check, again):
        with pytest.raises(InvariantError, match=r"0\.41 nats.*rounding of bfloat16"):
            kept(LOG_PROBS - 4.1 * OFF, LOG_PROBS, ACTIONS)
        assert kept.floor == check.floor
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.05), ("bfloat16", 0.25), ("int8", 0.75)])
def test_a_sampler_that_is_wrong_from_the_start_is_not_taken_for_rounding(precision, bound):
    gap_check(None, precision)(LOG_PROBS - 0.99 * bound / 0.1 * OFF, LOG_PROBS, ACTIONS)
    with pytest.raises(InvariantError, match=f"beyond the rounding of {precision}"):
        gap_check(None, precision)(LOG_PROBS - 1.01 * bound / 0.1 * OFF, LOG_PROBS, ACTIONS)


def test_a_sampler_whose_rounding_is_nothing_may_differ_a_little_later():
    check = gap_check(None, "float32")
    check(LOG_PROBS, LOG_PROBS, ACTIONS)
    check(LOG_PROBS - 0.49 * OFF, LOG_PROBS, ACTIONS)
    with pytest.raises(InvariantError, match=r"above 0\.05"):
        check(LOG_PROBS - 0.51 * OFF, LOG_PROBS, ACTIONS)


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


# ---- the reward function


SAID = Responses([()] * 3, ["a", "b", "c"], torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 4) > 0, None)


def raising(error):
    def score(said):
        raise error

    return score


def answering(*scores):
    return lambda said: torch.tensor(scores)


def test_a_good_answer_is_passed_on_unchanged():
    assert GuardedScore(answering(1.0, -2.0, 3.5), 1)(SAID).tolist() == [1.0, -2.0, 3.5]


@pytest.mark.parametrize(
    ("reward_fn", "message"),
    [
        (raising(KeyError("token")), r"failed on 3 responses \(KeyError: 'token'\)"),
        (raising(ValueError("first line\nsecond line")), r"\(ValueError: first line\)"),
        (raising(RuntimeError()), r"\(RuntimeError: \)"),
        (raising(UserError("as it is")), r"^as it is$"),
        (answering(1.0, 2.0), r"shape \(2,\) for 3 responses"),
        (answering([1.0], [2.0], [3.0]), r"shape \(3, 1\) for 3 responses"),
        (answering(1.0, torch.nan, 2.0), "1 of 3 scores are not finite"),
        (answering(torch.inf, -torch.inf, 2.0), "2 of 3 scores are not finite"),
        (lambda said: [1.0, 2.0, 3.0], "returned a list, not a tensor"),
    ],
)
def test_a_bad_answer_is_one_line_that_says_what_it_was(reward_fn, message):
    with pytest.raises(UserError, match=message) as caught:
        GuardedScore(reward_fn, 1)(SAID)
    assert "\n" not in str(caught.value)


def test_what_ends_a_program_goes_through():
    for error in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)):
            GuardedScore(raising(error), 1)(SAID)


def test_only_a_call_that_takes_too_long_is_ended(monkeypatch):
    ended = []
    monkeypatch.setattr(checks, "_end", ended.append)
    with time_limit(0.1, "late"):
        pass
    time.sleep(0.3)
    assert not ended
    with time_limit(0.1, "late"):
        time.sleep(0.3)
    assert ended == ["late"]


# ---- the figures of a step


def test_nothing_is_decided_by_the_log(tmp_path):
    ends = []
    for name, log in (("logged", None), ("not", lambda *_: None)):
        warm = {"steps": 4, "value_warmup": 2, "value_warmup_until": -1e9, "max_kl": 1e-9}
        built = trainer(tmp_path / name, trackers=["tensorboard"], **SMALL | warm)
        built.log = log or built.log
        built.train()
        ends.append((built.done, built.ended_early, built.weights.value_warmup.steps, weights(built)))
        assert (tmp_path / name / "tensorboard").is_dir()
    (*one, at_end), (*other, at_other_end) = ends
    assert one == other
    assert one[0] == 3  # the second step taught the policy, and the third was its KL
    assert all(torch.equal(tensor, at_other_end[n]) for n, tensor in at_end.items())
