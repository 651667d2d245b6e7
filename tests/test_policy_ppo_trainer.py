"""What learns, when, and how it is kept: value warm-up, average, ends, checkpoints, adapters, SIGTERM."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_ppo import (
    LIMIT,
    PROMPTS,
    SMALL,
    TOKENIZER,
    backbone_of,
    dialogue_of,
    trained,
    trainer,
    varied,
    weights,
)

import policy.ppo.run
from rlhf.errors import UserError
from rlhf.models.lora import HEAD
from rlhf.recipe.schema import Distributed, Ppo
from rlhf.runs.artifacts import Checkpoints
from rlhf.training.metrics import read_metrics


def after_every_step(built):
    """Train, and return the weights at the start and after every step."""
    seen, real = [weights(built)], built.weights.update_ema

    def follow():
        seen.append(weights(built))
        real()

    built.weights.update_ema = follow
    built.train()
    return seen


def moved(before, after, adapter):
    """Names of an adapter's tensors that are not bit for bit the same."""
    return {n for n, t in after.items() if n.startswith(f"{adapter}.") and not torch.equal(t, before[n])}


def logs(folder):
    """Every logged figure but the times."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]


LETTER = TOKENIZER.decode([40])


def share(said):
    """Share of the one letter that is wanted."""
    return torch.tensor([text.count(LETTER) / LIMIT for text in said.texts])


@pytest.mark.slow
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


def test_a_step_that_went_far_leaves_out_its_other_epochs(tmp_path):
    for target_kl, updates in ((None, 5), (1e-9, 2), (1e9, 5)):
        folder = tmp_path / str(target_kl)
        trained(folder, steps=1, epochs=5, target_kl=target_kl)
        assert read_metrics(folder)[0]["policy/updates"] == updates


# ---- the value first


@pytest.mark.parametrize("value", ["adapter", "shared"])
def test_only_the_value_moves_while_it_warms_up(value, tmp_path):
    built = trainer(
        tmp_path, **SMALL | {"steps": 3, "value_warmup": 2, "value": value, "stir": 0.1, "start": True}
    )
    seen = after_every_step(built)
    for step in (0, 1):
        assert not moved(seen[step], seen[step + 1], "policy")
        assert f"value.{HEAD}.weight" in moved(seen[step], seen[step + 1], "value")
    assert len(moved(seen[2], seen[3], "policy")) > 10
    assert "policy/loss" not in read_metrics(tmp_path)[0]
    assert [row["policy/learning_rate"] > 0 for row in read_metrics(tmp_path)] == [False, False, True]


# ---- the moving average


def test_the_average_is_that_of_the_weights_after_every_step(tmp_path):
    built = trainer(tmp_path, **SMALL | {"steps": 3, "ema_decay": 0.75})
    seen = after_every_step(built)
    for name, tensor in built.weights.ema.items():
        expected = seen[0][f"policy.{name}"]
        for state in seen[1:]:
            expected = 0.75 * expected + 0.25 * state[f"policy.{name}"]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-8)
    names = [n for n in built.weights.ema if "lora_B" in n]
    assert all(not torch.equal(built.weights.ema[n], seen[-1][f"policy.{n}"]) for n in names)


def fitted(folder, monkeypatch, **section):
    """Run the stage's own function around a tiny backbone; returns its figures and the trainer."""
    options = {"steps": 2, "missing_eos": "ignore", "batch_size": 8, "epochs": 1, "learning_rate": 1e-3}
    recipe = SimpleNamespace(ppo=Ppo(**options | section), distributed=Distributed(), seed=0)

    class Score:
        def __call__(self, said):
            return varied(said)

        def figures(self, all_sum, device):
            return {"ppo/score_spread": 0.5}

    backbone = backbone_of(recipe.ppo, width=16)
    monkeypatch.setattr(policy.ppo.run, "load_dialogue", lambda recipe: dialogue_of(4))
    monkeypatch.setattr(policy.ppo.run, "assemble", lambda *parts, **options: backbone)
    monkeypatch.setattr(policy.ppo.run, "stored_prompts", lambda *parts: PROMPTS)
    monkeypatch.setattr(policy.ppo.run, "score_function", lambda *parts, **options: Score())
    monkeypatch.setattr(policy.ppo.run, "audit_folder", lambda *parts: None)
    built = policy.ppo.run.build_trainer(recipe, SimpleNamespace(folder=folder, note_clock=lambda: None))
    built.train()
    return policy.ppo.run.save(built), built


def saved(folder, adapter):
    tensors = load_file(folder / adapter / "adapter_model.safetensors")
    return {n: t for n, t in tensors.items() if "lora_B" in n}


def test_the_stage_saves_the_average_as_the_policy_and_the_last_weights_beside_it(tmp_path, monkeypatch):
    results, built = fitted(tmp_path, monkeypatch, ema_decay=0.5)
    last = weights(built)
    policy_B, last_B = saved(tmp_path, "policy"), saved(tmp_path, "policy_last")
    assert set(policy_B) == set(last_B)
    for name in policy_B:
        assert torch.equal(policy_B[name], built.weights.ema[name])
        assert torch.equal(last_B[name], last[f"policy.{name}"])
        assert not torch.equal(policy_B[name], last_B[name])
    assert results["steps"] == 2
    assert "ended_early" not in results
    assert read_metrics(tmp_path)[0]["ppo/score_spread"] == 0.5


