"""A reward model of fewer layers (`reward.layers`): what it is for others, and the same scores everywhere."""

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import stage, tiny_recipe
from families import TEXT_PART, write_family
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import reward.training.run
from policy.evaluate import __main__ as evaluate
from policy.ppo import __main__ as ppo
from policy.ppo.setup import new_backbone
from reward.model.model import TextRewardModel, head_of, load_config, new_reward_model
from reward.training import __main__ as train
from rlhf.collect import __main__ as collect
from rlhf.errors import UserError
from rlhf.models import prepare
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.models.masks import left_pad
from rlhf.recipe.schema import Lora, Model, Ppo

PROMPTS = [list(range(10, 31)), list(range(40, 44))]  # longer than the window of those that have one
FAMILIES = ["llama", "gemma3", "gpt2", "opt_350m", "qwen2_moe", "smollm3", "gemma3_vision", "falcon"]


@torch.no_grad()
def stirred(model, scale=0.2):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith(("score.modules_to_save.default.weight", "heads.reward.weight")):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def recipe_of(folder, lora):
    return SimpleNamespace(model=Model(path=str(folder)), lora=lora, seed=0)


@pytest.mark.parametrize("layers", ["all", "top_1", "top_3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_hugging_face_and_ppos_role_score_as_the_trained_model_does(name, layers, tmp_path):
    write_family(name, tmp_path / "base")
    recipe = recipe_of(tmp_path / "base", Lora(rank=2, layers=layers))
    trained = stirred(new_reward_model(recipe, SimpleNamespace(pad_id=0), layers=2))
    trained.save_pretrained(str(tmp_path / "model"), save_embedding_layers=False)
    rows = [torch.tensor([[*prompt, 1]]) for prompt in PROMPTS]
    with torch.no_grad():
        scores = torch.stack([trained(input_ids=row).logits[0, 0] for row in rows])
    assert float(scores.diff().abs()) > 1e-3
    if name not in TEXT_PART:  # whose configuration has its number of layers in a part
        base = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=1, num_hidden_layers=2, pad_token_id=0
        )
        plain = PeftModel.from_pretrained(base, str(tmp_path / "model")).eval()
        with torch.no_grad():
            found = torch.stack([plain(input_ids=row).logits[0, 0] for row in rows])
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-5)
    ids, mask = left_pad([row[0].tolist() for row in rows], 0)
    base = load_base(recipe.model)
    model = Backbone(
        base, recipe.lora, adapters=["policy", "reward"], heads=["reward"], depths={"reward": 2}
    ).eval()
    model.load_adapter("reward", tmp_path / "model")
    assert model.check_architecture() is None
    with torch.no_grad():
        before = model("reference", ids, mask, start=3)[0]
        for trunk in (None, model.trunk(ids, mask)):
            torch.testing.assert_close(model("reward", ids, mask, trunk), scores, rtol=1e-4, atol=1e-4)
            with model.folded("reward"):
                torch.testing.assert_close(model("reward", ids, mask, trunk), scores, rtol=1e-4, atol=1e-4)
        trunk = model.trunk(ids, mask)  # computed while the reward's adapter was the one in use
        for hidden in (None, trunk):
            after = model("reference", ids, mask, hidden, start=3)[0]
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_layers_that_a_model_has_not_are_refused(tmp_path):
    write_family("llama", tmp_path)
    with pytest.raises(UserError, match=r"reward\.layers: 4 layers of a model that has 3; use at most 3"):
        new_reward_model(recipe_of(tmp_path, Lora()), SimpleNamespace(pad_id=0), layers=4)


def test_what_is_listed_a_layer_is_cut_with_the_layers(tmp_path):
    write_family("gemma3", tmp_path)
    config = load_base(Model(path=str(tmp_path)), layers=2).config
    assert config.num_hidden_layers == len(config.layer_types) == 2


def test_top_k_counts_from_the_last_layer_that_is_there(tmp_path):
    write_family("llama", tmp_path)
    for layers, wanted in (("top_1", {1}), ("top_3", {0, 1}), ("all", {0, 1})):
        model = new_reward_model(
            recipe_of(tmp_path, Lora(rank=2, layers=layers)), SimpleNamespace(pad_id=0), layers=2
        )
        names = [name for name, p in model.named_parameters() if "lora_A" in name and p.requires_grad]
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == wanted
    with pytest.raises(UserError, match="top_4 of a model with 3 layers"):
        new_reward_model(recipe_of(tmp_path, Lora(layers="top_4")), SimpleNamespace(pad_id=0))


@pytest.mark.parametrize("value", ["adapter", "shared"])
def test_the_value_that_starts_as_the_reward_model_has_its_layers(value, tmp_path):
    write_family("llama", tmp_path)
    base = load_base(Model(path=str(tmp_path)))
    model = new_backbone(base, Lora(rank=2), Ppo(value=value), rewards=["reward"], depths={"reward": 2})
    assert model.depths == {"reward": 2} | ({"value": 2} if value == "adapter" else {})


