"""The comparisons stage with other splits, test files of its own and rankings; what it refuses."""

import gc
import itertools
import json
import shutil
from pathlib import Path

import pytest
from conftest import stage

from reward.card import __main__ as card
from reward.training import __main__ as reward_train
from rlhf.collect import __main__ as collect
from rlhf.data.comparisons import Comparison, Counts, Message, prompt_key, write_native
from rlhf.data.readers.native import read_native
from rlhf.data.split import check_rankings, row_key
from rlhf.errors import UserError
from rlhf.models import prepare
from rlhf.recipe.load import load

RUN = Path("runs/judge/comparisons")
RECIPE = """
name: judge
model: {path: models/tiny, source: random}
dialogue: {template: plain, max_prompt_tokens: 200, max_response_tokens: 100}
data: {comparisons: data.jsonl, held_out: 0.25}
"""


def pair(prompt, winner, loser, group=None):
    return Comparison((Message("user", prompt),), (winner, loser), (0, 1), "s", None, group)


def one_prompt():
    """Ten pools of four responses to one prompt, all of whose pairs are voted on."""
    return [
        pair("q", f"answer {k} {i}", f"answer {k} {j}", f"debate {k % 5}")
        for k in range(10)
        for i, j in itertools.combinations(range(4), 2)
    ]


@pytest.fixture
def desk(road, inside):
    """The tiny model, a recipe and one prompt's comparisons."""
    shutil.copytree(road / "models", inside / "models")
    Path("r.yaml").write_text(RECIPE)
    write_native("data.jsonl", one_prompt())
    return inside


def made(*overrides):
    stage(collect.main, "data.prompts=[]", "data.held_out_prompts=[]", *overrides, recipe="r.yaml")
    parts = [read_native(RUN / f"{name}.jsonl", "stop", Counts()) for name in ("train", "held_out")]
    return *parts, json.loads((RUN / "manifest.json").read_text())["results"]


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        made(*overrides)
    message = str(caught.value)
    del caught
    gc.collect()  # the error holds the run, which holds the lock
    assert not (RUN / "manifest.json").exists()
    return message


def test_one_prompt_is_refused_with_what_would_work(desk):
    message = refusal()
    assert message.startswith("cannot split 60 rows with 1 different prompts into a training and a held-out")
    assert "data.split_by=group (5 groups), or data.split_by=responses (10 sets" in message


@pytest.mark.parametrize("by", ["group", "responses", "row"])
def test_one_prompt_is_split_otherwise_and_what_leaks_is_told(desk, capsys, by):
    train, held_out, results = made(f"data.split_by={by}")
    assert {row_key(c) for c in train}.isdisjoint(map(row_key, held_out))
    assert len(train) + len(held_out) == 60
    assert all(c.group for c in (*train, *held_out))
    printed = capsys.readouterr().out
    assert f"warning: data.split_by={by}: of {len(held_out)} held-out comparisons {len(held_out)} " in printed
    assert "warning: every held-out prompt is also a training prompt" in printed
    assert results["held_out_prompts_are_training_prompts"] is True
    assert (results["prompts"], results["held_out_prompts"]) == (1, 1)
    assert all(note in printed for note in results["notes"])


def test_other_prompts_keep_their_split_and_have_no_notes(desk):
    write_native("data.jsonl", [pair(f"q{n}", "a", "b") for n in range(40)])
    train, held_out, results = made()
    assert {prompt_key(c.prompt) for c in train}.isdisjoint(prompt_key(c.prompt) for c in held_out)
    assert set(results) == {"train", "held_out", "prompts", "held_out_prompts", "responses", "counts"}


def test_a_limit_that_leaves_one_group_says_what_was_read(desk):
    message = refusal("data.split_by=group", "data.limit=1")
    assert "cannot split 1 rows with 1 different groups" in message
    assert message.endswith("(read 60, kept 1, dropped 59 (59 beyond data.limit))")


def test_groups_are_asked_for_where_there_are_none(desk):
    write_native("data.jsonl", [pair(f"q{n}", "a", "b") for n in range(4)])
    assert refusal("data.split_by=group").startswith("data.split_by=group: no comparison has a group; set ")


def test_test_files_of_their_own_are_all_held_out(desk, capsys):
    write_native("test.jsonl", [pair("other", "c", "d"), pair("q", "answer 0 0", "e")])
    train, held_out, results = made("data.held_out_comparisons=test.jsonl")
    assert (len(train), len(held_out)) == (60, 2)
    assert "of 2 held-out comparisons 1 share their prompt and 1 share a response" in capsys.readouterr().out
    assert results["counts"]["held_out_comparisons"]["kept"] == 2
    assert results["counts"]["held_out_prompts"]["dropped"] == {"also among the training prompts": 1}
    assert results["held_out_prompts"] == 1


