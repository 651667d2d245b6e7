"""Reward models whose head reads the mean state of a response: the same scores everywhere."""

from types import SimpleNamespace

import pytest
import torch
from conftest import stage, tiny_recipe
from preference_cases import awake, cases, tiny

from policy.evaluate import __main__ as evaluate
from policy.ppo import __main__ as ppo
from policy.ppo.rollout import Responses
from policy.ppo.setup import assemble, score_function
from reward.model.forward import score_examples
from reward.model.model import RewardModelConfig, TextRewardModel, load_config
from reward.training import __main__ as train
from rlhf.collect import __main__ as collect
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.models import prepare
from rlhf.models.masks import left_pad, right_pad
from rlhf.tokenization.dialogue import load_dialogue

MIXED = cases(5)


@pytest.fixture(scope="module")
def model():
    return awake(*tiny())


@torch.no_grad()
def by_hand(model, example, k):
    """The head on the mean of the last states over a response, each alone in a row."""
    prompt, response = example["prompt"], example["responses"][k]
    ids = torch.tensor([[*prompt, *response]])
    inside = model.base_model.model
    states = inside.model(input_ids=ids).last_hidden_state[0, len(prompt) :]
    return inside.score(states.mean(0))[0]


@pytest.mark.parametrize("share", [True, False])
def test_a_pooled_head_reads_the_mean_over_the_response_and_nothing_else(model, share, monkeypatch):
    monkeypatch.setattr(model.base_model.model, "pooling", "mean")
    expected = torch.stack([by_hand(model, e, k) for e in MIXED for k in range(len(e["responses"]))])
    found = score_examples(model, MIXED, 0, share=share)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(model.base_model.model, "pooling", "last")
    assert float((score_examples(model, MIXED, 0, share=share)[0] - expected).abs().max()) > 0.01


def test_a_file_says_only_another_pooling_than_before():
    config = RewardModelConfig("base", 0.0, 1.0, "", "chat", 8, 8)
    assert "pooling" not in config.as_dict()
    assert config._replace(pooling="mean").as_dict()["pooling"] == "mean"


def test_imitation_has_no_pooling():
    with pytest.raises(UserError, match="pooling is for a score"):
        tiny_recipe("reward.objective=imitation", "reward.pooling=mean")


def test_the_whole_road_with_a_pooled_head_and_ppo_scores_as_the_saved_model_does(inside):
    words = ["reward.pooling=mean", "reward.layers=2", "collect.prompts=12", "ppo.steps=2"]
    for main in (prepare.main, collect.main, train.main, ppo.main, evaluate.main):
        stage(main, *words)
    folder = inside / "runs/tiny/reward/model"
    assert load_config(folder).pooling == "mean"
    recipe = tiny_recipe(*words)
    run, dialogue = (
        SimpleNamespace(parent=(inside / "runs/tiny").joinpath, is_main=True),
        load_dialogue(recipe),
    )
    backbone = assemble(recipe, run, dialogue)
    prompts = [(Message("user", text),) for text in ("one", "another one")]
    texts = ["good", "bad and dull"]
    asked = [dialogue.encode_prompt(prompt) for prompt in prompts]
    said = [dialogue.close([], dialogue.encode_response(text)) for text in texts]
    start = max(map(len, asked))
    ids, mask = left_pad(asked, dialogue.pad_id)
    tails, inside_tail = right_pad(said, dialogue.pad_id)
    responses = Responses(
        prompts, texts, torch.cat([ids, tails], 1), torch.cat([mask, inside_tail], 1), None, start
    )
    with torch.no_grad():
        found = score_function(recipe, run, backbone, dialogue)(responses)
        torch.testing.assert_close(found, TextRewardModel(folder).score(prompts, texts), rtol=0, atol=1e-4)
        assert (
            float(
                (score_function(recipe, run, backbone, dialogue)(responses._replace(start=0)) - found)
                .abs()
                .min()
            )
            > 1e-5
        )
