"""Verdicts in other words and codings, scores of pairs, and rankings with a response that cannot be used."""

import pytest
from source_rows import NATIVE, dropped, jsonl, one, read, refusal
from test_rlhf_public_formats import H2, PANDA, PKU, Q

FIRST, SECOND = (0, 1), (1, 0)
XY = {"ask": "q", "x": "a", "y": "b", "pref": "y"}
NAMED = {"prompt": "ask", "response_a": "x", "response_b": "y", "winner": "pref"}
LLMBAR = {"input": "q", "output_1": "a", "output_2": "b"}
AB = {**Q, "response_a": "a", "response_b": "b"}


@pytest.mark.parametrize(
    ("row", "ranks"),
    [
        ({**PKU, "better_response_id": "1.0"}, SECOND),
        ({**PANDA, "annotator1": "1.0"}, FIRST),
        ({**LLMBAR, "label": " 2.0"}, SECOND),
        ({**AB, "score_a": "0.5", "score_b": 3}, SECOND),
        ({**AB, "rating_a": 5, "rating_b": 3}, FIRST),
        ({**AB, "winner": "a", "score_a": 1, "score_b": 3}, FIRST),
    ],
)
def test_a_verdict_is_read_as_csv_writes_it_and_scores_where_there_is_none(row, ranks, tmp_path):
    assert one(tmp_path, row).ranks == ranks


def test_equal_scores_of_a_pair_are_a_tie(tmp_path):
    rows = [{**AB, "score_a": 1, "score_b": score} for score in (1, 2)]
    assert dropped(read(jsonl(tmp_path / "x.jsonl", *rows))[1]) == {
        "a tie, which says nothing about preference": 1
    }


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize(
    ("row", "column", "good", "bad", "ends", "other"),
    [
        (LLMBAR, "label", 1, 0, "1 and 2, so that 1", "0 is the first and 1 the second"),
        (LLMBAR, "label", "1", "0.0", "1 and 2, so that 1", "0 is the first and 1 the second"),
        (PKU, "better_response_id", 1, 2, "0 and 1, so that 0", "1 is the first and 2 the second"),
        (H2, "votes", ["1"], ["2", "0"], "1 and 2, so that 1", "0 is the first and 1 the second"),
    ],
)
def test_a_number_that_is_no_column_refuses_the_file(row, column, good, bad, ends, other, mode, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {**row, column: good}, {**row, column: bad})
    message = refusal(path, on_bad_rows=mode)
    assert message.startswith(f"{path}:2: a verdict that no column has: {column} is ")
    assert f"the columns end in {ends} is the first; if {other}, say data.columns={{response_" in message
    zero_one = {"response_0": "output_1", "response_1": "output_2"}
    if row is LLMBAR:
        assert [c.ranks for c in read(path, columns=zero_one)[0]] == [SECOND, FIRST]


def test_prometheus_is_asked_by_the_instruction_that_its_responses_had(tmp_path):
    row = {"orig_response_A": "a", "orig_response_B": "b", "orig_preference": "B"}
    found = one(tmp_path, {**row, "instruction": "judge a and b", "orig_instruction": "q"})
    assert (found.prompt[0].content, found.ranks) == ("q", SECOND)
    assert ":1: no prompt: " in refusal(jsonl(tmp_path / "y.jsonl", {**row, "instruction": "judge"}))


@pytest.mark.parametrize(
    ("row", "columns", "ranks"),
    [
        (XY, NAMED, SECOND),
        ({**XY, "pref": " X "}, NAMED, FIRST),
        ({**XY, "pref": ["y", "y", "x"]}, NAMED, SECOND),
        ({**XY, "pref": "b"}, NAMED, SECOND),
        ({**Q, "A": "a", "b": "b", "w": "b"}, {"response_a": "b", "response_b": "A", "winner": "w"}, FIRST),
        ({"b": "q", "x": "a", "y": "b", "w": "b"}, {**NAMED, "prompt": "b", "winner": "w"}, SECOND),
    ],
)
def test_a_verdict_may_name_the_columns_of_the_file(row, columns, ranks, tmp_path):
    (found,), _ = read(jsonl(tmp_path / "x.jsonl", row), columns=columns)
    assert found.ranks == ranks


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        (["foo"], "{prompt: ..., chosen: ..., rejected: ...}"),
        (["prompts", "good", "reject"], "{prompt: ..., chosen: ..., rejected: ...}"),
        (["prompt", "reply_a", "reply_b", "winner"],
         "{prompt: ..., response_a: ..., response_b: ..., winner: ...}"),
        (["prompt", "reply_a", "reply_b", "score_a", "score_b"],
         "{prompt: ..., responses: [..., ...], scores: [..., ...]}"),
        (["prompt", "respond", "scored"], "{prompt: ..., response: ..., score: ...}"),
    ],
)  # fmt: skip
def test_the_hint_is_that_of_the_nearest_kind_of_file(fields, hint, tmp_path):
    assert f"named by data.columns={hint}, " in refusal(
        jsonl(tmp_path / "x.jsonl", dict.fromkeys(fields, "1"))
    )


def completions(*pairs):
    return {"instruction": "q", "completions": [{"response": r, "overall_score": s} for r, s in pairs]}


LISTED = {**NATIVE, "confidence": None}


@pytest.mark.parametrize(
    ("row", "responses", "ranks"),
    [
        ({**LISTED, "responses": ["a", " ", "c"], "ranks": [2, 0, 1]}, ("a", "c"), SECOND),
        ({**LISTED, "responses": ["a", None, "c"], "ranks": [2, 0, 1]}, ("a", "c"), SECOND),
        ({**LISTED, "responses": ["a", "\ud800", "c"], "ranks": [2, None, 1]}, ("a", "c"), SECOND),
        (completions(("a", 1), (None, None), ("c", 3)), ("a", "c"), SECOND),
        (
            {**Q, "answers": [{"answer": x, "rank": ord(x or " ")} for x in ("", "b", "c")]},
            ("b", "c"),
            FIRST,
        ),
        ({**Q, "responses": ["a", "b", ""], "scores": [1, 2, "-"]}, ("a", "b"), SECOND),
        ({**Q, "responses": ["a", "b", None], "votes": ["1", "1", "0", "1"]}, ("a", "b"), SECOND),
    ],
)
def test_an_unusable_response_of_many_is_left_out_and_counted(row, responses, ranks, tmp_path):
    (found,), counts = read(jsonl(tmp_path / "x.jsonl", row))
    assert (found.responses, found.ranks, counts.unusable_responses) == (responses, ranks, 1)
    assert "empty or invalid responses removed 1" in str(counts)
    assert counts.as_dict()["unusable_responses"] == 1


def test_what_is_left_without_unusable_responses_must_say_something(tmp_path):
    rows = [
        {**LISTED, "responses": texts, "ranks": [0, 1, 1]}
        for texts in (["a", "b", "c"], [" ", "b", "c"], [" ", "b", None])
    ]
    path = jsonl(tmp_path / "x.jsonl", *rows)
    assert refusal(path).startswith(f"{path}:3: empty response")
    _, counts = read(path, on_bad_rows="skip")
    assert dropped(counts) == {
        "only ties are left without empty or invalid responses": 1, "empty response": 1
    }  # fmt: skip
