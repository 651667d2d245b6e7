"""Rows as Label Studio and Argilla export them: which question is read, who wins, what is refused."""

import pytest
from source_rows import dropped, jsonl, one, read, refusal, user

from rlhf.data.comparisons import Comparison

Q, TWO = {"prompt": "q"}, {"response_1": "a", "response_2": "b"}
FIRST, SECOND = (0, 1), (1, 0)
TASK = {"id": 1, "data": {**Q, "answer1": "a", "answer2": "b"}}
ROW = {"prompt": "q", **TWO, "id": "x", "status": "completed"}


def chose(*words, question="best"):
    value = [{"type": "choices", "from_name": question, "value": {"choices": [word]}} for word in words]
    return [{"result": [x]} for x in value]


def hub(name, *values, status=None, users=None):
    state = status or ["submitted"] * len(values)
    people = users or [f"u{n}" for n in range(len(values))]
    return {f"{name}.responses": list(values), f"{name}.responses.users": people} | {
        f"{name}.responses.status": state
    }


def said(**questions):
    """A user's answers as Argilla 1 has them in a record."""
    values = {name.replace("_", "-"): {"value": value} for name, value in questions.items()}
    return {"values": values, "status": "submitted"}


def fields(*answers, **more):
    return {"fields": {**Q, **TWO, **more}, "responses": list(answers)}


ROWS = [  # row, ranks, confidence
    ({**TASK, "annotations": chose("left", "Right", "left")}, FIRST, 2 / 3),
    ({**TASK, "annotations": chose("Response 2")}, SECOND, None),
    ({**TASK, "annotations": chose("B")}, SECOND, None),
    ({**TASK, "annotations": [*chose("bad", question="quality"), *chose("answer1")]}, FIRST, None),
    ({"id": 1, "data": {**Q, "response_0": "a", "response_1": "b"}, "annotations": chose("Response 1")},
     SECOND, None),
    ({**ROW, **hub("preference", "response_2")}, SECOND, None),
    ({**ROW, **hub("preference", "response_2", "response_2", "response_1")}, SECOND, 2 / 3),
    ({**ROW, **hub("preference", "response_2", "response_1", status=["discarded", "done"])}, FIRST, None),
    ({**ROW, **hub("preference", "response_2", "response_1", status=["draft", "submitted"])}, FIRST, None),
    ({**ROW, **hub("comment", "I like a"), **hub("preference", "response_2")}, SECOND, None),
    ({**ROW, **hub("order", ["response_2", "response_1"])}, SECOND, None),
    ({**ROW, **hub("harm", ["violent", "rude"]), **hub("preference", "response_2")}, SECOND, None),
    ({**ROW, **hub("quality_response_1", 2, 5), **hub("quality_response_2", 3, 1)}, FIRST, 0.5),
    ({**ROW, **hub("r-1", 1, 5, users=["u", "v"]), **hub("r-2", 9, 2, users=["w", "v"])}, FIRST, None),
    ({**ROW, "order": [{"user_id": "u", "status": "submitted",
                        "value": {"rank": [2, 1], "value": ["response-1", "response-2"]}}],
      "order-suggestion": None}, SECOND, None),
    (fields(said(order={"rank": [2, 1], "value": ["response_1", "response_2"]})), SECOND, None),
    (fields(said(rating_1=1, rating_2=2)), SECOND, None),
    (fields(said(comment="well", best="response_2"), said(best="response_2")), SECOND, 1.0),
    (fields(said(quality=1, best="Response 2")), SECOND, None),
    (fields(said(best="response_3"), response_3="c"), (1, 1, 0), None),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_the_question_about_the_responses_is_read(tmp_path, number):
    row, ranks, confidence = ROWS[number]
    texts = ("a", "b", "c")[: len(ranks)]
    assert one(tmp_path, row) == Comparison((user("q"),), texts, ranks, "file", pytest.approx(confidence))


REFUSED = [
    ({**TASK, "annotations": chose("fluent")}, "no result names a response: results are choices (fluent); "),
    ({**TASK, "annotations": [{"result": [{"type": "textarea", "value": {"text": ["x"]}}]}]},
     "no result names a response: results are textarea; read are pairwise, ranker, and choices such as left"),
    ({**ROW, **hub("comment", "x"), **hub("quality", 5)},
     "no question names a response: questions are comment, quality"),
    ({**ROW, **hub("preference", "neither of them")}, "the verdict names no side: value is 'neither of "),
    ({**ROW, **hub("order", ["response_2"])}, "a ranking does not name every response once"),
    ({**ROW, **hub("order", "x", users=["u", "v"])}, "not as many users or statuses as answers: order"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_names_no_response_is_named(tmp_path, number):
    row, reason = REFUSED[number]
    path = jsonl(tmp_path / "x.jsonl", row)
    assert refusal(path).startswith(f"{path}:1: {reason}")


def test_rows_that_nobody_has_answered_are_counted(tmp_path):
    empty = {f"preference.responses{x}": None for x in ("", ".users", ".status")}
    waiting = {**ROW, "best": [], "best-suggestion": "response_1"}
    task = {**TASK, "annotations": [{"result": []}]}
    path = jsonl(tmp_path / "x.jsonl", {**ROW, **empty}, {**ROW, **hub("best", "response_1")}, waiting, task)
    found, counts = read(path)
    assert (len(found), dropped(counts)) == (1, {"no votes": 3})
    assert set(counts.unused) == {"id", "status"}