def test_without_an_average_the_stage_saves_the_last_weights_and_the_value_with_its_offset(
    tmp_path, monkeypatch
):
    _, built = fitted(tmp_path, monkeypatch)
    assert not (tmp_path / "policy_last").exists()
    last = weights(built)
    assert all(torch.equal(t, last[f"policy.{n}"]) for n, t in saved(tmp_path, "policy").items())
    bias = load_file(tmp_path / "value" / "adapter_model.safetensors")[f"{HEAD}.bias"]
    offset = built.backbone.offsets["value"]
    assert abs(offset) > 0.01
    torch.testing.assert_close(bias, last[f"value.{HEAD}.bias"] + offset)


@pytest.mark.parametrize(
    "options", [{"algorithm": "reinforce"}, {"algorithm": "rloo", "samples_per_prompt": 2}]
)
def test_without_a_value_none_is_learned_or_saved(options, tmp_path, monkeypatch):
    _, built = fitted(tmp_path, monkeypatch, **options)
    assert [group["lr"] for group in built.runtime.optimizer.param_groups] == [pytest.approx(5e-4)]
    assert not (tmp_path / "value").exists()
    assert all(t.abs().max() > 0 for t in saved(tmp_path, "policy").values())
    assert "value/loss" not in read_metrics(tmp_path)[0]


# ---- ending early


def test_a_limit_on_the_kl_ends_the_stage_and_a_resumed_one_stays_ended(tmp_path, monkeypatch):
    limited = {"steps": 6, "max_kl": 1e-4, "learning_rate": 1e-2, "checkpoint_every": 1000}
    results, built = fitted(tmp_path, monkeypatch, **limited)
    kl = [row["objective/kl"] for row in read_metrics(tmp_path)]
    assert 1 < len(kl) < 6
    assert kl[-1] > 1e-4
    assert all(value <= 1e-4 for value in kl[:-1])
    assert results["steps"] == len(kl)
    assert "above max_kl" in results["ended_early"]
    at_end = weights(built)
    again, resumed = fitted(tmp_path, monkeypatch, **limited)
    assert again["ended_early"] == results["ended_early"]
    assert len(read_metrics(tmp_path)) == len(kl)
    assert all(torch.equal(t, at_end[n]) for n, t in weights(resumed).items())


# ---- going on

EVERYTHING = SMALL | {
    "steps": 5, "checkpoint_every": 2, "epochs": 2, "minibatches": 2, "kl_controller": "adaptive",
    "kl_controller_horizon": 50, "ptx_batch_size": 2,
    "score_normalization": "running", "score_clip": 1.5, "ema_decay": 0.8, "ptx_coef": 0.3,
    "value_warmup": 3, "schedule": "cosine", "warmup_steps": 2, "entropy_coef": 0.01, "whiten_rewards": True,
    "stir": 0.1, "start": True,
}  # fmt: skip


def everything(folder, **options):
    texts = folder.parent / "texts.txt"
    texts.write_text("a first text\nand a second\nthird\nfourth one\n", encoding="utf-8")
    return trainer(folder, ptx_texts=[str(texts)], **EVERYTHING | options)


