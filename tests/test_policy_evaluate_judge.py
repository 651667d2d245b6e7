"""Another run's reward model as the judge: other lengths, another adapter; length-controlled, on the page."""

import json
import shutil

import pytest
import torch
from conftest import stage, tiny_recipe

from policy.evaluate import __main__ as evaluate
from policy.evaluate.report import as_markdown
from reward.model.model import RewardModelConfig, TextRewardModel, new_reward_model, save_reward_model
from rlhf.data.comparisons import Message
from rlhf.tokenization.dialogue import load_dialogue


@pytest.fixture(scope="module")
def judged(road, tmp_path_factory):
    """The folder of the same run's evaluation, by a reward model unlike its own."""
    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(road, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "runs/tiny/evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = tiny_recipe("lora.rank=2", "lora.layers=all", "dialogue.max_response_tokens=30")
        dialogue = load_dialogue(recipe)
        model = new_reward_model(recipe, dialogue)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        card = RewardModelConfig(recipe.model.path, 0.5, 1.0, dialogue.fingerprint(), "plain", 96, 30)
        save_reward_model(model, folder / "runs/other/reward/model", card, dialogue)
        other = "evaluate.reward_model=runs/other/reward/model"
        stage(evaluate.main, "evaluate.judge=reward", other, "evaluate.best_of=4")
    return folder


def test_its_scores_are_those_that_it_gives_alone(judged, monkeypatch):
    monkeypatch.chdir(judged)
    summary = json.loads((judged / "runs/tiny/evaluate/summary.json").read_text())
    rows = [json.loads(x) for x in (judged / "runs/tiny/evaluate/responses.jsonl").read_text().splitlines()]
    model = TextRewardModel(judged / "runs/other/reward/model")
    prompts = [(Message("user", row["prompt"]),) for row in rows]
    gains = model.score(prompts, [r["after"] for r in rows]) - model.score(
        prompts, [r["before"] for r in rows]
    )
    assert summary["judge"]["diff"] == pytest.approx(float(gains.mean()), abs=1e-5)
    found = summary["judge_length_controlled"]
    assert found["gain"]["mean"] == pytest.approx(summary["judge"]["diff"], abs=1e-6)
    assert found["gain"]["n"] == len(rows)
    assert "gold" not in summary
    assert "reward_length_controlled" in summary


def test_the_page_shows_the_control_beside_the_gain(judged):
    summary = json.loads((judged / "runs/tiny/evaluate/summary.json").read_text())
    page = (judged / "runs/tiny/evaluate/summary.md").read_text()
    figure = summary["judge_length_controlled"]["gain_at_equal_length"]
    assert f"| held-out reward model | {figure['mean']:+.3f} [" in page
    assert "| reward model | " in page
    for row in summary["best_of_n"]["rows"]:
        gain = row["length_controlled"]["gain"]
        assert f"| {row['n']} | {row['length']['mean']:.1f} [" in page
        assert f" | {gain['mean']:+.3f} [" in page
    old = {key: value for key, value in summary.items() if not key.endswith("_length_controlled")}
    old["best_of_n"] = old["best_of_n"] | {
        "rows": [
            {k: v for k, v in row.items() if k not in ("length", "length_controlled")}
            for row in old["best_of_n"]["rows"]
        ]
    }
    assert "equal length" not in as_markdown(old)  # a summary of an earlier version stays readable
