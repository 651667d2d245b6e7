"""The mean of the weights of several reward models, against weights averaged by hand; and PPO against it."""

import json
import shutil

import pytest
import torch
from conftest import stage
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

import policy.ppo.__main__ as ppo
import reward.training.__main__ as train
from policy.ppo.trainer import PpoTrainer
from reward.model.average import average, save_average
from reward.model.ensemble import AVERAGE, own_folders
from reward.model.model import CONFIG, TextRewardModel, load_config
from rlhf.data.comparisons import Counts
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.recipe.schema import Ppo
from rlhf.runs.artifacts import SETTINGS, WEIGHTS, read_json, write_json
from rlhf.training.metrics import read_metrics

GIVEN = ("reward.members=2", "ppo.ensemble=average", "reward.probe=true", "reward.head_init=probe")
A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "score.weight"


def _members(number, rank, seed):
    def drawn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    rng = torch.Generator().manual_seed(seed)
    return [{A: drawn(rank, 5), B: drawn(7, rank), HEAD: drawn(1, 5)} for _ in range(number)]


@given(number=st.integers(1, 4), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_change_of_the_weights_is_the_mean_of_the_changes(number, rank, seed):
    members = _members(number, rank, seed)
    made = average(members)
    assert made[A].shape == (number * rank, 5)
    changes = torch.stack([m[B] @ m[A] for m in members])
    torch.testing.assert_close(made[B] @ made[A], changes.mean(0))
    torch.testing.assert_close(made[HEAD], torch.stack([m[HEAD] for m in members]).mean(0))


def test_one_member_stays_as_it_is_bit_for_bit():
    (member,) = _members(1, 2, 0)
    assert all(torch.equal(average([member])[name], tensor) for name, tensor in member.items())


@pytest.fixture(scope="module")
def averaged(road, tmp_path_factory):
    """The tiny road with two members, and PPO against their average. Do not change it."""
    folder = tmp_path_factory.mktemp("averaged")
    shutil.copytree(road, folder, dirs_exist_ok=True)
    for name in ("reward", "ppo", "evaluate"):
        shutil.rmtree(folder / "runs/tiny" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage(train.main, *GIVEN)
        stage(ppo.main, *GIVEN)
    return folder / "runs/tiny"


@pytest.fixture
def at(averaged, monkeypatch):
    """The run's folder, from the folder that its base is named from."""
    monkeypatch.chdir(averaged.parent.parent)
    return averaged


def _asked():
    held_out = read_native("runs/tiny/comparisons/held_out.jsonl", "stop", Counts())
    rows = [(c.prompt, response) for c in held_out for response in c.responses]
    return [list(column) for column in zip(*rows, strict=True)]


def test_its_scores_are_those_of_averaged_weights(at):
    """Every matrix and the head of a merged model averaged by hand."""
    folders = [at / "reward/model", at / "reward/model-1"]
    models = [TextRewardModel(folder) for folder in folders]
    prompts, responses = _asked()
    apart = [model.score(prompts, responses) for model in models]
    for model in models:
        model.model.merge_adapter()  # the adapters are in the weights, and are not read from here on
    first, second = (dict(model.model.named_parameters()) for model in models)
    with torch.no_grad():
        for name, parameter in first.items():
            if "lora_" not in name:
                parameter.copy_((parameter + second[name]) / 2)
    offset = sum(load_config(folder).offset for folder in folders) / 2
    by_hand = models[0].score(prompts, responses) - models[0].config.offset + offset
    found = TextRewardModel(at / "reward" / AVERAGE)
    assert isinstance(found.model, PeftModel)
    scores = found.score(prompts, responses)
    torch.testing.assert_close(scores, by_hand, atol=2e-5, rtol=0)
    assert not torch.allclose(scores, apart[0], atol=1e-3)
    assert read_json(at / "reward/manifest.json")["results"]["average_accuracy"]["n"] > 0


def test_ppo_scores_by_one_adapter(at):
    log = read_metrics(at / "ppo")
    assert log
    assert "ppo/score_spread" not in log[0]  # nobody disagrees
    assert own_folders(at / "reward", "average") == [at / "reward" / AVERAGE]
    assert len(own_folders(at / "reward", "mean")) == 2
    rank = read_json(at / "reward/model" / SETTINGS)["r"]
    assert read_json(at / "reward" / AVERAGE / SETTINGS)["r"] == 2 * rank


def test_an_interrupted_ppo_goes_on_bit_for_bit(averaged, tmp_path, monkeypatch):
    shutil.copytree(averaged.parent.parent, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/tiny/ppo")
    monkeypatch.chdir(tmp_path)

    def two_steps(trainer):
        yield from range(trainer.done, trainer.done + 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PpoTrainer, "remaining_steps", two_steps)
        with pytest.raises(KeyboardInterrupt):
            stage(ppo.main, *GIVEN, "ppo.checkpoint_every=1")
    stage(ppo.main, *GIVEN, "ppo.checkpoint_every=1")
    mine, whole = (load_file(folder / "runs/tiny/ppo/policy" / WEIGHTS)
                   for folder in (tmp_path, averaged.parent.parent))  # fmt: skip
    assert [row["step"] for row in read_metrics(tmp_path / "runs/tiny/ppo")] == [*range(1, 7)]
    assert all(torch.equal(mine[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("what", ["pooling", "shapes"])
def test_members_that_do_not_fit_are_named_and_nothing_is_left(at, what, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        shutil.copytree(at / "reward/model", folder)
    if what == "pooling":
        write_json(folders[1] / CONFIG, json.loads((folders[1] / CONFIG).read_text()) | {"pooling": "mean"})
    else:
        shutil.copy(at / "reward" / AVERAGE / WEIGHTS, folders[1] / WEIGHTS)
    with pytest.raises(UserError, match=r"one and .*two cannot be averaged") as caught:
        save_average(folders, tmp_path / "made")
    assert what in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_a_run_without_the_average_says_how_to_make_it(at, tmp_path):
    for name in ("model", "model-1"):
        shutil.copytree(at / "reward" / name, tmp_path / "reward" / name)
    with pytest.raises(UserError, match=r"average is not there; remove"):
        own_folders(tmp_path / "reward", "average")
    assert load_file(at / "reward" / AVERAGE / WEIGHTS)


def test_the_average_of_other_runs_models_is_refused():
    with pytest.raises(ValueError, match="own members"):
        Ppo(ensemble="average", reward_model=["a", "b"])
