"""Early stopping on a part of the training comparisons."""

import gc
import shutil
from pathlib import Path

import pytest
import torch
from conftest import stage
from preference_cases import assert_equal_tensors
from safetensors.torch import load_file

import reward.training.run
from reward.training import __main__ as train
from reward.training.trainer import PreferenceTrainer
from reward.training.validation import Validation, keep_out, part_for_test
from rlhf.errors import UserError
from rlhf.runs.artifacts import WEIGHTS, read_json

WORDS = ["reward.probe=false", "reward.validation=0.2", "reward.epochs=2", "reward.checkpoint_every=2",
         "reward.evaluations=3"]  # fmt: skip


@pytest.fixture
def prepared(road, tmp_path, monkeypatch):
    """Makes a current folder in which everything before the reward stage is done."""

    def make(name):
        folder = tmp_path / name
        shutil.copytree(road / "models", folder / "models")
        shutil.copytree(road / "runs/tiny/comparisons", folder / "runs/tiny/comparisons")
        monkeypatch.chdir(folder)

    return make


def outcome():
    folder = Path("runs/tiny/reward")
    return load_file(folder / "model" / WEIGHTS), read_json(folder / "manifest.json")["results"]


def test_groups_and_prompts_are_kept_out_whole():
    rows = [{"prompt": [n % 10], "group": f"g{n % 3}" if n < 30 else None, "index": n} for n in range(60)]
    learned, out = keep_out(rows, 0.2, 0)
    assert sorted(r["index"] for r in learned + out) == list(range(60))
    assert out
    for name in ("group", "prompt"):
        inside = {str(r[name]) for r in learned if (r["group"] is None) == (name == "prompt")}
        assert not inside & {str(r[name]) for r in out if (r["group"] is None) == (name == "prompt")}
    assert keep_out(rows, 0.0, 0) == (rows, [])
    assert keep_out(rows, 0.2, 1)[1] != out
    with pytest.raises(UserError, match=r"reward\.validation: .* set it to 0"):
        keep_out([r for r in rows if r["group"] == "g1"], 0.2, 0)
    learned, out = keep_out(rows[:2], 0.99, 0)
    assert (len(learned), len(out)) == (1, 1)


# --- the test model --------------------------------------------------------------------------------------


