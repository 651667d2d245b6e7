"""Lists and objects in the cells of a .csv are read as in a .jsonl; texts that look like them stay texts."""

import csv
import json

import pytest
from source_rows import bot, chat, dropped, jsonl, read, refusal, user
from test_rlhf_public_formats import DIALOGUE, H2, H3, PKU, TABLE, WEBGPT, Q

from rlhf.data.demonstrations import read_demonstrations

TWO = [{"response": "a", "overall_score": 6.5}, {"response": "it's", "overall_score": 3}]
VOTES = [{"strength": 1}, {"strength": -2}, {"strength": -3}]
MESSAGES = {"chosen": chat(user("q\nr"), bot("a")), "rejected": chat(user("q\nr"), bot('"b"'))}
STYLES = {"id": 8, **Q, "chosen": ["a", "it's", "c"], "rejected": ["x", "y", "z"]}


def numpy_of(value):
    """As numpy prints an array: no commas between what it holds."""
    return "[" + "\n ".join(map(repr, value)) + "]" if isinstance(value, list) else str(value)


def table(path, *rows, write=json.dumps):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {name: write(x) if isinstance(x, list | dict) else x for name, x in row.items()} for row in rows
        )
    return str(path)


@pytest.mark.parametrize("write", [json.dumps, repr, numpy_of])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "completions": TWO},
        {**Q, "answers": [{"answer": "a", "rank": 2}, {"answer": "b", "rank": 1}]},
        {"prompt": "q\nr", "prompt_id": "x", **MESSAGES, "messages": MESSAGES["chosen"], "score_chosen": 3},
        STYLES,
        {**STYLES, "rejected": ["x"], "subset": "Math", "num_correct": 1},
        {**H3, "overall_preference": 1, "individual_preference": [{"score": 1}, {"score": 2}, {"score": -1}]},
        {**H2, "preference_strength": -1, "all_preferences_unprocessed": VOTES},
        {**WEBGPT, "score_0": 0.5, "score_1": -0.5},
        {**DIALOGUE, "winner": "model_b"},
        {**TABLE, "prompt": ["q"], "response_a": ["a"], "response_b": ["b"], "winner_model_b": 1},
        {"question_id": "x", **Q, "response_1": "a", "response_2": "b", "scores": [True, False]},
        {**Q, "response_a": "a", "response_b": "b", "votes": ["a", "b", "a"]},
        {**Q, "answer1": "a", "answer2": "b", "comparison": {"selected": "left"}},
        {**Q, "responses": ["a", "b"], "grades": [[5, 4, 3], [4, 4, 1]]},
        {**Q, "responses": ["a", "b", "c"], "ranks": [1, 0, 1]},
    ],
    ids=lambda row: "+".join(row)[:40],
)
def test_a_cell_that_is_a_list_is_read_as_one(row, write, tmp_path):
    expected, _ = read(jsonl(tmp_path / "x.jsonl", row))
    assert read(table(tmp_path / "x.csv", row, write=write))[0] == expected


@pytest.mark.parametrize("text", ["[1, 2]", '["a", "b"]', '{"name": "Bob"}', "[sic]", '["a", "b", "c"]'])
def test_a_text_that_looks_like_a_list_stays_a_text(text, tmp_path):
    rows = [{"id": 1, **Q, "chosen": a, "rejected": b} for a, b in (("a", "b"), (text, '["x", "y", "z"]'))]
    found, _ = read(table(tmp_path / "x.csv", *rows))
    assert [c.responses for c in found] == [("a", "b"), (text, '["x", "y", "z"]')]
    (one,), _ = read(table(tmp_path / "y.csv", {**PKU, "response_0": text}))
    assert one.responses == (text, "b")
    (one,), _ = read(table(tmp_path / "z.csv", {**Q, "completion": text}), reader=read_demonstrations)
    assert one.response == text


@pytest.mark.parametrize(
    ("name", "cell", "reason"),
    [
        ("completions", "[{'r': 'a'} ... {'r': 'b'}]", "a list that cannot be read: completions"),
        ("completions", '[{"response": "a"', "a list that cannot be read: completions"),
        ("prompt", "[{'role': 'user', 'content': 'q", "a list that cannot be read: prompt"),
        ("chosen", "[{'role': 'user', 'content': array(['q'])}]", "messages that cannot be read: chosen"),
    ],
)
def test_a_list_that_is_cut_off_is_a_bad_row(name, cell, reason, tmp_path):
    row = {"instruction": "q", name: cell} | ({"rejected": cell} if name == "chosen" else {})
    path = table(tmp_path / "x.csv", row)
    assert refusal(path).startswith(f"{path}:2: {reason}")


def test_the_first_row_of_a_suite_decides_for_all(tmp_path):
    path = table(tmp_path / "x.csv", STYLES, {**STYLES, "chosen": '["a", "b"'})
    assert refusal(path).startswith(f"{path}:3: chosen and rejected are not both lists of texts")
    found, counts = read(path, on_bad_rows="skip")
    assert (len(found), sum(dropped(counts).values())) == (9, 1)
