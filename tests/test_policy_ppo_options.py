"""Every option of PPO changes what it should and nothing else.

A new field of the section fails here until it has a line in the table.
"""

import pytest
import torch
from conftest import ROOT
from tiny_ppo import SMALL, trainer, weights

from policy.ppo.checks import InvariantError
from rlhf.errors import UserError
from rlhf.recipe.schema import Ppo
from rlhf.training.metrics import read_metrics

BASE = SMALL | {
    "epochs": 2, "learning_rate": 5e-2, "adam_epsilon": 1e-2, "max_grad_norm": 1e9, "kl_coef": 0.3,
    "whiten_advantages": False, "stir": 0.5, "score_timeout_minutes": 1.0,
}  # fmt: skip

# What is looked at in the first step, in the order of the loop: the texts; whether the trunk is kept; scores
# as they enter the reward; rewards; advantages; returns; losses and gradient norm of the first update; number
# of updates; weights after the step. And over all steps: learning rates, KL coefficients, how many were done,
# names in the log, files.
LEARNED = {"policy", "value"}
UPDATED = {"loss", "value_loss", "gradient"} | LEARNED
ESTIMATED = {"advantages", "returns"} | UPDATED
SHAPED = {"rewards"} | ESTIMATED
SCORED = {"scores"} | SHAPED
SAID = {"texts"} | SCORED
PTX = {"ptx_coef": 1.0, "ptx_texts": ["one.txt"]}

TABLE = {  # field: (its other value, what both runs need beside it, what it changes)
    "steps": (3, {}, {"rates", "coefs", "done", "files"}),
    "batch_size": (12, {}, SAID),
    "samples_per_prompt": (2, {}, SAID),
    "rollout_batch_size": (3, {}, set()),
    "temperature": (0.7, {}, SAID),
    "trunk_gigabytes": (0.0, {}, {"trunk"}),
    "score_shape": ("sigmoid", {}, SCORED),
    "reference_samples": (3, {"score_shape": "sigmoid"}, SCORED),
    "score_normalization": ("running", {}, SCORED),
    "score_clip": (1.0, {}, SCORED),
    "missing_eos": ("replace", {}, SCORED),
    "missing_eos_penalty": (2.0, {"missing_eos": "subtract"}, SCORED),
    "length_penalty": (0.5, {}, SCORED),
    "length_target": (2, {"length_penalty": 0.5}, SCORED),
    "kl_coef": (0.6, {}, SHAPED | {"coefs"}),
    "kl_controller": ("adaptive", {}, {"coefs"}),
    "kl_controller_target": (0.01, {"kl_controller": "adaptive"}, {"coefs"}),
    "kl_controller_horizon": (100, {"kl_controller": "adaptive"}, {"coefs"}),
    "kl_in": ("loss", {"kl_estimator": "k2"}, SHAPED | {"names"}),
    "kl_estimator": ("k2", {}, SHAPED),
    "target_kl": (1e-9, {"epochs": 3}, {"updates"} | LEARNED),
    "max_kl": (1e-9, {}, {"rates", "coefs", "done", "files"}),
    "algorithm": ("reinforce", {}, ESTIMATED | {"names", "files"}),
    "gamma": (0.5, {}, ESTIMATED),
    "lam": (0.5, {}, ESTIMATED),
    "lam_value": (0.2, {}, {"returns", "value_loss", "value", "gradient"}),
    "lam_length": (0.4, {}, {"advantages", "loss", "gradient", "policy"}),
    "whiten_rewards": (True, {}, SHAPED),
    "whiten_advantages": (True, {}, {"advantages", "loss", "gradient", "policy"}),
    "clip_range": (0.01, {}, {"policy"}),
    "dual_clip": (1.001, {"clip_range": None}, {"policy"}),
    "loss_level": ("sequence", {}, UPDATED),
    "entropy_coef": (0.5, {}, {"gradient", "policy"}),
    "value": ("shared", {}, {"gradient", "files"} | LEARNED),
    "value_clip_range": (1e-4, {}, {"value"}),
    "value_coef": (0.5, {}, {"gradient", "value"}),
    "value_warmup": (
        1, {}, {"loss", "gradient", "policy", "rates", "names", "returns", "value_loss", "value"},
    ),
    "value_warmup_until": (-1e9, {"value_warmup": 2, "steps": 3}, {"rates"}),
    "ptx_coef": (4.0, PTX, {"gradient", "policy"}),
    "ptx_texts": (["two.txt"], PTX, {"gradient", "policy"}),
    "ptx_batch_size": (4, PTX | {"ptx_batch_size": 2}, {"gradient", "policy"}),
    "ptx_max_tokens": (4, PTX, {"gradient", "policy"}),
    "minibatches": (2, {}, UPDATED | {"updates"}),
    "micro_batch_size": (3, {}, set()),
    "epochs": (1, {}, LEARNED | {"updates"}),
    "learning_rate": (1e-1, {"value_learning_rate": 1e-2}, {"rates", "policy"}),
    "value_learning_rate": (2e-2, {}, {"value"}),
    "schedule": ("constant", {}, {"rates"}),
    "warmup_steps": (1, {}, {"rates"} | LEARNED),
    "adam_epsilon": (1e-5, {}, LEARNED),
    "max_grad_norm": (1e-3, {}, LEARNED),
    "ema_decay": (0.5, {}, {"files"}),
    "checkpoint_every": (1, {}, {"files"}),
}  # fmt: skip

