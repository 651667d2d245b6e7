"""How comparisons are split, by prompt and otherwise, and what is said of what the parts share."""

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.comparisons import Comparison, Message, prompt_key
from rlhf.data.split import (
    check_apart,
    connected,
    leaks,
    row_key,
    split_by_prompt,
    split_comparisons,
    unit_keys,
)
from rlhf.errors import UserError


def make(prompt="q", responses=("a", "b"), ranks=(0, 1), group=None):
    return Comparison((Message("user", prompt),), tuple(responses), tuple(ranks), "s", group=group)


@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda ns: len(set(ns)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32),
)
def test_a_prompt_is_never_in_both_parts(numbers, fraction, seed):
    comparisons = [
        make(prompt=str(n) + " " * (i % 2), responses=(f"a{i}", "b")) for i, n in enumerate(numbers)
    ]
    train, held = split_by_prompt(comparisons, fraction, seed)
    assert train
    assert held
    assert not {prompt_key(c.prompt) for c in train} & {prompt_key(c.prompt) for c in held}
    assert sorted(train + held, key=comparisons.index) == comparisons
    assert [c for c in comparisons if c in held] == held


def test_adding_prompts_never_moves_an_old_one():
    small = [make(prompt=str(n)) for n in range(200)]
    large = [make(prompt=str(n)) for n in range(1000, 0, -1)] + small
    for part_small, part_large in zip(
        split_by_prompt(small, 0.2, 7), split_by_prompt(large, 0.2, 7), strict=True
    ):
        assert {prompt_key(c.prompt) for c in part_small} <= {prompt_key(c.prompt) for c in part_large}


def test_the_held_out_part_has_the_asked_share_and_follows_the_seed():
    comparisons = [make(prompt=str(n)) for n in range(2000)]
    parts = [split_by_prompt(comparisons, 0.1, seed)[1] for seed in (0, 1)]
    # 4 standard deviations of a binomial with 2000 draws of 0.1.
    assert all(abs(len(part) - 200) < 54 for part in parts)
    overlap = {prompt_key(c.prompt) for c in parts[0]} & {prompt_key(c.prompt) for c in parts[1]}
    assert len(overlap) < 50
    assert split_by_prompt(comparisons, 0.1, 0)[1] == parts[0]


