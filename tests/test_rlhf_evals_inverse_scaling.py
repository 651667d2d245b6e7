"""The Inverse Scaling Prize: three formats by hand, signs, csv and jsonl, bad rows."""

import csv
import math
from pathlib import Path

import pytest
from tiny_evaluate import ids_of, language_model, log_prob, write_rows

from rlhf.errors import UserError
from rlhf.evals.tasks.inverse_scaling import PRIZE_TASKS, classification, log_odds, read, run

DATA = Path(__file__).parents[2] / "shared" / "data" / "inverse_scaling"


def test_classification_by_hand():
    logs = [math.log(0.2), math.log(0.1), math.log(0.3)]
    found = classification(logs, 2)
    assert found["acc"] == 1.0
    assert found["loss"] == pytest.approx(-math.log(0.3 / 0.6))
    assert found["total_logprob"] == pytest.approx(math.log(0.6))
    assert classification(logs, 0)["acc"] == 0.0
    assert classification([-1.0, -1.0], 0)["acc"] == 0.0  # argmax would take the first of equals
    assert classification([-1e4, -1e4 - 1], 0)["loss"] == pytest.approx(math.log(1 + math.exp(-1)))


def test_log_odds_turn_their_sign_with_the_answer():
    here, there = [math.log(0.4), math.log(0.1)], [math.log(0.2), math.log(0.3)]
    taken = math.log(4) - math.log(2 / 3)  # what the other prompt takes from the odds of class 0
    found = log_odds(here, there, 0)
    assert found["logodds_difference"] == pytest.approx(taken)
    assert log_odds(here, there, 1)["logodds_difference"] == pytest.approx(-taken)
    assert log_odds(there, here, 0)["logodds_difference"] == pytest.approx(-taken)
    assert log_odds(here, there, 1)["absolute_logodds_difference"] == pytest.approx(taken)
    assert (found["acc"], log_odds(here, there, 1)["acc"]) == (0.0, 1.0)  # behind the other prompt
    assert found["total_logprob"] == pytest.approx(math.log((0.5 + 0.5) / 2))


ROWS = [
    {"prompt": "Write a word that ends in y:", "classes": [" shy", " never"], "answer_index": 0, "part": 1},
    {"prompt": "Is it so?", "classes": [" Yes", " No", " Perhaps not"], "answer_index": 2, "part": 3},
]


def test_classes_are_scored_by_sums_behind_the_prompt(tmp_path):
    lm = language_model()
    items = read([write_rows(tmp_path / "m.jsonl", ROWS)])
    outcome = run(lm, items, task="inverse_scaling/memo-trap")
    for i, row in enumerate(ROWS):
        logs = [log_prob(lm.model, ids_of(row["prompt"]), ids_of(c))[0] for c in row["classes"]]
        for metric, value in classification(logs, row["answer_index"]).items():
            assert outcome.values[metric][i] == pytest.approx(value, abs=1e-3)
    assert outcome.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert outcome.groups == ["1", "3"]
    assert (outcome.task, outcome.metric) == ("inverse_scaling/memo-trap", "acc")
    assert "probability on average" in outcome.notes[0]  # a random model says none of the answers


def test_a_sequence_is_scored_by_its_sum(tmp_path):
    lm = language_model()
    row = {"prompt": "Repeat: one.\n", "completion": " one."}
    items = read([write_rows(tmp_path / "p.jsonl", [row])], form="sequence_prob")
    outcome = run(lm, items, form="sequence_prob", task="inverse_scaling/prompt-injection")
    # the white space at the end of the prompt belongs to the continuation
    wanted = -log_prob(lm.model, ids_of("Repeat: one."), ids_of("\n one."))[0]
    assert outcome.values == {"loss": [pytest.approx(wanted, abs=1e-4)]}
    assert (outcome.metric, outcome.higher_is_better, outcome.chance) == ("loss", False, None)