def test_test_files_that_share_rows_with_training_are_refused_unless_allowed(desk, capsys):
    write_native("test.jsonl", [pair("q", "answer 0 1", "answer 0 0"), pair("p", "c", "d")])
    message = refusal("data.held_out_comparisons=test.jsonl")
    assert message.startswith(
        "data.held_out_comparisons: 1 of 2 comparisons are also in data.comparisons (the "
    )
    assert "data.allow_overlap=true" in message
    train, held_out, _ = made("data.held_out_comparisons=test.jsonl", "data.allow_overlap=true")
    assert (len(train), len(held_out)) == (60, 2)
    assert "1 are in it with all their responses (data.allow_overlap)" in capsys.readouterr().out


def test_test_files_of_which_nothing_is_left_are_refused(desk):
    write_native("test.jsonl", [pair("word " * 300, "c", "d")])
    message = refusal("data.held_out_comparisons=test.jsonl", "dialogue.on_long_prompts=skip")
    assert message.startswith(
        "data.held_out_comparisons: nothing usable in test.jsonl: read 1, kept 0, dropped 1"
    )
    write_native("test.jsonl", [pair("q", "c", "c")])
    assert refusal("data.held_out_comparisons=test.jsonl").startswith("no usable comparison in test.jsonl: ")


def test_test_files_are_inputs_of_the_stage(desk):
    write_native("test.jsonl", [pair("other", "c", "d")])
    made("data.held_out_comparisons=test.jsonl")
    write_native("test.jsonl", [pair("other", "c", "e")])
    with pytest.raises(UserError, match=r"data file test\.jsonl"):
        made("data.held_out_comparisons=test.jsonl")
    with pytest.raises(UserError, match=r"data\.held_out_comparisons: no file matches no\.jsonl"):
        load("r.yaml", ["data.held_out_comparisons=no.jsonl"])


def test_the_training_part_becomes_rankings_and_the_held_out_part_stays(desk, capsys):
    _, plain, _ = made("data.split_by=responses")
    shutil.rmtree("runs")
    train, held_out, results = made("data.split_by=responses", "data.rankings=3", "data.ranking_passes=2")
    assert held_out == plain
    assert {len(c.responses) for c in train} <= {2, 3}
    assert all(c.responses == tuple(sorted(c.responses)) for c in train)  # answer k 0 beats answer k 1 ...
    assert results["rankings"]["pairs"] == 60 - len(held_out)
    assert results["rankings"]["agreement"] == 1
    assert "the Bradley-Terry fit agrees with the vote in 1.000 of the pairs" in capsys.readouterr().out


def test_rows_of_a_pair_are_votes_where_the_recipe_says_so(desk, capsys):
    turned = [pair(c.prompt[0].content, *c.responses[::-1], c.group) for c in one_prompt()]
    write_native("data.jsonl", [*one_prompt(), *turned, *one_prompt()])
    by_group, votes = "data.split_by=group", "data.repeats=votes"
    train, held_out, results = made(by_group, votes)
    assert len(train) + len(held_out) == 60
    assert {c.confidence for c in (*train, *held_out)} == {2 / 3}
    assert results["counts"]["comparisons"]["dropped"] == {"further votes on a pair": 120}
    shutil.rmtree("runs")
    train, voted, results = made(by_group, votes, "data.rankings=4")
    assert (voted, {c.ranks for c in train}) == (held_out, {(0, 1, 2, 3)})
    assert results["rankings"]["pairs"] == 3 * (60 - len(held_out))
    write_native("data.jsonl", [*one_prompt(), one_prompt()[0]])
    shutil.rmtree("runs")
    made(by_group, "data.rankings=4")
    assert "1 repeated rows count once; data.repeats=votes counts each as a vote" in capsys.readouterr().out


def test_a_ranking_that_orders_a_held_out_pair_is_refused_or_told(desk, capsys):
    by_row = ("data.split_by=row", "data.rankings=4")
    message = refusal(*by_row)
    assert message.startswith("data.rankings: training rankings order the responses of ")
    assert message.endswith("or set data.allow_overlap=true to test on them nevertheless")
    _, held_out, results = made(*by_row, "data.allow_overlap=true")
    assert f"of {len(held_out)} held-out comparisons (the first: 'q' / 'answer" in capsys.readouterr().out
    assert any("(data.allow_overlap)" in line for line in results["notes"])


