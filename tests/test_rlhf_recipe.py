"""A recipe is refused before torch is imported, with file, line, key and remedy; every field is used."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from recipe_cases import TEXT, refusal, writer

from rlhf.errors import UserError
from rlhf.recipe.keys import FORMER, RENAMED, known_keys
from rlhf.recipe.load import check_batch_sizes, dump, from_command_line, load

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*.y*ml"))


@pytest.fixture
def recipe(inside):
    """Write a recipe; returns its path."""
    return writer(inside)


# --- what is shipped -------------------------------------------------------------------------------------


def shipped(path, *overrides):
    """A recipe of ours; what it reads from data/, where nothing is shipped, is there."""
    data = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["data"]
    given = [key for key in data if str(data[key]).startswith("['data/")]
    prompts = f"{ROOT}/recipes/prompts/sentiment_train.jsonl"
    return load(path, [*(f"data.{key}={prompts}" for key in given), *overrides])


def test_recipes_are_shipped():
    assert len(SHIPPED) > 0


@pytest.mark.parametrize("path", SHIPPED)
def test_a_shipped_recipe_loads_and_runs_on_one_process(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_batch_sizes(shipped(path), 1)


@pytest.mark.parametrize("path", SHIPPED)
def test_a_shipped_recipe_opens_with_what_it_is_for(path):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for word in ("What", "Machine", "Time", "Expect"):
        said = [line for line in header if line.startswith(f"# {word}:")]
        assert len(said) == 1, f"{path}: the header has no line `# {word}: ...`"
        assert said[0].partition(":")[2].strip()


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_runs_do_not_share_a_folder(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = [shipped(other).name for other in SHIPPED]
    assert names.count(shipped(path).name) == 1


# --- mistakes in the file --------------------------------------------------------------------------------


def test_a_valid_recipe_is_taken_as_it_stands(recipe):
    loaded = load(recipe())
    assert (loaded.name, loaded.model.path, loaded.ppo.steps) == ("x", "m", 3)
    assert loaded.data.comparisons == ["c.jsonl"]


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_valid_one(recipe):
    path = recipe(TEXT + "  gama: 0.9\n")
    assert refusal(path) == "r.yaml:7: unknown key ppo.gama; did you mean ppo.gamma?"


def test_an_unknown_section_is_named_with_its_line_and_the_nearest_valid_one(recipe):
    assert refusal(recipe(TEXT + "rewrad: {epochs: 1}\n")) == (
        "r.yaml:7: unknown key rewrad; did you mean reward?"
    )


def test_a_key_in_the_wrong_section_is_sent_to_its_own(recipe):
    message = refusal(recipe(TEXT + "  zero_stage: 2\n"))
    assert message == "r.yaml:7: unknown key ppo.zero_stage; did you mean distributed.zero_stage?"


def test_a_key_like_no_other_gets_the_valid_ones(recipe):
    message = refusal(recipe(TEXT.replace("path: m", "path: m, qqqqqq: 1")))
    assert message.startswith("r.yaml:2: unknown key model.qqqqqq; valid keys: model.path, model.source")
    message = refusal(recipe(TEXT + "  qqqqqq: 2\n"))
    assert message.startswith("r.yaml:7: unknown key ppo.qqqqqq; ppo has ")
    assert message.endswith(" keys, listed in rlhf/recipe/ppo.py")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  rewards: [{qqqqqq: 1}]", "ppo.rewards.0.qqqqqq; valid keys: model, function, judge, name, "),
        ("  rewards: [{wieght: 1}]", "ppo.rewards.0.wieght; did you mean ppo.rewards.0.weight?"),
        ("pmp: {sources: [{files: f, qqqq: 1}]}", "pmp.sources.0.qqqq; valid keys: files, weight, columns"),
        ("tax: {tasks: {hhh: {qqqqqq: 1}}}", "tax.tasks.hhh.qqqqqq; valid keys: files, limit, num_fewshot"),
    ],
)
def test_a_key_that_an_item_has_not_gets_the_keys_of_the_item(recipe, line, expected):
    assert refusal(recipe(f"{TEXT}{line}\n")).startswith(f"r.yaml:7: unknown key {expected}")


@pytest.mark.parametrize("line", ["", "  rewards: [{model: r}]\n"])
def test_an_override_of_one_item_is_sent_to_the_whole_list(recipe, line):
    with pytest.raises(UserError, match=r"one item of a list cannot be set; give .* list, ppo\.rewards=\["):
        load(recipe(TEXT + line), ["ppo.rewards.0.weight=1"])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("steps: 3", "steps: many", "r.yaml:6: ppo.steps: "),
        ("steps: 3", "steps: 0", "r.yaml:6: ppo.steps: "),
        ("steps: 3", "steps: 2.5", "r.yaml:6: ppo.steps: "),
        ("steps: 3", "steps: [1]", "r.yaml:6: ppo.steps: "),
        ("steps: 3", "steps:", "r.yaml:6: ppo.steps: "),
        ("steps: 3", "clip_range: .nan", "r.yaml:6: ppo.clip_range: "),
        ("steps: 3", "lam: 1.5", "r.yaml:6: ppo.lam: "),
        ("path: m", "path: 3", "r.yaml:2: model.path: "),
        ("path: m", "path: m, dtype: float8", "r.yaml:2: model.dtype: "),
        ("name: x", "name: a/b", "r.yaml:1: name: a run name has letters"),
        ("name: x", "name: ..", "r.yaml:1: name: a run name has letters"),
        ("ppo:\n  steps: 3", "ppo: 3", "r.yaml:5: ppo: "),
        ("ppo:\n  steps: 3", "lora: {layers: top_0}", "r.yaml:5: lora.layers: use `all` or `top_<k>`"),
        ("c.jsonl", "[]", "r.yaml:4: data.comparisons: "),
    ],
)
def test_a_wrong_value_is_named_with_its_line(recipe, old, new, expected):
    assert old in TEXT
    assert refusal(recipe(TEXT.replace(old, new))).startswith(expected)


def test_the_wrong_value_itself_is_shown_and_further_mistakes_are_counted(recipe):
    message = refusal(recipe(TEXT.replace("steps: 3", "steps: many\n  clip_range: -1\n  epochs: 0")))
    assert "(got 'many')" in message
    assert message.endswith("(and 2 more)")


def test_a_missing_section_and_a_missing_key_are_named(recipe):
    assert refusal(recipe("name: x\ndata: {comparisons: c.jsonl}\n")) == (
        "r.yaml: model is missing; add it to the recipe"
    )
    assert refusal(recipe(TEXT.replace("path: m", ""))) == (
        "r.yaml:2: model.path is missing; add it to the recipe"
    )
    assert refusal(recipe("")).startswith("r.yaml: a recipe is a mapping of sections")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT + "  steps: 4\n", "r.yaml:7: not valid YAML: key 'steps' stands twice"),
        (TEXT + "name: y\n", "r.yaml:7: not valid YAML: key 'name' stands twice"),
        ("name: x\n? [a]\n: b\n", "r.yaml:2: not valid YAML: a key is a word"),
        ("name: x\nmodel: {path: m\n", "r.yaml:3: not valid YAML: "),
        ("name: &n {a: *n}\n", "r.yaml: not a recipe: it holds itself"),
        ("name: !!python/object/apply:os.getcwd []\n", "r.yaml:1: not valid YAML: "),
        ("- name\n", "r.yaml: a recipe is a mapping of sections, this file holds list"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused_with_its_line(recipe, text, expected):
    assert refusal(recipe(text)).startswith(expected)


def test_a_file_that_is_not_utf8_is_refused(inside):
    (inside / "r.yaml").write_bytes(b"name: \xff\n")
    assert refusal("r.yaml").startswith("r.yaml: not valid YAML: ")


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "+1e-4", "0.0001"])
def test_a_number_with_an_exponent_is_a_float(recipe, number):
    assert load(recipe(TEXT + f"  learning_rate: {number}\n")).ppo.learning_rate == 1e-4
    assert load(recipe(), [f"ppo.learning_rate={number}"]).ppo.learning_rate == 1e-4
    assert refusal(recipe(), f"ppo.steps={number}").endswith("(got 0.0001)")  # a number, not a text


# --- missing files ---------------------------------------------------------------------------------------


def test_a_missing_recipe_gets_the_nearest_one(inside):
    (inside / "recipes").mkdir()
    (inside / "recipes" / "tiny.yaml").write_text(TEXT)
    assert refusal("recipes/tinny.yaml") == (
        "recipes/tinny.yaml: no such recipe file; did you mean recipes/tiny.yaml?"
    )


# --- overrides -------------------------------------------------------------------------------------------


def test_an_override_replaces_one_value_and_leaves_the_rest(recipe):
    plain, changed = load(recipe()), load(recipe(), ["ppo.clip_range=0.3", "collect.responses=2"])
    expected = plain.model_dump()
    expected["ppo"]["clip_range"] = 0.3
    expected["collect"]["responses"] = 2
    assert changed.model_dump() == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("ppo.setps=2", "override 'ppo.setps=2': unknown key ppo.setps; did you mean ppo.steps?"),
        ("rewrad.epochs=2", "override 'rewrad.epochs=2': unknown key rewrad; did you mean reward?"),
        ("ppo.steps", "override 'ppo.steps': write it as section.key=value"),
        ("ppo..steps=1", "override 'ppo..steps=1': write it as section.key=value"),
        ("=1", "override '=1': write it as section.key=value"),
        ("ppo.steps=[", "override 'ppo.steps=[': not valid YAML"),
        ("ppo.steps.x=1", "override 'ppo.steps.x=1': steps is a value, not a section"),
        ("ppo.steps=many", "override 'ppo.steps=many': ppo.steps: "),
        ("ppo=3", "override 'ppo=3': ppo: "),
        ("--steps=3", "--steps=3: there are no flags"),
    ],
)
def test_a_mistyped_override_is_named(recipe, override, expected):
    with pytest.raises(UserError) as caught:
        from_command_line([recipe(), override])
    assert str(caught.value).startswith(expected)


def test_no_recipe_at_all_says_how_to_give_one():
    with pytest.raises(UserError, match="no recipe given; write RECIPE"):
        from_command_line(["--local_rank=0"])  # which the DeepSpeed launcher adds


# --- combinations ----------------------------------------------------------------------------------------


def test_batch_sizes_that_do_not_divide_are_refused_with_the_numbers(recipe):
    assert "batch_size 10 does not divide into 4 minibatches" in refusal(
        recipe(), "ppo.batch_size=10", "ppo.minibatches=4"
    )


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 5, 8])
def test_batches_are_accepted_exactly_where_every_process_gets_an_equal_share(recipe, processes):
    loaded = load(recipe(), ["ppo.batch_size=24", "ppo.minibatches=2", "reward.batch_size=24"])
    if processes in (1, 2, 3, 4):  # 12 rows a minibatch; 24 comparisons
        check_batch_sizes(loaded, processes)
    else:
        with pytest.raises(UserError, match=f"does not divide over {processes} processes") as caught:
            check_batch_sizes(loaded, processes)
        advised = int(str(caught.value).rpartition(" ")[2])
        assert advised % processes == 0
        assert advised >= 12


@pytest.mark.parametrize("stage", ["reward", "pmp", "sft"])
def test_the_batches_of_all_trainings_must_divide_over_the_processes(recipe, stage):
    sizes = [f"{name}.batch_size=8" for name in ("ppo", "reward", "pmp", "sft")]
    sizes += ["pmp.sources=[{files: hub:x}]"]
    check_batch_sizes(load(recipe(), sizes), 4)
    loaded = load(recipe(), [*sizes, f"{stage}.batch_size=10"])
    check_batch_sizes(loaded, 2)
    check_batch_sizes(loaded, 4, *{"ppo", "reward", "pmp", "sft"} - {stage})
    with pytest.raises(UserError) as caught:
        check_batch_sizes(loaded, 4, stage)
    assert str(caught.value) == (
        f"{stage}.batch_size = 10 does not divide over 4 processes; use a multiple of 4, for example 12"
    )


def test_sampled_comparisons_need_prompts_and_a_judge_needs_no_second_one(recipe):
    assert "data.comparisons=sampled needs data.prompts" in refusal(recipe(), "data.comparisons=sampled")
    message = refusal(recipe(), "evaluate.judge=vader", "evaluate.reward_model=r")
    assert "evaluate.reward_model is only used with evaluate.judge=reward" in message


def test_an_ensemble_of_one_reward_model_is_refused(recipe):
    one = refusal(recipe(), "ppo.ensemble=minimum")
    assert "ppo.ensemble=minimum is of several reward models, and there is one: set reward.members=2" in one
    assert "there is none" in refusal(recipe(), "ppo.ensemble=pessimistic", "ppo.rewards=[{judge: vader}]")
    for name in ("a", "b"):
        Path(name).mkdir()
    for several in ("reward.members=2", "ppo.reward_model=[a, b]"):
        load(recipe(), ["ppo.ensemble=minimum", several])


def test_a_loaded_recipe_does_not_change_and_survives_being_written(recipe, inside):
    loaded = load(recipe(), ["ppo.value_clip_range=null", "data.limit=5"])
    with pytest.raises(ValueError, match="frozen"):
        loaded.ppo.steps = 4
    (inside / "again.yaml").write_text(dump(loaded))
    assert load("again.yaml") == loaded
    assert yaml.safe_load(dump(loaded))["reward"]["epochs"] == 1  # defaults are written out


# --- the command -----------------------------------------------------------------------------------------


def run(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def test_a_mistake_costs_a_moment_and_one_line(recipe):
    began = time.monotonic()
    done = run("-m", "rlhf.recipe", recipe(), "ppo.gama=1")
    assert time.monotonic() - began < 5  # under 1 s where nothing else runs
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: override 'ppo.gama=1': unknown key ppo.gama; did you mean ppo.gamma?\n"


def test_a_valid_recipe_exits_with_0_and_says_where_it_runs(recipe):
    done = run("-m", "rlhf.recipe", recipe())
    assert (done.returncode, done.stderr) == (0, "")
    assert "runs/x" in done.stdout


def test_checking_a_recipe_imports_no_torch(recipe):
    code = (
        "import sys; from rlhf.recipe.load import load; load('{}');"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = run("-c", code.format(recipe()))
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("former", [key for key in FORMER if key not in known_keys()])
def test_a_former_key_names_the_present_one(recipe, former):
    with pytest.raises(UserError, match=rf"^override '{former}=1': unknown key {former}; .*{FORMER[former]}"):
        load(recipe(), [f"{former}=1"])


def test_a_former_key_leads_to_a_present_one():
    known = set(known_keys())
    assert {old for old in FORMER if old in known} == set()
    assert {new for new in RENAMED.values() if new not in known} == set()
