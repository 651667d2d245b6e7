"""One rollout's update is the same however the work is cut, kept or folded, with every kind of loss."""

import contextlib

import pytest
import torch
from tiny_ppo import SMALL, assert_close, trainer, weights

from rlhf.models.backbone import Backbone
from rlhf.training.metrics import read_metrics

PLAIN = SMALL | {"stir": 0.1, "start": True, "minibatches": 2, "batch_size": 12, "micro_batch_size": 12}
LOSSES = [  # every pair of settings stands in some row
    {"loss_level": level, "kl_in": place, "kl_estimator": "k2", "entropy_coef": bonus, "value": value,
     "kl_coef": 0.3}
    for level, place, bonus, value in (
        ("token", "reward", 0.0, "adapter"),
        ("token", "loss", 0.05, "shared"),
        ("sequence", "reward", 0.05, "adapter"),
        ("sequence", "loss", 0.0, "shared"),
        ("token", "reward", 0.05, "shared"),
        ("sequence", "loss", 0.05, "adapter"),
    )
]  # fmt: skip


def unfolded(monkeypatch):
    monkeypatch.setattr(Backbone, "folded", lambda self, role: contextlib.nullcontext())


def run(folder, **options):
    """Weights and log of two steps."""
    built = trainer(folder, **PLAIN | options)
    before = weights(built)
    built.train()
    return before, weights(built), read_metrics(folder)


FIGURES = (
    "policy/loss",
    "value/loss",
    "policy/ratio",
    "policy/kl_step",
    "policy/grad_norm",
    "policy/clip_fraction",
)


def assert_same(got, expected):
    assert_close(got[1], expected[1], atol=1e-5)
    for row, other in zip(got[2], expected[2], strict=True):
        for name in FIGURES:
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("losses", LOSSES, ids=lambda losses: "-".join(map(str, losses.values())))
def test_weights_and_figures_are_the_same_cut_small_without_trunk_and_unfolded(losses, tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", **losses)
    assert max(float((expected[1][n] - expected[0][n]).abs().max()) for n in expected[1]) > 1e-3
    with monkeypatch.context() as patch:
        unfolded(patch)
        assert_same(run(tmp_path / "cut", micro_batch_size=5, trunk=False, **losses), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 1},
        {"rollout_batch_size": 5},
        {"trunk": False},
        {"trunk_gigabytes": 0.0},
        "unfolded",
    ],
)
def test_each_way_alone_changes_nothing_either(change, tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", **LOSSES[1])
    if change == "unfolded":
        unfolded(monkeypatch)
    options = {} if change == "unfolded" else change
    assert_same(run(tmp_path / "cut", **LOSSES[1], **options), expected)


@pytest.mark.parametrize(
    "algorithm", [{"algorithm": "reinforce"}, {"algorithm": "rloo", "samples_per_prompt": 3}]
)
def test_an_update_without_a_value_is_the_same_cut_small(algorithm, tmp_path, monkeypatch):
    results = {}
    for micro in (12, 5):
        built = trainer(tmp_path / str(micro), **PLAIN | algorithm | {"micro_batch_size": micro})
        before = built.weights.gathered()["policy"]
        built.train()
        results[micro] = built.weights.gathered()["policy"]
    assert max(float((results[12][n] - before[n]).abs().max()) for n in before) > 1e-3
    assert_close(results[5], results[12], atol=1e-5)


def test_what_is_folded_is_what_runs_and_is_let_go_before_every_optimizer_step(tmp_path):
    built = trainer(tmp_path, **PLAIN)
    inside, steps = [], []
    real_fold, real_step = built.backbone.folded, built.runtime.step

    @contextlib.contextmanager
    def folded(role):
        with real_fold(role):
            inside.append(role)
            yield
            inside.pop()

    def step():
        steps.append(list(inside))
        return real_step()

    roles, real_model = [], built.runtime.model

    def model(role, *args, **options):
        if torch.is_grad_enabled():
            roles.append((role, list(inside)))
        return real_model(role, *args, **options)

    built.backbone.folded, built.runtime.step, built.runtime.model = folded, step, model
    built.train()
    assert steps == [[]] * 4
    assert {role for role, _ in roles} == {"policy", "value"}
    assert all(within == [role] for role, within in roles)


def test_every_row_is_trained_once_an_epoch(tmp_path):
    built = trainer(tmp_path, **PLAIN | {"steps": 1, "epochs": 3, "minibatches": 3})
    seen, real = [], built.update._minibatch

    def minibatch(step, place, batch, rows):
        seen.append((place, rows))
        counted = batch.weights_BR.sum(-1).nonzero()[:, 0].tolist()
        assert counted == sorted(rows)
        assert float(batch.weights_BR.sum()) == pytest.approx(1)
        return real(step, place, batch, rows)

    built.update._minibatch = minibatch
    built.train()
    assert [place for place, _ in seen] == [(epoch, number) for epoch in range(3) for number in range(3)]
    for epoch in range(3):
        rows = [row for (e, _), part in seen if e == epoch for row in part]
        assert sorted(rows) == list(range(12))
    assert seen[0][1] != seen[3][1]


def test_the_logged_figures_are_the_means_of_the_updates_and_the_last_distance(tmp_path):
    built = trainer(tmp_path, **PLAIN | {"steps": 1, "epochs": 2})
    seen, real = [], built.update._minibatch

    def minibatch(*args):
        seen.append(real(*args))
        return seen[-1]

    built.update._minibatch = minibatch
    built.train()
    (row,) = read_metrics(tmp_path)
    assert row["policy/updates"] == len(seen) == 4
    for name in ("policy/loss", "value/loss", "policy/grad_norm"):
        assert row[name] == pytest.approx(sum(stats[name] for stats in seen) / 4)
    assert row["policy/kl_step"] == seen[-1]["policy/kl_step"] > seen[0]["policy/kl_step"]


def test_a_step_takes_the_gradient_of_policy_and_value_losses_together(tmp_path):
    """The value's gradient is scaled by its coefficient, the policy's is untouched by it."""
    found = {}
    for coef in (0.1, 0.4):
        built = trainer(tmp_path / str(coef), **PLAIN | {"steps": 1, "minibatches": 1, "value_coef": coef})

        def step(built=built, coef=coef):
            named = {a: built.backbone.parameters_of(a) for a in ("policy", "value")}
            found[coef] = {a: {n: p.grad.clone() for n, p in part.items() if p.grad is not None}
                           for a, part in named.items()}  # fmt: skip
            built.runtime.discard_gradients()
            return 1.0

        built.runtime.step = step
        built.train()
    assert any("lora_B" in n and float(g.abs().max()) > 0 for n, g in found[0.1]["policy"].items())
    for name, gradient in found[0.1]["policy"].items():
        assert torch.equal(gradient, found[0.4]["policy"][name]), name
    for name, gradient in found[0.1]["value"].items():
        torch.testing.assert_close(found[0.4]["value"][name], 4 * gradient)
