"""Where a stage starts from: nothing, a folder, or a stage of the same run; and what is refused."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, tiny_recipe

from rlhf.errors import UserError
from rlhf.runs.artifacts import sha256_of
from rlhf.runs.initial_adapter import check_same_start, start_files, start_folder, start_inputs, start_parents
from rlhf.runs.stage import open_stage

SECTIONS = {
    "sft": ("sft.epochs=1",),
    "distill": ("distill.text_share=0", f"hhh_prompt={ROOT}/recipes/prompts/hhh.txt"),
    "pmp": ("pmp.sources=[{files: hub:x}]",),
}
WORDS = [("ppo", "sft"), ("ppo", "distill"), ("reward", "sft"), ("reward", "distill"), ("pmp", "sft"),
         ("pmp", "distill"), ("distill", "sft")]  # fmt: skip


def recipe_with(section, start, *more):
    needed = {section, start} & set(SECTIONS)
    value = "null" if start is None else start
    return tiny_recipe(
        *(line for name in sorted(needed) for line in SECTIONS[name]), f"{section}.start={value}", *more
    )


def adapter(folder, rank=4, alpha=8):
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha}))
    return folder


@pytest.mark.parametrize(("section", "word"), WORDS)
def test_a_stage_of_the_same_run_is_a_parent_and_no_file(section, word, inside):
    recipe = recipe_with(section, word)
    assert start_folder(recipe, "tiny", section) == Path(f"runs/tiny/{word}/policy")
    assert start_folder(recipe, open_stage(recipe, section), section) == Path(f"runs/tiny/{word}/policy")
    assert start_parents(recipe, section) == (word,)
    assert start_inputs(recipe, section) == start_files(recipe, section) == []


@pytest.mark.parametrize("section", ["ppo", "reward", "pmp", "distill", "sft"])
def test_a_folder_is_an_input_and_no_parent(section, inside):
    adapter(inside / "a" / "b")
    recipe = recipe_with(section, "a/b")
    assert start_folder(recipe, "tiny", section) == Path("a/b")
    assert start_parents(recipe, section) == ()
    assert start_inputs(recipe, section) == start_files(recipe, section) == ["a/b/adapter_model.safetensors"]


@pytest.mark.parametrize("section", ["ppo", "reward", "pmp", "distill", "sft"])
def test_without_a_start_there_is_nothing(section):
    for recipe in (recipe_with(section, None), tiny_recipe()):
        assert start_folder(recipe, "tiny", section) is None
        assert start_parents(recipe, section) == ()
        assert start_inputs(recipe, section) == start_files(recipe, section) == []


def test_a_folder_that_is_named_like_a_stage_is_written_as_a_path(inside):
    adapter(inside / "sft")
    recipe = recipe_with("ppo", "./sft")
    assert start_parents(recipe, "ppo") == ()
    assert start_folder(recipe, "tiny", "ppo") == Path("sft")


@pytest.mark.parametrize(
    ("section", "start", "more", "expected"),
    [
        ("ppo", "sft", ["sft=null"], "ppo.start=sft: this recipe has no sft section; add one"),
        ("ppo", "distill", ["distill=null"], "ppo.start=distill: this recipe has no distill section"),
        ("reward", "sft", list(SECTIONS["pmp"]), "write pmp.start=sft instead"),
        (
            "ppo",
            "distill",
            ["distill.method=full"],
            "model.path is runs/tiny/distill/model, without this start",
        ),
        ("sft", "distill", [], "start is a folder here"),
        ("sft", "sft", [], "start is a folder here"),
    ],
)
def test_a_start_that_cannot_work_is_refused_before_anything_runs(section, start, more, expected):
    with pytest.raises(UserError) as caught:
        recipe_with(section, start, *more)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_model_that_starts_from_a_folder_goes_with_pre_training(inside):
    Path("a/b").mkdir(parents=True)
    assert recipe_with("reward", "a/b", *SECTIONS["pmp"]).reward.start == "a/b"


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_without_an_adapter_is_refused_with_what_could_be_named(missing, inside):
    (adapter(inside / "a") / missing).unlink()
    message = (
        f"ppo.start: a/{missing} is not there; name the folder of a saved adapter, or sft or distill for"
    )
    with pytest.raises(UserError) as caught:
        start_inputs(recipe_with("ppo", "a"), "ppo")
    assert str(caught.value).startswith(message)
    with pytest.raises(UserError) as caught:
        start_inputs(recipe_with("sft", "a"), "sft")
    assert str(caught.value).endswith("name the folder of a saved adapter")


@pytest.mark.parametrize(
    ("made", "said"),
    [({"rank": 2}, "lora.rank 2 there, 4 here"), ({"alpha": 16}, "lora.alpha 16 there, 8.0 here")],
)
def test_an_adapter_of_another_scale_is_refused(made, said, inside):
    adapter(inside / "a", **made)
    with pytest.raises(UserError) as caught:
        start_inputs(recipe_with("ppo", "a"), "ppo")
    assert f"ppo.start: a/adapter_model.safetensors does not fit this recipe ({said})" in str(caught.value)


# --- the start of what was trained -----------------------------------------------------------------------


@pytest.fixture
def trained(inside):
    """A finished ppo stage, written by hand, and the open stage that looks at it."""

    def write(start, identity="one"):
        made = {"recipe": {"ppo": {"start": start}}, "parents": {}, "inputs": {}}
        for folder in (inside / "runs/tiny/ppo", inside / "runs/tiny/sft"):
            folder.mkdir(parents=True, exist_ok=True)
        (inside / "runs/tiny/sft/manifest.json").write_text(json.dumps({"identity": identity}))
        if start == "sft":
            made["parents"]["sft"] = identity
        elif start:
            file = adapter(inside / start) / "adapter_model.safetensors"
            made["inputs"][file.name] = sha256_of(file)
        (inside / "runs/tiny/ppo/manifest.json").write_text(json.dumps({"fingerprint": made}))
        recipe = recipe_with("ppo", start)
        return recipe, open_stage(recipe, "evaluate")

    return write


@pytest.mark.parametrize("start", [None, "sft", "mine"])
def test_the_start_that_was_trained_from_is_accepted(trained, start):
    check_same_start(*trained(start), "ppo")


def test_another_start_than_that_of_the_training_is_refused(trained, inside):
    recipe, run = trained("sft")
    with pytest.raises(UserError, match=r"trained from another start \(ppo\.start: 'sft' -> None\)"):
        check_same_start(tiny_recipe(), run, "ppo")
    (inside / "runs/tiny/sft/manifest.json").write_text(json.dumps({"identity": "two"}))
    with pytest.raises(UserError, match=r"another start \(the sft stage was run anew\)"):
        check_same_start(recipe, run, "ppo")
    run.lock.close()
    recipe, run = trained("mine")
    (inside / "mine/adapter_model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match=r"another start \(adapter_model\.safetensors was changed\)"):
        check_same_start(recipe, run, "ppo")
