"""The card's look at foreign prompts: which prompts it takes for its own, and whose activations it reads."""

import pytest
import torch
from conftest import ROOT, tiny_recipe

from reward.card.__main__ import _out_of_distribution
from reward.card.ood import report
from reward.card.scorers import load_scorer
from rlhf.data.comparisons import Counts
from rlhf.data.prompts import read_prompts
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError

STRANGE = f"{ROOT}/recipes/prompts/sentiment_held_out.jsonl"
MODEL = "runs/tiny/reward/model"


@pytest.fixture
def judged(road, monkeypatch):
    monkeypatch.chdir(road)
    recipe = tiny_recipe(f"card.outliers={STRANGE}", "card.exposure=3", "card.outlier_layer=2")
    return (
        recipe,
        load_scorer(MODEL, recipe),
        read_native("runs/tiny/comparisons/train.jsonl", "stop", Counts()),
    )


def test_foreign_prompts_are_told_from_the_prompts_of_the_comparisons(judged):
    recipe, scorer, comparisons = judged
    found = _out_of_distribution(recipe, scorer, [*comparisons, comparisons[0]])
    strange, _ = read_prompts([STRANGE], on_bad_rows="stop", key="card.outliers")
    own = [c.prompt for c in comparisons]
    inside, outside = scorer.activations(own, 2), scorer.activations(strange, 2)
    assert found == {"layer": 2, **report(inside, outside, exposure=3, seed=recipe.seed)}
    assert found["outside"] == len(strange) - 3


def test_a_prompt_of_the_comparisons_is_no_outlier(judged, tmp_path):
    _, scorer, comparisons = judged
    file = tmp_path / "mixed.txt"
    lines = [c.prompt[-1].content for c in comparisons[:2]] + ["one", "two", "three", "four", "five", "six"]
    file.write_text("\n".join(lines) + "\n")
    mixed = tiny_recipe(f"card.outliers={file}", "card.outlier_layer=2")
    assert _out_of_distribution(mixed, scorer, comparisons)["outside"] == 6


def test_activations_are_those_of_the_reward_adapter_at_the_last_token(judged):
    _, scorer, comparisons = judged
    prompt = comparisons[0].prompt
    ids = torch.tensor([scorer.model.dialogue.encode_prompt(prompt)])
    decoder = scorer.model.model.base_model.model.base_model
    with torch.no_grad():
        states = decoder(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(scorer.activations([prompt], -1)[0], states[-1][0, -1])


def test_without_outliers_nothing_is_looked_at(judged):
    recipe, scorer, comparisons = judged
    assert _out_of_distribution(tiny_recipe(), scorer, comparisons) is None
    with pytest.raises(UserError, match="only a reward model of this project"):
        _out_of_distribution(recipe, object(), comparisons)
