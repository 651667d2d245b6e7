"""The assistant's road on a tiny model: each stage starts from the one before, and is refused otherwise."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, noted_anew
from conftest import stage as run_stage
from safetensors.torch import load_file

from rlhf.errors import UserError
from rlhf.recipe.load import load
from rlhf.training.metrics import read_metrics

RECIPE = ROOT / "recipes" / "tiny_assistant.yaml"
STAGES = ("comparisons", "sft", "distill", "reward", "ppo", "evaluate", "tax")
WEIGHTS = "adapter_model.safetensors"


def stage(main, *overrides):
    """Run a stage's main as if from the command line, on the assistant's recipe and its own data."""
    run_stage(main, "data.prompts=[]", "data.held_out_prompts=[]", *overrides, recipe=RECIPE)


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    """A folder in which every stage has run once, and what the reward model's adapter was before training."""
    import reward.training.run
    from policy.alignment_tax import __main__ as tax
    from policy.distillation import __main__ as distill
    from policy.evaluate import __main__ as evaluate
    from policy.ppo import __main__ as train
    from policy.sft import __main__ as sft
    from reward.training import __main__ as reward_train
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    folder = tmp_path_factory.mktemp("assistant")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    beginnings = []

    def watched(recipe, section, dialogue, model, *rest, **options):
        beginnings.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
        return train_model(recipe, section, dialogue, model, *rest, **options)

    train_model = reward.training.run.train_preference_model
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(reward.training.run, "train_preference_model", watched)
        for main in (prepare.main, collect.main, sft.main, distill.main, reward_train.main, train.main):
            stage(main)
        for main in (evaluate.main, tax.main):
            stage(main)
    return folder, beginnings


@pytest.fixture
def copy(assistant, tmp_path, monkeypatch):
    """A copy of that folder, to be changed."""
    here = tmp_path / "here"
    shutil.copytree(assistant[0], here, symlinks=True)
    monkeypatch.chdir(here)
    return here


def manifest(folder, name):
    return json.loads((folder / "runs/tiny-assistant" / name / "manifest.json").read_text())


def saved(folder, name, adapter="policy"):
    return load_file(folder / "runs/tiny-assistant" / name / adapter / WEIGHTS)


def test_every_stage_is_complete_and_knows_what_it_started_from(assistant):
    folder, _ = assistant
    made = {name: manifest(folder, name) for name in STAGES}
    parents = {name: set(m["parents"]) for name, m in made.items()}
    assert parents["sft"] == {"comparisons"}
    assert parents["distill"] == {"comparisons", "sft"}
    assert parents["reward"] == {"comparisons", "distill"}
    assert parents["ppo"] == {"comparisons", "reward", "distill"}
    assert {"comparisons", "ppo", "distill"} <= parents["evaluate"]
    for name, m in made.items():
        for parent, identity in m["parents"].items():
            assert identity == made[parent]["identity"], (name, parent)


def test_fine_tuning_lowers_the_loss_on_held_out_answers(assistant):
    found = manifest(assistant[0], "sft")["results"]
    assert found["held_out_loss"]["mean"] < found["held_out_loss_before"]["mean"]


def test_the_reward_model_takes_the_distilled_weights_under_a_head_of_its_own(assistant):
    folder, (beginning,) = assistant
    distilled = saved(folder, "distill")
    assert {n.replace(".default.", "."): t.shape for n, t in beginning.items()} == {
        n: t.shape for n, t in distilled.items()
    }
    for name, tensor in beginning.items():
        assert torch.equal(tensor, distilled[name.replace(".default.", ".")]), name
    reward = saved(folder, "reward", "model")
    assert set(reward) - set(distilled) == {"base_model.model.score.weight"}
    assert any(not torch.equal(reward[name], distilled[name]) for name in distilled)  # and goes on from there


def test_ppo_starts_at_its_reference_which_is_the_distilled_adapter(assistant, capsys):
    folder, _ = assistant
    first = read_metrics(folder / "runs/tiny-assistant/ppo")[0]
    assert abs(first["objective/kl"]) < 1e-4
    distilled, policy = saved(folder, "distill"), saved(folder, "ppo")
    assert set(policy) == set(distilled)
    assert any(not torch.equal(policy[name], distilled[name]) for name in policy)
    assert (
        float(max(t.abs().max() for n, t in distilled.items() if "lora_B" in n)) > 1e-3
    )  # it is not the base