def test_two_prompts_are_enough_for_a_split_and_one_is_not():
    assert [len(part) for part in split_by_prompt([make("a"), make("b")], 0.001, 0)] == [1, 1]
    assert [len(part) for part in split_by_prompt([make("a"), make("b")], 0.999, 0)] == [1, 1]
    with pytest.raises(UserError, match="2 rows with 1 different prompts"):
        split_by_prompt([make("a"), make("a ")], 0.5, 0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_share_that_leaves_a_part_empty_is_refused(fraction):
    with pytest.raises(UserError, match="held-out fraction must lie between 0 and 1"):
        split_by_prompt([make("a"), make("b")], fraction, 0)


def test_the_place_of_a_prompt_is_that_of_earlier_versions():
    comparisons = [make(prompt=str(n)) for n in range(300)]

    def place(c):  # written anew: a split of an old run must not move
        digest = hashlib.sha256(f"5:{prompt_key(c.prompt)}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    train, held, lines = split_comparisons(comparisons, "prompt", 0.3, 5)
    assert held == [c for c in comparisons if place(c) < 0.3]
    assert (train, held) == split_by_prompt(comparisons, 0.3, 5)
    assert lines == []


def pool(n, per=3):
    """Comparisons of one prompt: responses of one tens digit are connected."""
    pairs = itertools.combinations(range(per), 2)
    return [make("q", (f"{k}{i}", f"{k}{j}"), group=f"g{k % 7}") for i, j in pairs for k in range(n)]


@pytest.mark.parametrize("by", ["group", "responses", "row"])
def test_a_unit_is_never_in_both_parts_and_one_prompt_is_enough(by):
    comparisons = pool(40)
    train, held, lines = split_comparisons(comparisons, by, 0.3, 1)
    assert sorted(train + held, key=comparisons.index) == comparisons
    assert len(held) > 5
    assert len(train) > len(held)
    kinds = {
        "group": lambda c: {c.group},
        "responses": lambda c: {r[:-1] for r in c.responses},
        "row": lambda c: {frozenset(c.responses)},
    }
    sides = [set().union(*map(kinds[by], part)) for part in (train, held)]
    assert not sides[0] & sides[1]
    (line,) = lines
    texts = {r for c in train for r in c.responses}
    shared = sum(bool(set(c.responses) & texts) for c in held)
    assert (shared > 0) == (by == "row")
    assert line == (
        f"warning: data.split_by={by}: of {len(held)} held-out comparisons {len(held)} share their prompt "
        f"and {shared} share a response with the training part: figures on them say less about new ones"
    )


@pytest.mark.parametrize("by", ["group", "responses", "row"])
def test_every_split_follows_the_seed_and_nothing_else(by):
    held = [split_comparisons(pool(40), by, 0.3, seed)[1] for seed in (1, 1, 2)]
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize("by", ["group", "responses", "row"])
def test_adding_rows_moves_no_old_unit(by):
    small, large = pool(40), pool(80)
    held = [split_comparisons(part, by, 0.3, 1)[1] for part in (small, large)]
    if by == "group":  # seven groups, all in the small part
        assert {c.group for c in held[0]} == {c.group for c in held[1]}
    else:
        assert held[0] == [c for c in small if c in held[1]]


@given(st.lists(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=3), max_size=12))
def test_connected_sets_are_those_of_a_plain_search(sets):
    def component(start):
        found = set(start)
        while any(grown := [s for s in sets if found & set(s) and not set(s) <= found]):
            found.update(*grown)
        return found

    assert connected(sets) == [min(component(s)) for s in sets]


def test_a_row_without_a_group_goes_by_its_prompt_and_is_counted():
    comparisons = [make(str(n), group=f"g{n % 10}" if n % 4 else None) for n in range(200)]
    train, held, lines = split_comparisons(comparisons, "group", 0.3, 0)
    assert lines[0] == "data.split_by=group: 50 comparisons have no group and went by their prompt"
    assert {c.group for c in train if c.group}.isdisjoint(c.group for c in held if c.group)
    assert {c.group for c in held} > {None}


def test_the_verdict_and_the_order_of_responses_do_not_make_another_row():
    same = [make(), make(responses=("b", "a ")), make(ranks=(1, 0))]
    assert len(set(map(row_key, same))) == 1
    others = [
        make(),
        make("other"),
        make(responses=("a", "c")),
        make(responses=("a", "b", "c"), ranks=(0, 1, 2)),
    ]
    assert len(set(map(row_key, others))) == 4


def test_what_holds_most_of_the_rows_is_trained_on():
    comparisons = [make("q", ("hub", f"r{n}")) for n in range(30)] + [
        make("q", ("x", "y")),
        make("q", ("z", "w")),
    ]
    for seed in range(20):
        train, held, lines = split_comparisons(comparisons, "responses", 0.5, seed)
        assert len(train) >= 30
        assert held
        assert lines[0].startswith("data.split_by=responses: one set of connected responses holds 30 of 32")


def test_one_prompt_is_refused_with_what_would_work():
    with pytest.raises(UserError) as caught:
        split_comparisons(pool(20), "prompt", 0.1, 0)
    assert str(caught.value) == (
        "cannot split 60 rows with 1 different prompts into a training and a held-out part: set "
        "data.split_by=group (7 groups), or data.split_by=responses (20 sets of connected responses), or "
        "data.split_by=row (60 rows), or name a test set of its own as data.held_out_comparisons"
    )


@pytest.mark.parametrize(
    ("comparisons", "by", "message"),
    [
        (
            pool(1),
            "group",
            "3 rows with 1 different groups into a training and a held-out part: set data.split_by=row",
        ),
        (
            [make("a"), make("b")],
            "group",
            "data.split_by=group: no comparison has a group; set data.split_by=prompt",
        ),
        (pool(1), "responses", "3 rows with 1 different sets of connected responses"),
        (
            [make()],
            "row",
            "1 rows with 1 different rows into a training and a held-out part: give more data, or name",
        ),
        ([make()], "prompt", "give more data, or name a test set"),
    ],
)
def test_one_unit_is_refused(comparisons, by, message):
    with pytest.raises(UserError) as caught:
        split_comparisons(comparisons, by, 0.1, 0)
    assert message in str(caught.value)


def test_test_files_that_share_rows_are_refused_or_counted():
    train = [make("p", ("a", "b")), make("q", ("c", "d"))]
    held = [
        make("p", (" b", "a"), (0, 1)),
        make("q", ("c", "new")),
        make("r", ("d", "e")),
        make("s", ("x", "y")),
    ]
    found = leaks(train, held)
    assert (found.held_out, found.rows, found.prompts, found.responses) == (4, 1, 2, 3)
    with pytest.raises(UserError) as caught:
        check_apart(train, held, allow=False)
    assert str(caught.value).startswith(
        "data.held_out_comparisons: 1 of 4 comparisons are also in data.comparisons (the first: 'p' / 'b' / "
    )
    assert check_apart(train, held, allow=True) == [
        "warning: data.held_out_comparisons: of 4 held-out comparisons 2 share their prompt and 3 share a "
        "response with the training part, 1 are in it with all their responses (data.allow_overlap): "
        "figures on them say less about new ones"
    ]
    assert check_apart(train, held[3:], allow=False) == []
    (line,) = check_apart(train, held[1:], allow=False)
    assert "1 share their prompt and 2 share a response with the training part: figures" in line


def test_the_keys_of_a_unit_do_not_collide_across_kinds():
    comparisons = [make("a", group=None), make("b", group=prompt_key((Message("user", "a"),)))]
    assert len(set(unit_keys(comparisons, "group"))) == 2
