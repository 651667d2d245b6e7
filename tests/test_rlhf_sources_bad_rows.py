"""Each kind of bad row is named with its place, or left out and counted."""

import json

import pytest
from source_rows import HH, NATIVE, REMEDY, TRL, bot, chat, jsonl, read, refusal, user

from rlhf.data.comparisons import Message
from rlhf.data.readers.rows import BadRow

CHAT = {"prompt": chat(user("q")), "chosen": chat(bot("a")), "rejected": chat(bot("b"))}
TREE = {"prompt": {"text": "q", "role": "prompter", "replies": []}}
NO_SHARE = "do not share a prompt"
BAD_ROWS = {
    "not JSON": ('{"prompt": ', "not valid JSON: Expecting value at column 12"),
    "deep": ("[" * 100_000, "not valid JSON: "),
    "list": ([1], "not a row with fields: a list"),
    "unknown": ({"x": 1}, "fields of no known format: x; expected one of: native"),
    "hh other prompt": (
        {**HH, "rejected": "\n\nHuman: Yo\n\nAssistant: No"},
        "the two transcripts " + NO_SHARE,
    ),
    "hh human turn in an answer": (
        {**HH, "chosen": HH["chosen"] + "\n\nHuman: Who is there?\n\nAssistant: Me"},
        "the two transcripts " + NO_SHARE,
    ),
    "hh no answer": (
        {**HH, "chosen": "\n\nHuman: Hi"},
        "one of the two transcripts does not end in an assistant turn",
    ),
    "hh one side": ({**HH, "chosen": "Hi"}, "not a transcript of Human and Assistant turns"),
    "hh empty answer": (
        {**HH, "chosen": "\n\nHuman: Hi\n\nAssistant:", "rejected": "\n\nHuman: Hi\n\nAssistant: a"},
        "empty response",
    ),
    "trl nothing shared": ({"chosen": "a b", "rejected": "c d"}, "empty prompt"),
    "trl empty": ({**TRL, "chosen": " "}, "empty response"),
    "trl prompt type": ({**TRL, "prompt": 3}, "the prompt is neither a text nor messages: a int"),
    "trl chat prompt type": ({**CHAT, "prompt": 3}, "the prompt is neither a text nor messages: a int"),
    "trl chat parts": (
        {**CHAT, "chosen": [{"role": "assistant", "content": [{"type": "text"}]}]},
        'a message without text in role and content: in "chosen"',
    ),
    "trl chat no answer": (
        {**CHAT, "chosen": []},
        "one of the two conversations does not end in an assistant turn",
    ),
    "trl chat no share": (
        {"chosen": chat(user("q"), bot("a")), "rejected": chat(user("r"), bot("b"))},
        "the two conversations " + NO_SHARE,
    ),
    "trl chat other prompt": (
        {**CHAT, "chosen": chat(user("r"), bot("a")), "rejected": chat(user("r"), bot("b"))},
        "the prompt is not in the conversations",
    ),
    "trl role": (
        {**CHAT, "prompt": chat(Message("tool", "x"), user("q"))},
        "unknown role 'tool' (known: system, user, assistant)",
    ),
    "confidence": ({**TRL, "confidence": "high"}, "confidence is not a number: 'high'"),
    "confidence range": ({**TRL, "confidence": 2}, "confidence outside [0, 1]"),
    "native responses": ({**NATIVE, "responses": "ab"}, "responses are not a list of strings"),
    "native response": ({**NATIVE, "responses": ["a", "b", 3]}, "responses are not a list of strings"),
    "native ranks": ({**NATIVE, "ranks": 1}, "ranks are not a list"),
    "native source": ({**NATIVE, "source": 1}, "source is not a string"),
    "native prompt": ({**NATIVE, "prompt": 1}, "the prompt is neither a text nor messages: a int"),
    "native ties": (
        {**NATIVE, "ranks": [1, 1, 1]},
        "all responses are tied, which says nothing about preference",
    ),
    "native count": ({**NATIVE, "ranks": [0, 1]}, "the number of ranks is not the number of responses"),
    "native negative": ({**NATIVE, "ranks": [0, 1, -1]}, "a rank is not an integer >= 0"),
    "native one": ({**NATIVE, "responses": ["a"], "ranks": [0]}, "fewer than 2 responses"),
    "native end": (
        {**NATIVE, "prompt": chat(user("q"), bot("a"))},
        "the prompt does not end in a user turn",
    ),
    "tree role": (
        {"prompt": {**TREE["prompt"], "role": "x"}},
        "a message of the tree without text or without the role prompter or assistant",
    ),
    "tree replies": (
        {"prompt": {**TREE["prompt"], "replies": ["a"]}},
        "the replies of a message are not a list of messages",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_stops_with_its_line_or_is_skipped_and_counted(tmp_path, kind):
    row, message = BAD_ROWS[kind]
    path = jsonl(tmp_path / "a.jsonl", TRL, "", row, HH)
    stopped = refusal(path)
    assert stopped.startswith(f"{path}:3: {message}")
    assert stopped.endswith(REMEDY)
    comparisons, counts = read(path, on_bad_rows="skip")
    assert len(comparisons) == 2
    assert counts.read == 3
    assert sum(counts.dropped.values()) == 1
    (reason,) = counts.dropped
    assert reason in stopped


def test_a_row_of_a_json_list_is_numbered_as_a_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([TRL, {**TRL, "chosen": ""}]))
    assert refusal(str(path)) == f"{path}: row 2: empty response" + REMEDY


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_file_of_an_unknown_format_is_refused_even_when_bad_rows_are_skipped(tmp_path, mode):
    good = jsonl(tmp_path / "a.jsonl", TRL)
    path = jsonl(tmp_path / "b.jsonl", {"question": "q", "score": 1})
    message = refusal(good, path, on_bad_rows=mode)
    assert message.startswith(f"{path}:1: fields of no known format: question, score; expected one of: ")
    assert REMEDY not in message
    assert all(name in message for name in ("native", "HH", "TRL", "OpenAssistant"))


def test_one_bad_set_does_not_take_its_tree_along(tmp_path):
    def replies(*texts):
        return [{"role": "assistant", "text": t, "rank": i, "replies": []} for i, t in enumerate(texts)]

    good = {"role": "prompter", "text": "r", "replies": replies("c", "d")}
    best, worst = replies("a", " ")
    tree = {"prompt": {"role": "prompter", "text": "q", "replies": [{**best, "replies": [good]}, worst]}}
    comparisons, counts = read(jsonl(tmp_path / "a.jsonl", tree), on_bad_rows="skip")
    assert [c.prompt[-1].content for c in comparisons] == ["r"]
    assert counts.as_dict() == {
        "read": 2,
        "kept": 1,
        "dropped": {"empty response": 1},
        "duplicate_responses": 0,
    }


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {**TRL, "chosen": ""}, {**TRL, "rejected": " blue."})
    assert refusal(path, on_bad_rows="skip") == (
        f"no usable comparison in {path}: read 2, kept 0, dropped 2 "
        "(1 empty response; 1 all responses are the same text)"
    )


def test_a_bad_row_tells_reason_and_detail_apart():
    assert (str(BadRow("a", "b")), BadRow("a", "b").reason, str(BadRow("a"))) == ("a: b", "a", "a")