def test_the_evaluation_compares_with_that_reference_and_not_with_the_base(copy, monkeypatch):
    """Against the base the KL of the first policy would not be 0: let PPO's result be its start."""
    import policy.evaluate.__main__

    start = copy / "runs/tiny-assistant/distill/policy" / WEIGHTS
    (copy / "runs/tiny-assistant/ppo/policy" / WEIGHTS).write_bytes(start.read_bytes())
    noted_anew(copy / "runs/tiny-assistant/ppo")
    shutil.rmtree(copy / "runs/tiny-assistant/evaluate")
    stage(policy.evaluate.__main__.main)
    summary = json.loads((copy / "runs/tiny-assistant/evaluate/summary.json").read_text())
    assert abs(summary["kl"]["mean"]) < 1e-4
    lines = (copy / "runs/tiny-assistant/evaluate/responses.jsonl").read_text().splitlines()
    assert all((row := json.loads(line))["before"] == row["after"] for line in lines)
    assert {"sft", "distill", "reward", "ppo"} <= set(summary["stages"])


@pytest.fixture(scope="module")
def remade(assistant, tmp_path_factory):
    """A copy of that folder in which the distillation was run anew, with another recipe."""
    from policy.distillation import __main__ as distill

    here = tmp_path_factory.mktemp("remade") / "here"
    shutil.copytree(assistant[0], here, symlinks=True)
    shutil.rmtree(here / "runs/tiny-assistant/distill")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        stage(distill.main, "distill.epochs=3")
    return here


@pytest.mark.parametrize("name", ["reward", "ppo", "evaluate"])
def test_a_finished_stage_is_refused_when_its_start_was_made_anew(remade, monkeypatch, name):
    from policy.evaluate import __main__ as evaluate
    from policy.ppo import __main__ as train
    from reward.training import __main__ as reward_train

    monkeypatch.chdir(remade)
    mains = {"reward": reward_train.main, "ppo": train.main, "evaluate": evaluate.main}
    with pytest.raises(UserError, match="the distill stage was run anew"):
        stage(mains[name], "distill.epochs=3")


def test_an_evaluation_does_not_take_a_remade_start_for_the_reference(remade, tmp_path, monkeypatch):
    from policy.evaluate import __main__ as evaluate

    here = shutil.copytree(remade, tmp_path / "here", symlinks=True)
    shutil.rmtree(here / "runs/tiny-assistant/evaluate")
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=r"was trained from another start \(the distill stage was run anew\)"):
        stage(evaluate.main, "distill.epochs=3")


def test_a_distillation_is_refused_when_the_fine_tuning_was_made_anew(copy):
    from policy.distillation import __main__ as distill
    from policy.sft import __main__ as sft

    shutil.rmtree(copy / "runs/tiny-assistant/sft")
    stage(sft.main, "sft.epochs=1")
    with pytest.raises(UserError, match="the sft stage was run anew"):
        stage(distill.main, "sft.epochs=1")


def test_a_missing_start_is_named_with_its_target(copy):
    from policy.ppo import __main__ as train

    for name in ("distill", "ppo"):
        shutil.rmtree(copy / "runs/tiny-assistant" / name)
    with pytest.raises(UserError, match=r"ppo needs the distill stage, .* run `make distill RECIPE"):
        stage(train.main)


def test_the_reward_model_and_ppo_start_from_the_fine_tuned_adapter_as_well(copy):
    from policy.ppo import __main__ as train
    from reward.training import __main__ as reward_train

    for name in ("reward", "ppo"):
        shutil.rmtree(copy / "runs/tiny-assistant" / name)
    options = ("reward.start=sft", "ppo.start=sft", "ppo.steps=1", "reward.members=2")
    stage(reward_train.main, *options)
    stage(train.main, *options)
    assert set(manifest(copy, "reward")["parents"]) == {"comparisons", "sft"}
    assert abs(read_metrics(Path("runs/tiny-assistant/ppo"))[0]["objective/kl"]) < 1e-4
    figures = manifest(copy, "reward")["results"]
    assert len(figures["members"]) == 2


def test_pre_training_starts_from_the_fine_tuned_adapter(copy, capsys):
    from reward.pretraining import __main__ as pretrain

    sources = "pmp.sources=[{files: recipes/tiny/comparisons.jsonl}]"
    stage(pretrain.main, sources, "pmp.start=sft", "reward.start=null", "pmp.form=ranked")
    assert "pmp: starts from runs/tiny-assistant/sft/policy (28 tensors)" in capsys.readouterr().out
    assert set(manifest(copy, "pmp")["parents"]) == {"sft"}


def test_the_recipe_is_quick_with_its_block(monkeypatch):
    monkeypatch.chdir(ROOT)
    whole, quick = load(RECIPE, []), load(RECIPE, ["quick=true"])
    assert (whole.ppo.steps, quick.ppo.steps) == (2, 1)
    assert quick.name == "tiny-assistant-quick"
