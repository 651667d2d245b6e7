"""The block of smaller sizes in a recipe: laid over the rest when asked for, checked when not."""

import pytest
import yaml
from recipe_cases import TEXT, refusal, writer
from test_rlhf_recipe import ROOT, SHIPPED, shipped

from rlhf.errors import UserError
from rlhf.recipe.load import check_batch_sizes, dump, load

QUICK = TEXT + "quick:\n  ppo: {batch_size: 8}\n  data: {limit: 7}\n  pmp: null\n"


@pytest.fixture
def recipe(inside):
    """Write a recipe next to the file of comparisons that it names; returns its path."""
    return writer(inside)


@pytest.mark.parametrize("path", SHIPPED)
def test_a_shipped_quick_block_changes_something_and_runs_on_one_process(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "\nquick:" not in (ROOT / path).read_text(encoding="utf-8"):
        with pytest.raises(UserError, match="has no quick block"):
            shipped(path, "quick=true")
        return
    whole, quick = shipped(path), shipped(path, "quick=true")
    check_batch_sizes(quick, 1)
    assert quick.name == f"{whole.name}-quick"
    assert quick.model_dump() != whole.model_dump() | {"name": quick.name}


def test_a_quick_block_is_laid_over_the_recipe_where_it_is_asked_for(recipe):
    path = recipe(QUICK)
    whole, quick = load(path), load(path, ["quick=true"])
    assert (whole.name, whole.ppo.batch_size, whole.data.limit) == ("x", 64, None)
    assert (quick.name, quick.ppo.batch_size, quick.data.limit) == ("x-quick", 8, 7)
    assert (quick.ppo.steps, quick.data.comparisons) == (3, ["c.jsonl"])  # what it does not name stays
    assert load(path, ["quick=true", "quick=false"]) == load(path, ["quick=False"]) == whole
    assert "quick" not in yaml.safe_load(dump(quick))


def test_overrides_count_more_than_the_quick_block(recipe):
    found = load(recipe(QUICK), ["ppo.batch_size=16", "quick=true", "data.limit=null", "name=y"])
    assert (found.name, found.ppo.batch_size, found.data.limit) == ("y-quick", 16, None)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "{batch_size: 8}",
            "{bach_size: 8}",
            "r.yaml:8: unknown key ppo.bach_size; did you mean ppo.batch_s",
        ),
        ("{batch_size: 8}", "{batch_size: no}", "r.yaml:8: ppo.batch_size: "),
        ("{batch_size: 8}", "{minibatches: 3}", "r.yaml:8: ppo: batch_size 64 does not divide into 3"),
        ("{batch_size: 8}", "3", "r.yaml:8: ppo: "),
        ("{limit: 7}", "{limit: 7, quick: true}", "r.yaml:9: unknown key data.quick"),
    ],
)
def test_a_mistake_in_a_quick_block_is_named_with_its_line_whether_it_is_used_or_not(
    recipe, old, new, expected
):
    path = recipe(QUICK.replace(old, new))
    message = refusal(path)
    assert message.startswith(expected)
    assert message.endswith("(in the quick block)")
    assert refusal(path, "quick=true").startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT + "quick: 3\n", "r.yaml:7: quick is a mapping of sections, as the recipe (got 3)"),
        (TEXT + "quick:\n  name: y\n", "r.yaml:8: quick.name: the name is the recipe's with -quick behind"),
        (TEXT + "quik: {}\n", "r.yaml:7: unknown key quik; did you mean quick?"),
    ],
)
def test_a_quick_block_that_is_none_is_refused(recipe, text, expected):
    assert refusal(recipe(text)).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quick=maybe", "override 'quick=maybe': quick is true or false"),
        ("quick", "override 'quick': quick is true or false"),
        ("quick.ppo.steps=2", "override 'quick.ppo.steps=2': write ppo.steps=2 quick=true instead"),
    ],
)
def test_a_mistyped_wish_for_the_quick_block_is_named(recipe, override, expected):
    assert refusal(recipe(QUICK), override) == expected


def test_a_wish_for_a_quick_block_that_is_not_there_is_refused(recipe):
    assert refusal(recipe(TEXT), "quick=true").startswith("override 'quick=true': r.yaml has no quick block")


def test_a_quick_block_is_judged_with_the_overrides_only_where_it_needs_them(recipe):
    open_end = QUICK.replace("path: m", "dtype: float32")  # the model comes with the command
    assert load(recipe(open_end), ["model.path=m"]).name == "x"
    assert refusal(recipe(open_end)) == "r.yaml:2: model.path is missing; add it to the recipe"
    # sizes that fit each other in the recipe and not with the block, which is not used
    assert load(recipe(QUICK), ["ppo.minibatches=64"]).ppo.minibatches == 64
    assert "batch_size 8 does not divide into 64" in refusal(
        recipe(QUICK), "ppo.minibatches=64", "quick=true"
    )


def test_an_unused_quick_block_changes_no_stage(recipe):
    assert load(recipe(QUICK)) == load(recipe(TEXT))
