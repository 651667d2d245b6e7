"""Chats of every known form become a prompt and an answer; what cannot be used is named with its line."""

import json

import pytest

from rlhf.data.comparisons import Comparison, Message
from rlhf.data.demonstrations import Demonstration, best_of, read_demonstrations
from rlhf.errors import UserError

HI = (Message("user", "hi"),)
USER, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def read(folder, *rows, on_bad_rows="stop", name="a.jsonl"):
    file = folder / name
    text = json.dumps(list(rows)) if name.endswith("json") else "".join(json.dumps(r) + "\n" for r in rows)
    file.write_text(text)
    return read_demonstrations([str(file)], on_bad_rows=on_bad_rows)


FORMS = {
    "messages": {"messages": [USER, SAID]},
    "further columns": {"prompt": "hi", "messages": [USER, SAID], "score": 3},
    "empty columns": {"messages": None, "prompt": "hi", "completion": "ho"},
    "texts": {"prompt": "hi", "completion": "ho"},
    "conversation": {"prompt": [USER], "completion": [SAID]},
    "text and messages": {"prompt": "hi", "completion": [SAID]},
    "transcript": {"prompt": "\n\nHuman: hi\n\nAssistant:", "completion": " ho"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    "roles under another name": {"conversations": [USER, SAID]},
    "hh": {"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    "trl": {"prompt": "hi", "chosen": "ho", "rejected": "no"},
    "native": {"prompt": "hi", "responses": ["no", "ho"], "ranks": [1, 0]},
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("form", FORMS)
def test_every_known_form_is_a_prompt_and_an_answer(form, name, tmp_path):
    found, counts = read(tmp_path, FORMS[form], name=name)
    assert [(d.prompt, d.response) for d in found] == [(HI, "ho")]
    assert (counts.read, counts.kept) == (1, 1)


def test_a_parquet_file_holds_chats_too(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"messages": [USER, SAID]}, {"messages": [USER, SAID, USER, SAID]}])
    parquet.write_table(table, tmp_path / "a.parquet")
    found, _ = read_demonstrations([str(tmp_path / "a.parquet")], on_bad_rows="stop")
    assert [len(d.prompt) for d in found] == [1, 3]


def test_a_longer_chat_keeps_its_turns_and_joins_those_of_one_speaker(tmp_path):
    system = {"role": "system", "content": "be brief"}
    (found,), _ = read(tmp_path, {"messages": [system, USER, SAID, USER, USER, SAID, SAID]})
    roles = [message.role for message in found.prompt]
    assert roles == ["system", "user", "assistant", "user"]
    assert found.prompt[-1].content == "hi\n\nhi"
    assert found.response == "ho\n\nho"


def test_the_best_response_of_a_comparison_is_taken_and_all_that_are_tied_with_it():
    comparison = Comparison(HI, ("a", "b", "c", "d"), (1, 0, 2, 0), "x")
    assert best_of(comparison) == [Demonstration(HI, "b", "x"), Demonstration(HI, "d", "x")]


def test_repeats_are_counted_and_the_first_one_stays(tmp_path):
    rows = [{"prompt": "hi", "completion": c} for c in ("ho", " ho ", "ha")]
    found, counts = read(tmp_path, *rows)
    assert [d.response for d in found] == ["ho", "ha"]
    assert counts.dropped == {"duplicate demonstration": 1}


BAD = {
    "no answer": ({"messages": [USER]}, "the conversation does not end in an assistant turn"),
    "nothing": ({"messages": []}, "the conversation does not end in an assistant turn"),
    "no list": ({"messages": "hi"}, "messages are not a list"),
    "no content": ({"messages": [{"role": "user"}]}, "a message without text in role and content"),
    "pictures": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, SAID]}, "a message without"),
    "a tool": ({"messages": [{"role": "tool", "content": "x"}, SAID]}, "unknown role 'tool'"),
    "an empty answer": ({"prompt": "hi", "completion": "  "}, "empty response"),
    "an empty prompt": ({"prompt": "", "completion": "ho"}, "empty prompt"),
    "a number": ({"prompt": "hi", "completion": 3}, "the completion is neither a text nor messages"),
    "another number": ({"prompt": 3, "completion": "ho"}, "the prompt is neither a text nor messages"),
    "half a character": ({"prompt": "hi", "completion": "\ud800"}, "text that is not valid Unicode"),
    "no turns": ({"conversations": [{"from": "human"}]}, "a message without text in role and content"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_stops_with_its_line_or_is_skipped_and_counted(kind, tmp_path):
    row, reason = BAD[kind]
    good = {"prompt": "q", "completion": "a"}
    with pytest.raises(UserError) as caught:
        read(tmp_path, good, row)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:2: {reason}")
    assert "set data.on_bad_rows=skip" in str(caught.value)
    found, counts = read(tmp_path, good, row, on_bad_rows="skip")
    assert [d.response for d in found] == ["a"]
    assert sum(counts.dropped.values()) == 1


@pytest.mark.parametrize("on_bad_rows", ["stop", "skip"])
def test_a_file_of_another_kind_is_refused_with_the_fields_that_are_expected(on_bad_rows, tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, {"text": "x"}, on_bad_rows=on_bad_rows)
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}/a.jsonl:1: fields of no known format: text; expected one of: chats"
    )
    for field in ('"messages"', '"prompt", "completion"', '"conversations"', "native", "TRL"):
        assert field in message


def test_files_of_which_nothing_is_left_are_refused(tmp_path):
    with pytest.raises(UserError, match="no usable demonstration in"):
        read(tmp_path, {"prompt": "hi", "completion": " "}, on_bad_rows="skip")
