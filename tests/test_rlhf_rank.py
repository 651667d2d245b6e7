"""Ranking without a browser: who is asked what, what is kept, agreement, candidates, other tools."""

import itertools
import json
import math
import random

import pytest
from conftest import stage

from rlhf.data.comparisons import Message
from rlhf.data.readers import read_comparisons
from rlhf.errors import UserError
from rlhf.rank.agreement import agreement, alpha, verdicts
from rlhf.rank.pages import lines, summary
from rlhf.rank.session import HELD_SECONDS, SEAT_SECONDS, Item, Session
from rlhf.rank.store import Store
from rlhf.web.server import RefusedError

SEAT, OTHER = "seat-one-1", "seat-two-2"


def some(number, responses=3):
    return [
        Item(f"item{n}", (Message("user", f"Question {n}"),), tuple(f"{n}{c}" for c in "abcd"[:responses]),
             tuple("xyxy"[:responses]))
        for n in range(number)
    ]  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "comparisons.jsonl")


def ranked(session, name, seat=SEAT, best_first=None, **more):
    """Rank what the person has on the page in the order of the texts, or of a function; returns the texts."""
    task = session.next(name, seat)
    order = sorted(task["responses"], key=best_first)
    said = {"item": task["item"], "outcome": "ranked", "ranks": [order.index(x) for x in task["responses"]]}
    session.save(name, seat, {**said, **more})
    return task


def test_an_answer_is_kept_in_the_order_of_the_candidates_and_nobody_is_asked_twice(store):
    items = some(3)
    session = Session(items, store)
    seen = [ranked(session, "Ann", reason=" clear ", seconds=2.34)["item"] for _ in items]
    assert seen == ["item0", "item1", "item2"]
    assert session.next("Ann", SEAT) == {"name": "Ann", "done": 3, "left": 0, "item": None}
    rows = store.rows()
    assert [(row["ranks"], row["responses"][0]) for row in rows] == [([0, 1, 2], f"{n}a") for n in range(3)]
    assert (rows[0]["reason"], rows[0]["seconds"], rows[0]["writers"]) == ("clear", 2.3, ["x", "y", "x"])
    again = Session(items, Store(store.path))  # after a restart
    assert again.next("ann", SEAT)["item"] is None
    assert again.next("Bob", OTHER)["item"] is None  # one annotator a prompt is enough


def test_orders_are_shuffled_for_each_person_and_who_wrote_is_not_told(store):
    session = Session(some(20, 4), store, overlap=9)
    shown = {}
    for name in ("Ann", "Bob"):
        shown[name] = [ranked(session, name, name * 4)["responses"] for _ in range(20)]
    places = [order.index(min(order)) for orders in shown.values() for order in orders]
    assert {0, 1, 2, 3} == set(places)
    assert shown["Ann"] != shown["Bob"]
    assert "writers" not in json.dumps(session.next("Eve", SEAT))


def test_a_prompt_goes_to_as_many_people_as_the_recipe_says(store):
    now = [0.0]
    session = Session(some(1), store, overlap=2, clock=lambda: now[0])
    assert session.next("Ann", "seat-ann-1")["item"] == "item0"
    assert session.next("Bob", "seat-bob-1")["item"] == "item0"
    assert session.next("Eve", "seat-eve-1")["item"] is None  # two have it on the page
    ranked(session, "Ann", "seat-ann-1")
    now[0] = HELD_SECONDS + 1  # Bob went away
    assert session.next("Eve", "seat-eve-1")["item"] == "item0"
    session.leave("Eve", "seat-eve-1")
    assert session.next("Tim", "seat-tim-1")["item"] == "item0"


def test_two_with_one_name_at_once_are_told(store):
    now = [0.0]
    session = Session(some(3), store, clock=lambda: now[0])
    session.next("Ann", SEAT)
    for name in ("Ann", " ann "):
        with pytest.raises(RefusedError, match="ranking in another window"):
            session.next(name, OTHER)
        with pytest.raises(RefusedError, match="ranking in another window"):
            session.save(name, OTHER, {"item": "item0", "outcome": "skipped"})
    now[0] = SEAT_SECONDS - 1
    session.alive("Ann", SEAT)
    now[0] += SEAT_SECONDS - 1
    with pytest.raises(RefusedError, match="another window"):
        session.next("Ann", OTHER)
    now[0] += 2  # the window was killed
    assert session.next("ANN", OTHER)["name"] == "Ann"
    session.leave("Ann", OTHER)
    session.next("Ann", SEAT)


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\x00b", "a\u202eb"])
def test_names_that_are_none_are_refused(store, name):
    with pytest.raises(RefusedError, match="a name has"):
        Session(some(1), store).next(name, SEAT)