def test_no_prompt_and_no_group_is_in_both_parts():
    rows = [
        {"prompt": [n % 40], "group": f"g{n % 13}" if n % 4 else None, "index": n} for n in range(0, 78, 2)
    ]
    rows += [{"prompt": [100 + n // 2], "group": None, "index": 100 + n} for n in range(80)]
    learned, apart = part_for_test(rows, 0.5, 0)
    assert sorted(r["index"] for r in learned + apart) == sorted(r["index"] for r in rows)
    assert 0.3 < len(apart) / len(rows) < 0.7
    for name in ("prompt", "group"):
        assert not {str(r[name]) for r in learned if r[name]} & {str(r[name]) for r in apart if r[name]}
    assert part_for_test(rows, 0.0, 0) == (rows, [])
    assert part_for_test(rows, 0.5, 1)[1] != apart
    more = part_for_test([*rows, {"prompt": [999], "group": None, "index": 999}], 0.5, 0)[1]
    assert [r for r in more if r["index"] != 999] == apart  # what is added moves nothing
    with pytest.raises(UserError, match=r"reward\.test_share: .* set it to 0"):
        part_for_test(rows[-2:], 0.5, 0)


@pytest.mark.slow
def test_killed_in_the_test_model_both_models_are_as_if_trained_alone(prepared, monkeypatch, capsys):
    words = [
        "reward.test_share=0.4",
        "reward.head_init=probe",
        "reward.checkpoint_every=2",
        "reward.epochs=2",
    ]
    parts, whole = [], reward.training.run.train_preference_model

    def noted(*args, **options):
        parts.append({str(e["prompt"]) for e in args[4]})
        return whole(*args, **options)

    prepared("both")
    with monkeypatch.context() as patch:
        patch.setattr(reward.training.run, "train_preference_model", noted)
        stage(train.main, *words)
    learned, apart = parts
    assert not learned & apart
    tests = load_file(Path("runs/tiny/reward/test_model") / WEIGHTS)
    proxy, figures = outcome()
    found = figures["test_model"]
    assert found["held_out_accuracy"]["n"] == figures["held_out_accuracy"]["n"]
    assert found["probe_accuracy"] != figures["probe_accuracy"]  # its head starts from a probe of its own
    assert f"trained on {found['comparisons']}" in capsys.readouterr().out

    prepared("proxy")
    with monkeypatch.context() as patch:
        mine = lambda rows, *_: ([r for r in rows if str(r["prompt"]) in learned], [])  # noqa: E731
        patch.setattr(reward.training.run, "part_for_test", mine)
        stage(train.main, *words)
    alone = outcome()[0]
    assert set(alone) == set(proxy)
    for name, weight in proxy.items():  # the batches of the trunk are others: what is rounding may be a step
        far = 2e-4 if "score" in name else 2e-5  # the head starts from a probe, fitted to such states
        assert float((alone[name] - weight).abs().mean()) < far, name

    prepared("killed")
    step, taken = PreferenceTrainer.training_step, []

    def killed(self, *args, **options):
        taken.append(self.args.seed)
        if taken.count(1) == 4:  # a step behind the newest checkpoint of the test model, whose seed is 1
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(PreferenceTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(train.main, *words)
    gc.collect()  # a process that ends gives its lock back
    stage(train.main, *words)
    assert taken.count(0) == 6, "the finished model is not trained again"
    again = load_file(Path("runs/tiny/reward/test_model") / WEIGHTS)
    assert all(torch.equal(again[name], tensor) for name, tensor in tests.items())
    assert outcome()[1]["test_model"] == found


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_weights_of_the_best_step_are_put_back(best, tmp_path):
    model = torch.nn.Linear(1, 1)
    rows = [{"ranks": [0, 1], "responses": [[1], [2]], "prompt": [n]} for n in range(2)]
    told = Validation(rows, tmp_path, 3, lambda line: None)
    wrong, half, right = [0.0, 1, 0, 1], [0.0, 1, 1, 0], [1.0, 0, 1, 0]
    scores = [torch.tensor(wrong), torch.tensor(half), torch.tensor(half)]
    scores[best] = torch.tensor(right)
    told.begin(model, 7, lambda model: scores.pop(0))
    assert told.at == [2, 4, 7]
    for step in range(1, 8):
        with torch.no_grad():
            model.weight.fill_(step)
        told.on_step_end(None, type("State", (), {"global_step": step}), None)
    found = told.finish()
    assert found["step"] == told.at[best] == model.weight.item()
    assert [row["step"] for row in found["evaluations"]] == [2, 4, 7]
    assert found["evaluations"][best]["accuracy"] == 1.0


def test_a_killed_training_chooses_from_the_same_bit_for_bit(prepared, monkeypatch, capsys):
    prepared("alone")
    stage(train.main, *WORDS)
    alone, figures = outcome()
    table = figures["validation"]["evaluations"]
    assert len(table) == 3
    best = max(table, key=lambda row: (row["accuracy"], -row["loss"]))
    assert figures["validation"]["step"] == best["step"]
    assert f"reward: kept step {best['step']} of {table[-1]['step']}" in capsys.readouterr().out
    assert figures["reload_gap"] < 1e-4

    prepared("killed")
    whole, taken = PreferenceTrainer.training_step, []

    def killed(self, *args, **options):
        taken.append(1)
        if len(taken) == table[-1]["step"]:  # the second judged step is behind, and no checkpoint of it
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    monkeypatch.setattr(PreferenceTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        stage(train.main, *WORDS)
    gc.collect()  # a process that ends gives its lock back
    stage(train.main, *WORDS)
    again, resumed = outcome()
    assert_equal_tensors(again, alone, atol=0)
    assert all(torch.equal(again[name], alone[name]) for name in alone)
    assert resumed["validation"] == figures["validation"]
    assert not Path("runs/tiny/reward/parts").exists()


def test_every_member_chooses_for_itself(prepared):
    prepared("members")
    stage(train.main, *WORDS, "reward.members=2", "reward.checkpoint_every=100")
    _, figures = outcome()
    assert figures["validation"]["comparisons"] == 8
    assert len(figures["members"]) == 2