def assert_same_end(built, expected, folders):
    for name, tensor in weights(expected).items():
        assert torch.equal(weights(built)[name], tensor), name
    if expected.weights.ema is not None:
        for name, tensor in expected.weights.ema.items():
            assert torch.equal(built.weights.ema[name], tensor), name
    assert built.kl_controller.state() == expected.kl_controller.state()
    assert built.reward_shaper.state() == expected.reward_shaper.state()
    assert built.backbone.offsets == expected.backbone.offsets
    assert logs(folders[0]) == logs(folders[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of everything, and its folder."""
    folder = tmp_path_factory.mktemp("everything") / "whole"
    built = everything(folder)
    built.train()
    assert built.kl_controller.coef != 0.05
    return built, folder


@pytest.mark.parametrize("options", [{}, {"value": "shared", "value_warmup": 1}])
def test_an_interrupted_run_with_everything_in_it_goes_on_bit_for_bit(options, tmp_path, whole):
    if options:
        whole = everything(tmp_path / "whole", **options), tmp_path / "whole"
        whole[0].train()
    calls = []

    def interrupted(said):
        calls.append(said)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return varied(said)

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        everything(parts, reward_fn=interrupted, **options).train()
    again = everything(parts, **options)
    assert again.done == 2
    again.train()
    assert_same_end(again, whole[0], (parts, whole[1]))


@pytest.mark.parametrize(
    ("file", "anchor"),
    [("average.safetensors", None), ("state.json", "reference"), ("state.json", "contract")],
)
def test_a_checkpoint_that_lacks_a_part_or_stands_on_another_reference_is_refused(
    file, anchor, tmp_path, monkeypatch
):
    built = trainer(tmp_path, **SMALL, ema_decay=0.5)
    built.train()
    folder = built.checkpoints.newest()
    if anchor:
        state = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(state | {anchor: "0" * 64}))
    else:
        (folder / file).unlink()
    monkeypatch.setattr(Checkpoints, "newest", lambda self: folder)  # past the hashes of the manifest
    with pytest.raises(UserError, match="has changed" if anchor else "incomplete"):
        trainer(tmp_path, **SMALL, ema_decay=0.5)


# ---- asked to stop


@pytest.fixture
def no_death():
    """SIGTERM fails the test instead of ending all tests, where the loop does not take it."""

    def caught(number, frame):
        pytest.fail("SIGTERM was not taken")

    before = signal.signal(signal.SIGTERM, caught)
    yield caught
    signal.signal(signal.SIGTERM, before)


def asks(at):
    """A reward function in which SIGTERM arrives at one of its calls."""
    calls = []

    def score(said):
        calls.append(said)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return varied(said)

    return score


@pytest.mark.parametrize("step", [0, 3])
def test_sigterm_saves_the_last_whole_step_and_the_same_command_goes_on(
    step, tmp_path, capsys, no_death, whole
):
    parts = tmp_path / "parts"
    with pytest.raises(SystemExit) as ended:
        everything(parts, checkpoint_every=1000, reward_fn=asks(step + 1)).train()
    assert ended.value.code == 128 + signal.SIGTERM
    words = f"saved after step {step} of 5" if step else "no step was done"
    assert words in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is no_death
    again = everything(parts, checkpoint_every=1000)
    assert again.done == step
    assert len(read_metrics(parts)) == step
    again.train()
    assert_same_end(again, whole[0], (parts, whole[1]))


def test_sigterm_during_an_update_is_taken_when_the_step_is_whole(tmp_path, no_death):
    built = trainer(tmp_path, **SMALL | {"steps": 4})
    built.reward_metrics = lambda: os.kill(os.getpid(), signal.SIGTERM) or {}
    with pytest.raises(SystemExit):
        built.train()
    again = trainer(tmp_path, **SMALL | {"steps": 4})
    assert again.done == 1
    assert len(read_metrics(tmp_path)) == 1


def test_the_value_starts_at_the_mean_of_the_scores_as_they_are_shaped(tmp_path):
    built = trainer(tmp_path, score_shape="sigmoid", **SMALL)
    rollout = built.collect_rollout(0)
    mean = float((rollout.values_BR * rollout.actions_BR).sum() / rollout.actions_BR.sum())
    assert mean == pytest.approx(float(built.reward_shaper.scores(rollout).mean()), abs=1e-5)
    assert mean != pytest.approx(float(rollout.scores_B.mean()), abs=0.1)


WARM = SMALL | {
    "steps": 4, "value_warmup": 3, "checkpoint_every": 1, "schedule": "constant", "batch_size": 16,
    "value_learning_rate": 3e-2, "value_clip_range": None, "value_coef": 1.0, "lam_value": 1.0, "epochs": 4,
    "reward_fn": lambda said: torch.tensor([float(len(p[-1].content)) for p in said.prompts]),
}  # fmt: skip


def test_the_policy_begins_to_learn_when_the_value_explains_enough(tmp_path, capsys):
    trainer(tmp_path / "all", **WARM).train()
    rates = [row["policy/learning_rate"] for row in read_metrics(tmp_path / "all")]
    assert [rate > 0 for rate in rates] == [False, False, False, True]
    assert capsys.readouterr().out.count("explains") == 0
    explained = [row["value/explained_variance"] for row in read_metrics(tmp_path / "all")]
    goal = explained[1] - 1e-6
    assert explained[0] < goal < 1
    early = trainer(tmp_path / "early", value_warmup_until=goal, **WARM)
    early.train()
    rates = [row["policy/learning_rate"] for row in read_metrics(tmp_path / "early")]
    assert [rate > 0 for rate in rates] == [False, False, True, True]
    assert "from step 3 on the policy learns too" in capsys.readouterr().out
    # what was found out survives a restart
    shutil.rmtree(tmp_path / "early" / "checkpoints" / "step-0000004")
    resumed = trainer(tmp_path / "early", value_warmup_until=goal, **WARM)
    assert resumed.done == 3
    assert resumed.weights.value_warmup.steps == 2
    resumed.train()
    assert all(torch.equal(t, weights(resumed)[n]) for n, t in weights(early).items())


def test_a_warm_up_that_misses_its_goal_says_so_and_goes_on_or_ends_the_run(tmp_path, capsys):
    never = WARM | {"value_warmup_until": 0.999}
    built = trainer(tmp_path / "on", **never)
    built.train()
    assert built.done == 4
    out = capsys.readouterr().out
    assert "warning: ppo: the value explains" in out
    assert "after 3 steps, not the 0.999 of ppo.value_warmup_until; the policy learns all the same" in out
    with pytest.raises(UserError, match=r"after 3 steps, not the 0\.999 .* or set value_warmup_missed=go_on"):
        trainer(tmp_path / "off", value_warmup_missed="stop", **never).train()
    assert len(read_metrics(tmp_path / "off")) == 2