@pytest.mark.parametrize(
    "said",
    [
        {"outcome": "best"},
        {"outcome": "ranked"},
        {"outcome": "ranked", "ranks": [0, 1]},
        {"outcome": "ranked", "ranks": [0, 1, 3]},
        {"outcome": "ranked", "ranks": [0, 1, True]},
        {"outcome": "ranked", "ranks": [0, 1, -1]},
        {"outcome": "skipped", "reason": "x" * 2001},
        {"outcome": "skipped", "reason": 3},
        {"outcome": "skipped", "item": "another"},
    ],
)
def test_what_is_no_answer_is_refused_and_nothing_is_kept(store, said):
    session = Session(some(1), store)
    with pytest.raises(RefusedError):
        session.save("Ann", SEAT, {"item": "item0", **said})
    assert store.rows() == []
    assert session.next("Ann", SEAT)["item"] == "item0"


def test_an_answer_that_comes_twice_is_kept_once(store):
    session = Session(some(2), store)
    said = {"item": "item0", "outcome": "ranked", "ranks": [2, 0, 0]}
    assert session.save("Ann", SEAT, said)["item"] == "item1"
    assert session.save("Ann", SEAT, said)["item"] == "item1"
    assert len(store.rows()) == 1
    assert sorted(store.rows()[0]["ranks"]) == [0, 0, 1]  # dense, a tie


def test_undo_asks_the_last_one_again_filled_in(store):
    session = Session(some(4), store)
    first = ranked(session, "Ann")
    ranked(session, "Ann", reason="why")
    ranked(session, "Bob", OTHER)
    task = session.undo("Ann", SEAT)
    assert task["item"] == "item1"
    assert task["former"]["reason"] == "why"
    assert [x for _, x in sorted(zip(task["former"]["ranks"], task["responses"], strict=True))] == [
        "1a", "1b", "1c"
    ]  # fmt: skip
    assert [row["item"] for row in store.rows()] == ["item0", "item3"]
    session.undo("Ann", SEAT)
    with pytest.raises(RefusedError, match="no answer of yours"):
        session.undo("Ann", SEAT)
    assert session.next("Ann", SEAT)["item"] == first["item"]
    session.save("Bob", OTHER, {"item": "item1", "outcome": "all_bad"})
    assert session.undo("Bob", OTHER)["former"]["ranks"] is None


def test_skipping_leaves_the_prompt_to_others(store):
    session = Session(some(1), store)
    session.save("Ann", SEAT, {"item": "item0", "outcome": "skipped"})
    assert session.next("Ann", SEAT)["item"] is None
    assert session.next("Bob", OTHER)["item"] == "item0"
    assert store.rows()[0]["skipped"] is True


# ---------------------------------------------------------------- training on it


def test_people_who_agree_count_as_votes_and_what_says_nothing_is_left_out(store):
    session = Session(some(5), store, overlap=3)
    for name, key in (("Ann", None), ("Bob", None), ("Eve", lambda text: [-ord(c) for c in text])):
        ranked(session, name, name * 4, best_first=key)
    for outcome in ("skipped", "all_bad"):
        session.save("Ann", "Ann" * 4, {"item": f"item{1 + (outcome == 'all_bad')}", "outcome": outcome})
    session.save("Ann", "Ann" * 4, {"item": "item3", "outcome": "ranked", "ranks": [0, 0, 0]})
    session.save("Ann", "Ann" * 4, {"item": "item4", "outcome": "ranked", "ranks": [0, 1, 1]})
    found, counts = read_comparisons([str(store.path)], on_bad_rows="stop")
    assert len(found) == 2
    assert (found[0].responses, found[0].ranks) == (("0a", "0b", "0c"), (0, 1, 2))  # two against one
    assert found[0].confidence == pytest.approx(2 / 3)
    assert sorted(found[1].ranks) == [0, 1, 1]
    assert counts.dropped == {"skipped, or all responses bad": 2, "all answers have the same score": 1}
    assert counts.unused == {}