def test_only_an_ordered_pair_of_the_same_prompt_is_one_that_a_ranking_gives_away():
    ranking = Comparison((Message("user", "q"),), ("a", "b ", "c"), (0, 1, 1), "s")
    apart = [pair("q", "b", "c"), pair("q", "a", "d"), pair("p", "a", "b")]
    assert check_rankings([ranking], apart, False) == []
    (line,) = check_rankings([ranking], [*apart, pair("q", " b", "a")], True)
    assert "the responses of 1 of 4 held-out comparisons (the first: 'q' / 'b' / 'a')" in line
    with pytest.raises(UserError, match="training rankings order"):
        check_rankings([ranking], [pair("q", "c", "a")], False)


def test_votes_that_all_cancel_out_are_refused(desk):
    turned = [pair(c.prompt[0].content, *c.responses[::-1], c.group) for c in one_prompt()]
    write_native("data.jsonl", [*one_prompt(), *turned])
    message = refusal("data.split_by=group", "data.rankings=3")
    assert message.startswith("data.rankings: the votes of all ")


def test_ten_thousand_responses_in_one_row_are_refused_left_out_or_dealt(desk):
    texts = tuple(f"r{i}" for i in range(10_000))
    long = Comparison((Message("user", "long"),), texts, tuple(range(10_000)), "s")
    write_native("data.jsonl", [*one_prompt(), long])
    write_native("test.jsonl", [pair("other", "c", "d")])
    own = "data.held_out_comparisons=test.jsonl"
    message = refusal(own)
    assert message.startswith(
        "data.comparisons: a comparison of 10,000 responses (to 'long'...), more than 256"
    )
    train, _, results = made(own, "data.on_bad_rows=skip")
    assert len(train) == 60
    assert results["counts"]["comparisons"]["dropped"] == {"more than 256 responses": 1}
    shutil.rmtree("runs")
    train, _, results = made(own, "data.rankings=9", "data.ranking_passes=1")
    assert max(len(c.responses) for c in train) == 9
    assert results["rankings"]["redealt"] == 1


@pytest.mark.parametrize("more", ["data.held_out_comparisons=data.jsonl", "data.rankings=4"])
def test_the_lab_takes_no_test_files_and_no_votes(desk, more):
    lab = ("data.comparisons=sampled", "data.prompts=data.jsonl", "data.held_out_prompts=data.jsonl")
    with pytest.raises(UserError, match="sampled makes rankings and a held-out part of its own"):
        load("r.yaml", [*lab, more])


def test_a_reward_model_and_its_card_work_on_one_prompt(desk):
    options = (
        "data.split_by=responses",
        "data.prompts=[]",
        "data.held_out_prompts=[]",
        "reward.batch_size=8",
    )
    for main in (prepare.main, collect.main, reward_train.main, card.main):
        stage(main, *options, recipe="r.yaml")
    held_out = (RUN / "held_out.jsonl").read_text().splitlines()
    page = json.loads(Path("runs/judge/card/card.json").read_text())
    assert page["comparisons"] == len(held_out) > 0
    assert page["data"]["counts"]["dropped"] == {}
    assert page["data"]["seen"].startswith("None of these comparisons is among the training comparisons")


def test_the_card_leaves_out_the_very_comparisons_that_were_trained_on(desk):
    options = ("data.split_by=row", "data.prompts=[]", "data.held_out_prompts=[]", "reward.batch_size=8")
    for main in (prepare.main, collect.main, reward_train.main):
        stage(main, *options, recipe="r.yaml")
    train = (RUN / "train.jsonl").read_text().splitlines()
    stage(card.main, *options, "card.comparisons=data.jsonl", recipe="r.yaml")
    page = json.loads(Path("runs/judge/card/card.json").read_text())
    assert page["comparisons"] == 60 - len(train)
    assert page["data"]["counts"]["dropped"] == {"also among the training comparisons of a run": len(train)}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("split_by", ["debate", "1", "[row]", "null"]),
        ("allow_overlap", ["maybe", "[true]", "null"]),
        ("rankings", ["1", "0", "65", "2.5", "many", "[3]", ".nan"]),
        ("ranking_passes", ["0", "-1", "1.5", "null"]),
    ],
)
def test_values_that_a_key_cannot_have_are_refused_in_its_name(desk, key, values):
    for value in values:
        with pytest.raises(UserError, match=rf"data\.{key}"):
            load("r.yaml", [f"data.{key}={value}"])
