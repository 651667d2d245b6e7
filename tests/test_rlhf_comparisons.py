"""What a comparison is, how a set of them is cleaned and stored."""

import dataclasses
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.comparisons import (
    Comparison,
    Counts,
    Message,
    deduplicate,
    problem,
    prompt_key,
    reservoir_sample,
    write_native,
)
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError


def user(text):
    return (Message("user", text),)


def make(prompt="q", responses=("a", "b"), ranks=(0, 1), source="s", confidence=None, group=None):
    return Comparison(user(prompt), tuple(responses), tuple(ranks), source, confidence, group)


def cleaned(*comparisons):
    counts = Counts(read=len(comparisons))
    kept = deduplicate(comparisons, counts)
    assert counts.kept == len(kept)
    return kept, counts


words = st.text(min_size=1, max_size=8).filter(lambda text: text.strip())


@st.composite
def usable(draw):
    turns = draw(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=3))
    responses = draw(st.lists(words, min_size=2, max_size=4))
    ranks = draw(
        st.lists(st.integers(0, 5), min_size=len(responses), max_size=len(responses)).filter(
            lambda r: len(set(r)) > 1
        )
    )
    prompt = (*(Message(*turn) for turn in turns), Message("user", draw(words)))
    confidence = draw(st.none() | st.floats(0, 1))
    group = draw(st.none() | st.text(max_size=3))
    return Comparison(prompt, tuple(responses), tuple(ranks), draw(st.text(max_size=5)), confidence, group)


@given(usable())
def test_a_usable_comparison_has_no_problem(comparison):
    assert problem(comparison) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"responses": ("a",), "ranks": (0,)}, "fewer than 2 responses"),
        ({"responses": ("a", " \n")}, "empty response"),
        ({"responses": ("a", "\ud83d")}, "text that is not valid Unicode (a lone surrogate)"),
        ({"ranks": (0, 1, 2)}, "the number of ranks is not the number of responses"),
        ({"ranks": (0, -1)}, "a rank is not an integer >= 0"),
        ({"ranks": (0, 1.0)}, "a rank is not an integer >= 0"),
        ({"ranks": (False, True)}, "a rank is not an integer >= 0"),
        ({"ranks": (1, 1)}, "all responses are tied, which says nothing about preference"),
        ({"prompt": ()}, "empty prompt"),
        ({"prompt": user("  ")}, "empty prompt"),
        ({"prompt": user("\ud83d")}, "text that is not valid Unicode (a lone surrogate)"),
        (
            {"prompt": (Message("tool", "x"), *user("q"))},
            "unknown role 'tool' (known: system, user, assistant)",
        ),
        (
            {"prompt": (*user("q"), Message("assistant", "a"))},
            "the prompt does not end in a user turn",
        ),
        ({"confidence": 1.1}, "confidence outside [0, 1]"),
        ({"confidence": -0.1}, "confidence outside [0, 1]"),
        ({"confidence": float("nan")}, "confidence outside [0, 1]"),
        ({"group": "\ud83d"}, "text that is not valid Unicode (a lone surrogate)"),
    ],
)
def test_every_fault_has_its_own_name(change, reason):
    assert problem(dataclasses.replace(make(), **change)) == reason


def test_a_silent_turn_inside_the_dialogue_is_not_a_fault():
    prompt = (Message("user", "hi"), Message("assistant", ""), Message("user", "hello?"))
    assert problem(dataclasses.replace(make(), prompt=prompt)) is None


def test_white_space_at_the_ends_does_not_make_another_prompt():
    assert prompt_key(user(" q\n")) == prompt_key(user("q"))
    assert prompt_key(user("a  b")) != prompt_key(user("a b"))


def test_roles_and_the_borders_of_messages_make_another_prompt():
    keys = {
        prompt_key(prompt)
        for prompt in (
            user("ab"),
            (Message("system", "ab"),),
            (*user("a"), *user("b")),
            (*user("a"), Message("assistant", "b")),
            user('a"], ["user", "b'),
        )
    }
    assert len(keys) == 5


def test_a_repeated_comparison_is_removed_and_counted():
    kept, counts = cleaned(make(), make(source="other"), make(prompt="q "), make(prompt="other"))
    assert [c.prompt[0].content for c in kept] == ["q", "other"]
    assert counts.as_dict() == {
        "read": 4,
        "kept": 2,
        "dropped": {"duplicate comparison": 2},
        "duplicate_responses": 0,
    }