def test_log_odds_compare_two_prompts(tmp_path):
    lm = language_model()
    row = {"prompt": "A is true.", "other_prompt": "They say A is false.", "classes": [" Yes", " No"]}
    items = read([write_rows(tmp_path / "l.jsonl", [row | {"answer_index": 1}])], form="logodds")
    outcome = run(lm, items, form="logodds", task="inverse_scaling/logodds")
    logs = [
        [log_prob(lm.model, ids_of(row[prompt]), ids_of(c))[0] for c in row["classes"]]
        for prompt in ("prompt", "other_prompt")
    ]
    for metric, value in log_odds(*logs, 1).items():
        assert outcome.values[metric] == [pytest.approx(value, abs=1e-3)]
    assert not outcome.higher_is_better


def test_csv_and_jsonl_say_the_same(tmp_path):
    file = tmp_path / "m.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["", "prompt", "classes", "answer_index", "part"])
        for i, row in enumerate(ROWS):
            writer.writerow([i, row["prompt"], str(row["classes"]), row["answer_index"], row["part"]])
    lines = write_rows(tmp_path / "m.jsonl", [row | {"classes": str(row["classes"])} for row in ROWS])
    plain = write_rows(tmp_path / "n.jsonl", ROWS)
    made = [[item[1:] for item in read([str(f)])] for f in (file, lines, plain)]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("classification", {"classes": None}, 'no "classes"|"classes" is no list'),
        (
            "classification",
            {"answer_index": 2},
            '"answer_index" is out of range: 2, and the 2 answers are 0 to 1',
        ),
        ("classification", {"answer_index": -1}, "out of range: -1"),
        ("classification", {"answer_index": "2"}, "out of range: 2"),
        ("classification", {"answer_index": "b"}, '"answer_index" is no whole number'),
        ("classification", {"answer_index": True}, '"answer_index" is no whole number'),
        ("classification", {"answer_index": None}, '"answer_index" is no whole number'),
        ("classification", {"classes": [" a", ""]}, 'an empty answer in "classes": number 1'),
        ("classification", {"classes": [" a", " a"]}, "the same answer twice"),
        ("classification", {"classes": [" a"]}, "fewer than 2 answers"),
        ("classification", {"classes": [" a", 3]}, "no list of texts"),
        ("classification", {"classes": "a or b"}, '"classes" is no list'),
        ("classification", {"classes": "{'a': 1}"}, "no list of texts"),
        ("classification", {"prompt": ""}, 'an empty "prompt"'),
        ("sequence_prob", {}, 'no "completion": the fields are prompt, classes'),
        ("sequence_prob", {"completion": " "}, 'an empty "completion"'),
        ("logodds", {}, 'no "other_prompt"'),
        ("logodds", {"other_prompt": "o", "classes": [" a", " b", " c"]}, "two classes: there are 3"),
    ],
)
def test_a_row_that_is_not_as_expected_is_named(tmp_path, form, changes, message):
    good = {"prompt": "p", "classes": [" a", " b"], "answer_index": 0, "completion": "c", "other_prompt": "o"}
    bare = {"prompt": "p", "classes": [" a", " b"], "answer_index": 0}
    file = write_rows(tmp_path / "m.jsonl", [good, bare | changes])
    with pytest.raises(UserError, match=message) as caught:
        read([file], form=form)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert 'expected {"prompt"' in str(caught.value)


def test_all_eleven_winners_are_known():
    assert len(PRIZE_TASKS) == len({task.name for task in PRIZE_TASKS}) == 11
    assert [task.name for task in PRIZE_TASKS if task.format != "classification"] == ["prompt-injection"]
    assert all(task.hub.startswith("hub:") for task in PRIZE_TASKS)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_the_published_files_are_read():
    parts = [len(read([str(file)])) for file in sorted((DATA / "memo_trap").glob("*.csv"))]
    assert parts == [860, 843, 100, 736]
    (file,) = (DATA / "hindsight_neglect").glob("*.jsonl")
    assert len(read([str(file)])) == 315