def test_a_row_that_was_changed_by_hand_is_a_bad_one(store):
    session = Session(some(1), store, overlap=2)
    ranked(session, "Ann")
    row = store.rows()[0]
    for change in ({"ranks": [0, 1]}, {"ranks": [0, "1", 2]}, {"responses": ["x", "y", "z"]}):
        store.append({**row, "annotator": "Bob", **change})
        with pytest.raises(UserError, match=r"one item|rank is not"):
            read_comparisons([str(store.path)], on_bad_rows="stop")
        store.take_back(lambda _: True)


def test_the_comparisons_stage_reads_a_file_of_answers(store, tmp_path, monkeypatch):
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    monkeypatch.chdir(tmp_path)
    session = Session(some(20), store)
    for number in range(20):
        if number % 5:
            ranked(session, "Ann")
        else:
            session.save("Ann", SEAT, {"item": session.next("Ann", SEAT)["item"], "outcome": "skipped"})
    stage(prepare.main)
    stage(collect.main, f"data.comparisons={store.path}", "data.held_out=0.2")
    manifest = json.loads((tmp_path / "runs/tiny/comparisons/manifest.json").read_text())
    assert manifest["results"]["train"] + manifest["results"]["held_out"] == 16


# ---------------------------------------------------------------- agreement


def test_alpha_is_krippendorffs_on_his_example():
    none = None  # Krippendorff 2011, section C: four observers, twelve units
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, none, none, none],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, none, 3],
        [none, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, none],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, none],
    ]
    units = [[x for x in values if x is not None] for values in zip(*observers, strict=True)]
    assert alpha(units) == pytest.approx(0.849, abs=5e-4)
    assert alpha([[1, 1], [1, 1]]) is None
    assert alpha([[1], [2]]) is None


def test_agreement_against_a_loop():
    rng = random.Random(0)
    items = [{name: [rng.randrange(3) for _ in range(3)] for name in "abc"[: 1 + n % 3]} for n in range(30)]
    found = agreement(items)
    shares = []
    for answers in items:
        alike = []
        for one, other in itertools.combinations(answers.values(), 2):
            for i, j in itertools.combinations(range(3), 2):
                first, second = (
                    math.copysign(1, d) if d else 0 for d in (one[j] - one[i], other[j] - other[i])
                )
                alike.append(1 - abs(first - second) / 2)
        if alike:
            shares.append(sum(alike) / len(alike))
    assert found["pairwise"]["mean"] == pytest.approx(sum(shares) / len(shares))
    assert found["prompts"] == len(shares) == 20
    assert abs(found["alpha"]) < 0.3  # chance
    assert verdicts([0, 0, 2]) == [0, 1, 1]


def test_full_agreement_is_one_and_opposition_is_below_chance():
    same = agreement([{"a": [0, 1, 2], "b": [0, 1, 2]}, {"a": [1, 0, 2], "b": [1, 0, 2]}])
    assert (same["alpha"], same["pairwise"]["mean"]) == (1.0, 1.0)
    assert same["between"] == [["a", "b", 1.0, 6]]
    against = agreement([{"a": [0, 1, 2], "b": [2, 1, 0]}] * 4)
    assert against["pairwise"]["mean"] == 0.0
    assert against["alpha"] < -0.9
    assert agreement([{"a": [0, 1]}])["pairwise"] is None


def test_the_owner_sees_progress_agreement_and_who_wins(store):
    session = Session(some(4), store, overlap=2)
    for name in ("Ann", "Bob"):
        for _ in range(3):
            ranked(session, name, name * 4, seconds=4)
    found = summary(session)
    assert (found["answers"], found["whole"], found["items"]) == (6, 3, 4)
    assert found["people"][0] == {"name": "Ann", "answers": 3, "skipped": 0, "all_bad": 0, "seconds": 4.0}
    # x wrote a and c, y wrote b: x is once above and once below it
    assert found["writers"] == [("x", 0.5, 12), ("y", 0.5, 12)]
    first, second = lines(found)
    assert first == "6 answers by 2 people; 3 of 4 prompts have all they need"
    assert "agreement on 3 prompts: 1.00" in second
