"""Exports of families that are written, cut or scored each in its own way."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from families import write_family
from tiny_tax import adapter, finished, reward_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from policy.export.run import export as export_policy
from reward.export.run import export as export_reward
from reward.model.model import TextRewardModel
from rlhf.data.comparisons import Comparison, Message, write_native
from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.runs.artifacts import read_json

PROMPT = (Message("user", "The ferry was"),)
KINDS = {
    "gpt2": "GPT2",
    "gemma3_vision": "Gemma3Text",
    "granite": "Granite",
    "qwen2_moe": "Qwen2Moe",
    "opt_350m": "OPT",
}
NO_CLASSIFIER = ("granite",)
POLICIES = {"gpt2": "GPT2LMHeadModel", "gemma3_vision": "Gemma3ForCausalLM"}


@pytest.fixture(params=KINDS)
def family(request, inside, reloaded_here):
    """A run of a family, made by hand, in the current folder."""
    write_family(request.param, Path("models/family"))
    recipe = tiny_recipe("model.path=models/family", "model.source=hub")
    run = finished(recipe, "comparisons", "collect")
    write_native(run.folder / "held_out.jsonl", [Comparison(PROMPT, (" late.", " on time."), (0, 1), "lab")])
    run.finish({})
    for stage, make in (("ppo", adapter), ("reward", reward_model)):
        run = finished(recipe, stage, stage)
        arguments = (run.folder / "policy", 3) if stage == "ppo" else (run.folder / "model",)
        make(recipe, *arguments)
        run.finish({})
    return request.param, recipe


@torch.no_grad()
def test_the_policy_of_a_family_is_the_trained_one(family):
    name, recipe = family
    export_policy(recipe, "ppo", Path("out/policy"))
    kind = POLICIES.get(name, f"{KINDS[name]}ForCausalLM")
    assert read_json(Path("out/policy/config.json"))["architectures"] == [kind]
    ids = list(range(10, 40))
    logps = (
        AutoModelForCausalLM.from_pretrained("out/policy").eval()(torch.tensor([ids])).logits.log_softmax(-1)
    )
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["policy"])
    backbone.load_adapter("policy", Path("runs/tiny/ppo/policy"))
    padded, mask = torch.tensor([[*ids, 0]]), torch.tensor([[True] * len(ids) + [False]])
    expected = backbone("policy", padded, mask, start=1)[0][0]
    found = logps[0, torch.arange(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_reward_model_of_a_family_is_the_trained_one_or_is_refused(family):
    name, recipe = family
    recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"folder": "out"})})
    if name in NO_CLASSIFIER:
        with pytest.raises(UserError, match="transformers has no GraniteForSequenceClassification"):
            export_reward(recipe)
        assert not list(Path("out").glob("*"))
        return
    export_reward(recipe)
    own = TextRewardModel(Path("runs/tiny/reward/model"))
    row = torch.tensor(
        [own.dialogue.close(own.dialogue.encode_prompt(PROMPT), own.dialogue.encode_response(" x"))]
    )
    model = AutoModelForSequenceClassification.from_pretrained("out/reward").eval()
    found = model(row).logits[0] + model.config.reward_offset
    torch.testing.assert_close(found, own.score([PROMPT], [" x"]), rtol=0, atol=1e-4)