def test_the_order_in_which_responses_are_listed_does_not_make_another_comparison():
    kept, _ = cleaned(make(), make(responses=("b", "a"), ranks=(1, 0)))
    assert kept == [make()]


def test_the_opposite_verdict_is_another_comparison():
    kept, _ = cleaned(make(), make(ranks=(1, 0)))
    assert len(kept) == 2


def test_a_response_that_stands_twice_keeps_its_better_rank():
    kept, counts = cleaned(make(responses=("a", "b", "a ", "c"), ranks=(3, 1, 0, 2)))
    assert kept == [make(responses=("a", "b", "c"), ranks=(0, 1, 2))]
    assert counts.duplicate_responses == 1


def test_a_comparison_of_one_text_with_itself_is_dropped_and_counted():
    kept, counts = cleaned(make(responses=("a", "a")))
    assert kept == []
    assert counts.dropped == {"all responses are the same text": 1}


def test_a_comparison_left_with_ties_is_dropped_and_counted():
    kept, counts = cleaned(make(responses=("a", "b", "a"), ranks=(0, 0, 1)))
    assert kept == []
    assert counts.dropped == {"only ties are left without duplicate responses": 1}


def test_ranks_become_dense_and_the_best_is_0():
    kept, _ = cleaned(make(responses=("a", "b", "c"), ranks=(7, 2, 7)))
    assert kept[0].ranks == (1, 0, 1)


@given(st.lists(usable(), max_size=8))
def test_cleaning_twice_changes_nothing(comparisons):
    once, _ = cleaned(*comparisons)
    twice, counts = cleaned(*once)
    assert twice == once
    assert counts.dropped == {}
    assert all(problem(comparison) is None for comparison in once)


@given(comparisons=st.lists(usable(), max_size=5))
def test_native_rows_survive_writing_and_reading(tmp_path_factory, comparisons):
    path = tmp_path_factory.mktemp("native") / "new" / "c.jsonl"
    write_native(path, comparisons)
    counts = Counts()
    again = read_native(path, "stop", counts)
    assert again == comparisons
    assert counts.as_dict() == Counts(read=len(comparisons)).as_dict()
    assert [p.name for p in path.parent.iterdir()] == ["c.jsonl"]


def test_a_group_stays_and_is_written_only_where_it_is_set(tmp_path):
    kept, _ = cleaned(
        make(responses=("a", "b", "a"), ranks=(0, 1, 2), group="g"), make(group="other"), make("p")
    )
    assert [c.group for c in kept] == ["g", "other", None]  # of another group is another judgment
    write_native(tmp_path / "c.jsonl", kept)
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert rows[0]["group"] == "g"
    assert list(rows[2]) == ["prompt", "responses", "ranks", "source", "confidence"]


def test_a_group_that_is_no_text_is_a_bad_row(tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1], "group": 3}\n'
    )
    with pytest.raises(UserError, match=r"c.jsonl:1: .*group is not a string"):
        read_native(tmp_path / "c.jsonl", "stop", Counts())


def test_a_native_prompt_may_be_a_plain_string(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1]}) + "\n")
    assert read_native(path, "stop", Counts()) == [make(source="mine")]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.jsonl"
    write_native(path, [make()])

    def broken():
        yield make("new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_native(path, broken())
    assert read_native(path, "stop", Counts()) == [make()]


def test_every_item_has_the_same_chance_to_be_drawn():
    counts = np.zeros(10)
    for seed in range(3000):
        for item in reservoir_sample(range(10), 3, random.Random(seed)):
            counts[item] += 1
    assert abs(counts / 3000 - 0.3).max() < 0.04
    assert reservoir_sample(iter("abc"), 5, random.Random(0)) == ["a", "b", "c"]


def test_counts_add_up_and_read_as_one_line():
    counts = Counts(read=1203, duplicate_responses=2)
    counts.drop("empty response")
    counts.drop("empty prompt", 2)
    counts.drop("empty response")
    assert json.loads(json.dumps(counts.as_dict())) == {
        "read": 1203,
        "kept": 1199,
        "dropped": {"empty response": 2, "empty prompt": 2},
        "duplicate_responses": 2,
    }
    assert str(counts) == (
        "read 1,203, kept 1,199, dropped 4 (2 empty response; 2 empty prompt), duplicate responses removed 2"
    )
    assert str(Counts()) == "read 0, kept 0, dropped 0"


def test_this_room_starts_without_torch():
    code = (
        "import sys, rlhf.data.prompts, rlhf.data.readers;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