REFUSED = {  # field: (its other value, the error)
    "optimizer": ("paged_adamw_8bit", UserError, "needs a CUDA GPU"),
    "max_log_prob_gap": (1e-12, InvariantError, "max_log_prob_gap"),
}
ELSEWHERE = {  # field: the tests of its effect, outside the loop or of a fault
    "start": "test_policy_ppo_setup.py",
    "reward_model": "test_policy_ppo_setup.py",
    "rewards": "test_policy_rewards.py",
    "ensemble": "test_policy_ppo_setup.py",
    "ensemble_penalty": "test_policy_ppo_setup.py",
    "retokenize": "test_policy_ppo_setup.py",
    "score_timeout_minutes": "test_faults_recovery.py",
    "max_nonfinite_updates": "test_policy_ppo_checks.py",
    "value_warmup_missed": "test_policy_ppo_trainer.py",
    "test_reward_model": "test_policy_audit.py",
    "keep_best": "test_policy_audit.py",
}


def observe(folder, checked=False, **section):
    """Run two steps; returns all that is looked at, by name.

    checked: whether the invariants of a rollout are; a stirred policy is not its reference.
    """
    folder.mkdir()
    if "ptx_texts" in section:
        for name, line in (("one", "some plain words"), ("two", "others")):
            (folder / f"{name}.txt").write_text(f"{line}\nand more of it\nlast one\n", encoding="utf-8")
        section = section | {"ptx_texts": [str(folder / name) for name in section["ptx_texts"]]}
    built = trainer(folder / "run", **BASE | section)
    built.backbone.base.get_input_embeddings().weight.data[1] *= 8  # responses of unequal lengths
    seen = {}
    if not checked:
        built.check_rollout = lambda *_: None
    update, minibatch, scores = built.update, built.update._minibatch, built.reward_shaper.scores
    update_ema, estimate = built.weights.update_ema, built.estimate_advantages

    def note_rewards(rollout, rewards_BR):
        seen.setdefault("rewards", rewards_BR)
        return estimate(rollout, rewards_BR)

    def note_update_inputs(step, rollout, advantages_BR, returns_BR, kl_coef):
        first = {
            "texts": rollout.texts, "trunk": rollout.hidden_BTD is not None, "advantages": advantages_BR,
            "returns": torch.where(rollout.actions_BR, returns_BR, 0),
        }  # fmt: skip
        for name, value in first.items():
            seen.setdefault(name, value)
        return update(step, rollout, advantages_BR, returns_BR, kl_coef)

    def note_update(*args):
        stats = minibatch(*args)
        for name, figure in (
            ("loss", "policy/loss"),
            ("value_loss", "value/loss"),
            ("gradient", "policy/grad_norm"),
        ):
            seen.setdefault(name, stats.get(figure))
        return stats

    def note_scores(rollout):
        said = scores(rollout)
        seen.setdefault("scores", said)
        return said

    def note_weights():
        now = weights(built)
        for adapter in ("policy", "value"):
            seen.setdefault(adapter, {n: t for n, t in now.items() if n.startswith(f"{adapter}.")})
        update_ema()

    built.update, built.estimate_advantages = note_update_inputs, note_rewards
    update._minibatch, built.reward_shaper.scores = note_update, note_scores
    built.weights.update_ema = note_weights
    built.train()
    log = read_metrics(folder / "run")
    return seen | {
        "updates": log[0]["policy/updates"],
        "rates": [row["policy/learning_rate"] for row in log],
        "coefs": [row["objective/kl_coef"] for row in log],
        "done": built.done,
        "names": [sorted(row) for row in log[:1]],
        "files": sorted(
            str(file.relative_to(folder)) for file in (folder / "run" / "checkpoints").rglob("*.*")
        ),
    }


def same(one, other):
    """Whether two observations are equal, numbers to rounding."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=2e-6)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-4, abs=1e-6)
    if isinstance(one, list) and one and isinstance(one[0], float):
        return one == pytest.approx(other, rel=1e-9)
    return one == other


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What runs without the other value show, by what they need beside it; each is run once."""
    kept = {}

    def of(beside):
        key = repr(beside)
        if key not in kept:
            kept[key] = observe(tmp_path_factory.mktemp("plain") / "run", **beside)
        return kept[key]

    return of


@pytest.mark.parametrize("field", TABLE)
def test_an_option_changes_what_it_should_and_nothing_else(field, tmp_path, plain):
    value, beside, changes = TABLE[field]
    before, after = plain(beside), observe(tmp_path / "run", **beside | {field: value})
    assert before.keys() == after.keys()
    assert {name for name in before if not same(before[name], after[name])} == changes


@pytest.mark.parametrize("field", REFUSED)
def test_an_option_of_what_guards_a_run_ends_it(field, tmp_path):
    value, error, message = REFUSED[field]
    with pytest.raises(error, match=message):
        observe(tmp_path / "run", checked=True, **{field: value})


@pytest.mark.parametrize("field", ELSEWHERE)
def test_an_option_with_tests_elsewhere_is_named_there(field):
    assert field in (ROOT / "tests" / ELSEWHERE[field]).read_text(encoding="utf-8")


def test_every_option_has_its_line():
    tables = [set(TABLE), set(REFUSED), set(ELSEWHERE)]
    assert set.union(*tables) == set(Ppo.model_fields)
    assert sum(map(len, tables)) == len(Ppo.model_fields)


def test_the_plain_run_shows_what_the_options_can_change(plain):
    seen = plain({})
    assert len({len(text) for text in seen["texts"]}) > 1
    lengths = (seen["rewards"] != 0).sum(-1)
    assert len(lengths.unique()) > 1
    assert seen["trunk"]
    assert len(seen["policy"]) > 10