@pytest.mark.parametrize("lora", ["top_2", "all"])
def test_the_whole_road_with_fewer_layers(lora, inside, capsys):
    words = [
        f"lora.layers={lora}",
        "reward.layers=2",
        "collect.prompts=12",
        "ppo.steps=2",
        "evaluate.best_of=2",
    ]
    words += ["reward.members=2"] if lora == "all" else []
    for main in (prepare.main, collect.main, train.main, ppo.main, evaluate.main):
        stage(main, *words)
    assert "on the first 2 layers" in capsys.readouterr().out
    folder = Path("runs/tiny/reward/model")
    assert load_config(folder).layers == 2
    results = json.loads(Path("runs/tiny/reward/manifest.json").read_text())["results"]
    assert results["layers"] == 2
    assert results["reload_gap"] < 1e-4
    model = TextRewardModel(folder)
    assert len(model.model.base_model.model.model.layers) == 2
    rows = [json.loads(line) for line in Path("runs/tiny/evaluate/responses.jsonl").read_text().splitlines()]
    assert rows


def test_all_layers_leave_the_saved_file_as_it_was(tmp_path):
    from reward.model.model import RewardModelConfig

    card = RewardModelConfig("base", 0.0, 1.0, "x", "plain", 96, 8)
    assert "layers" not in card.as_dict()
    assert card._replace(layers=2).as_dict()["layers"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward.layers=2", "reward.objective=imitation"], "behind all layers"),
        (["reward.layers=0"], "reward.layers"),
        (["reward.layers=auto", "reward.probe=false"], "takes those of the best probe"),
        (["reward.layers=auto", "reward.start=/x"], "name the number of layers"),
        (["reward.layers=2", "pmp.sources=[{files: hub:x}]"], r"pmp\.layers=None; give both the same number"),
        (["reward.layers=2", "reward.start=sft", "sft.data=x.jsonl"], "adapter for all layers"),
    ],
)
def test_what_cannot_have_fewer_layers_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        tiny_recipe(*words)


def figures():
    return json.loads(Path("runs/tiny/reward/manifest.json").read_text())["results"]


@pytest.fixture
def labeled(road, inside):
    """A current folder in which everything before the reward stage is done."""
    shutil.copytree(road / "models", "models")
    shutil.copytree(road / "runs/tiny/comparisons", "runs/tiny/comparisons")


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_auto_takes_the_best_layer_of_the_probe_and_remembers_it(pooling, labeled, monkeypatch, capsys):
    words = ["reward.layers=auto", "reward.head_init=probe", "reward.epochs=1", f"reward.pooling={pooling}"]
    trained = reward.training.run.train_preference_model
    heads = []

    def watched(recipe, section, dialogue, model, *args, **options):
        heads.append(head_of(model).weight.detach().clone())
        if len(heads) == 1:
            raise KeyboardInterrupt
        return trained(recipe, section, dialogue, model, *args, **options)

    monkeypatch.setattr(reward.training.run, "train_preference_model", watched)
    with pytest.raises(KeyboardInterrupt):
        stage(train.main, *words)
    monkeypatch.setattr(reward.training.run, "fit_probe", lambda *a, **o: 1 / 0)
    gc.collect()  # a process that ends gives its lock back
    stage(train.main, *words)
    found = figures()
    last = [row for row in found["probe_best"]["cv"] if row["pooling"].startswith(pooling)]
    assert [row["layer"] for row in last] == [1, 2, 3]
    best = max(last, key=lambda row: row["accuracy"])["layer"]
    assert found["layers"] == load_config(Path("runs/tiny/reward/model")).layers == best
    assert f"layers=auto: the first {best} layers" in capsys.readouterr().out
    assert torch.equal(heads[0], heads[1])
    assert found["reload_gap"] < 1e-4
    assert set(found["probe_best"]) >= {"layer", "pooling", "accuracy", "cv_accuracy", "cv", "penalty"}


@pytest.mark.parametrize(
    ("words", "layers"),
    [([], [2, 3]), (["reward.probe=all"], [1, 2, 3]), (["reward.layers=1", "reward.probe=all"], [1, 2, 3]),
     (["reward.layers=2", "lora.layers=top_1"], [2]), (["reward.trunk_gigabytes=0"], [1, 2, 3])],
)  # fmt: skip
def test_the_probe_reads_the_layers_that_cost_nothing_or_all(words, layers, labeled, monkeypatch):
    monkeypatch.setattr("rlhf.runs.stage.parent_identity", lambda *a: "")  # lora.layers is another here
    stage(train.main, "reward.epochs=1", "lora.layers=top_2", *words)
    assert sorted({row["layer"] for row in figures()["probe_best"]["cv"]}) == layers
