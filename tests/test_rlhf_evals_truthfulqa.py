"""TruthfulQA: the three metrics by hand, ties, both file formats, bad rows."""

import json
import math
from pathlib import Path

import pytest
from tiny_evaluate import write_rows

from rlhf.errors import UserError
from rlhf.evals.tasks.truthfulqa import mc1, mc2, mc3, read

DATA = Path(__file__).parents[2] / "shared" / "data" / "truthfulqa" / "mc_task.json"


def test_mc1_wants_the_best_answer_above_every_false_one():
    assert mc1([-1.0, -2.0, -3.0], [True, False, False]) == 1.0
    assert mc1([-2.0, -1.0, -3.0], [True, False, False]) == 0.0
    assert mc1([-5.0, -6.0, -4.0], [False, False, True]) == 1.0  # the best answer need not stand first
    assert mc1([-1.0, -1.0, -3.0], [True, False, False]) == 0.0  # a tie is not enough


def test_mc2_is_the_mass_of_the_true_answers():
    probabilities = [0.2, 0.1, 0.3, 0.05]
    labels = [True, False, False, True]
    assert mc2([math.log(p) for p in probabilities], labels) == pytest.approx(0.25 / 0.65)
    # where every probability is too small for a float the mass still is what it is
    assert mc2([math.log(p) - 2000 for p in probabilities], labels) == pytest.approx(0.25 / 0.65)


def test_mc3_is_the_share_of_true_answers_above_every_false_one():
    labels = [True, True, True, False, False]
    assert mc3([-1.0, -2.0, -4.0, -3.0, -9.0], labels) == pytest.approx(2 / 3)
    assert mc3([-3.0, -2.0, -4.0, -3.0, -9.0], labels) == pytest.approx(1 / 3)  # the tie does not count
    assert mc3([-5.0, -5.0, -4.0, -3.0, -9.0], labels) == 0.0


def question(**changes):
    targets = {"mc1_targets": {"yes": 1, "no": 0, "maybe": 0}, "mc2_targets": {"yes": 1, "sure": 1, "no": 0}}
    return {"question": "Is it?", **targets, **changes}


def test_both_formats_say_the_same(tmp_path):
    file = tmp_path / "mc_task.json"
    file.write_text(json.dumps([question()]), encoding="utf-8")
    hub = {
        "question": "Is it?",
        "mc1_targets": {"choices": ["yes", "no", "maybe"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["yes", "sure", "no"], "labels": [1, 1, 0]},
    }
    (ours,), (theirs,) = read([str(file)]), read([write_rows(tmp_path / "hub.jsonl", [hub])])
    assert ours[1:] == theirs[1:]
    assert ours.mc2.labels == [True, True, False]
    assert ours.id == "mc_task:1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q"}, 'no "question": the fields are query'),
        ({"question": "q", "mc1_targets": {"a": 1, "b": 0}}, 'no "mc2_targets"'),
        (question(mc1_targets=["a"]), '"mc1_targets" is no object'),
        (question(mc1_targets={"a": 1, "b": 1}), "not exactly one true answer: it has 2"),
        (question(mc1_targets={"a": 0, "b": 0}), "not exactly one true answer: it has 0"),
        (question(mc2_targets={"a": 1, "b": 1}), "not both true and false answers"),
        (question(mc1_targets={"a": 1, "": 0}), 'an empty answer in "mc1_targets"'),
        (question(mc1_targets={"a": 1, "b": 2}), "not one 0 or 1 an answer"),
        (question(mc1_targets={"choices": ["a", "b"], "labels": [1]}), "not one 0 or 1 an answer"),
        (question(mc2_targets={"choices": ["a", "a"], "labels": [1, 0]}), "the same answer twice"),
    ],
)
def test_a_row_that_is_not_as_expected_is_named(tmp_path, row, message):
    file = write_rows(tmp_path / "q.jsonl", [question(), row])
    with pytest.raises(UserError, match=message) as caught:
        read([file])
    assert str(caught.value).startswith(f"{file}:2: ")
    assert '"mc1_targets"' in str(caught.value)


@pytest.mark.skipif(not DATA.is_file(), reason=f"{DATA} is not there")
def test_the_published_file_is_read():
    items = read([str(DATA)])
    assert len(items) == 817
    assert sum(1 / len(item.mc1.choices) for item in items) / 817 == pytest.approx(0.2225, abs=1e-4)
    assert all(item.mc1.labels[0] for item in items)  # the best answer always stands first in this file
