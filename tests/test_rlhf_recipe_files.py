"""The files and folders that a recipe names are missed before any stage runs."""

from pathlib import Path

import pytest
from recipe_cases import TEXT, refusal, writer

from rlhf.recipe.load import files_of, load


@pytest.fixture
def recipe(inside):
    """Write a recipe; returns its path."""
    return writer(inside)


@pytest.mark.parametrize("key", ["comparisons", "held_out_comparisons", "prompts", "held_out_prompts"])
def test_a_missing_data_file_is_named_with_its_key_and_line(recipe, key):
    text = TEXT.replace("  comparisons: c.jsonl\n", f"  {key}: [c.jsonl, no.jsonl]\n")
    if key != "comparisons":
        text = text.replace("data:\n", "data:\n  comparisons: hub:org/name\n")
    line = text.splitlines().index(f"  {key}: [c.jsonl, no.jsonl]") + 1
    message = f"r.yaml:{line}: data.{key}: no file matches no.jsonl; check the path"
    assert refusal(recipe(text)) == message
    remedy = ", or get the data as the recipe's header says: git clone u data"
    assert refusal(recipe(text + "# Data:    git clone u data\n")) == message + remedy
    assert refusal(recipe(text + "# Data: u\n"), f"data.{key}=no.jsonl").endswith("; check the path")


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("sft.data", []),
        ("distill.texts", []),
        ("distill.questions", ["distill.text_share=0"]),
        ("card.outliers", []),
        ("tax.tasks.lm_loss.files", []),
    ],
)
def test_a_missing_file_of_a_stage_is_named_before_any_stage_runs(recipe, key, more):
    (Path("recipes/prompts")).mkdir(parents=True)
    Path("recipes/prompts/hhh.txt").touch()
    message = refusal(recipe(), f"{key}=[c.jsonl, no.jsonl]", *more)
    assert message.endswith(f": {key}: no file matches no.jsonl; check the path")


def test_the_prompt_must_be_there_where_it_is_distilled(recipe):
    assert load(recipe(), ["hhh_prompt=no.txt"]).hhh_prompt == "no.txt"
    message = refusal(recipe(), "hhh_prompt=no.txt", "distill.text_share=0")
    assert message.endswith("hhh_prompt: no file matches no.txt; check the path")


def test_the_best_responses_of_the_comparisons_are_no_file(recipe):
    assert load(recipe(), ["sft.data=chosen"]).sft.chosen
    assert not load(recipe(), ["sft.data=c.jsonl"]).sft.chosen


DISTILL = "distill={texts: [c.jsonl]}"
TAX = "tax={tasks: {lm_loss: c.jsonl}}"


@pytest.mark.parametrize(
    ("key", "place", "more"),
    [
        ("ppo.reward_model", "runs/gone", []),
        ("evaluate.reward_model", "gone", []),
        ("ppo.start", "gone", []),
        ("reward.start", "runs/other/sft/policy", []),
        ("distill.start", "gone/policy", [DISTILL]),
        ("card.model", "./gone", []),
        ("card.against", "a/b/c", []),
        ("distill.teacher", "/gone", [DISTILL]),
        ("tax.models.x", "~/gone", [TAX]),
        ("tax.toxicity.judge", "./gone", [TAX]),
    ],
)
def test_a_model_that_a_late_stage_needs_is_missed_before_the_first_one(recipe, inside, key, place, more):
    Path("recipes/prompts").mkdir(parents=True)
    Path("recipes/prompts/hhh.txt").touch()
    message = refusal(recipe(), *more, f"{key}={place}")
    assert message.startswith(f"override '{key}={place}': {key}: {place} is not a folder; check the path")
    assert ("or name a stage of this run (sft" in message) == key.endswith(".start")
    load(recipe(), ["name=mine", *more, f"{key}=runs/mine/some/folder"])  # this run will make it
    (inside / "runs/mine").mkdir(parents=True)
    (inside / "runs/mine/file").touch()
    assert "is not a folder" in refusal(recipe(), "name=mine", *more, f"{key}=runs/mine/file")
    (inside / "there").mkdir()
    load(recipe(), [*more, f"{key}=there"])


def test_a_folder_below_the_home_is_found(recipe, inside, monkeypatch):
    monkeypatch.setenv("HOME", str(inside))
    (inside / "adapter").mkdir()
    assert load(recipe(), ["ppo.start=~/adapter"]).ppo.start == str(inside / "adapter")
    assert load(recipe(), ["ppo.reward_model=[~/adapter]"]).ppo.reward_model == [str(inside / "adapter")]
    load(recipe(), ["card.model=~/adapter"])
    assert "is not a folder" in refusal(recipe(), "ppo.start=~/gone")


def test_what_is_no_path_is_a_model_of_the_hub_or_a_judge(recipe):
    for key in ("card.model", "tax.models.x", "tax.toxicity.judge"):
        for place in ("owner/name", "name"):
            load(recipe(), [TAX, f"{key}={place}"])
    assert "tax.models.x" in refusal(recipe(), TAX, "tax.models.x=")


def test_files_are_found_as_the_readers_find_them(inside):
    from rlhf.data.readers.files import origins

    for name in ("a[1].jsonl", "b/c/d.jsonl", "b/e.jsonl"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).touch()
    for spec in ("a[1].jsonl", "b/**/*.jsonl", "*/*.jsonl", "no*.jsonl"):
        found = files_of(spec)
        assert found == ([o.name for o in origins([spec], key="k")] if found else [])
    assert len(files_of("b/**/*.jsonl")) == 2
    assert files_of("a[1].jsonl") == ["a[1].jsonl"]
