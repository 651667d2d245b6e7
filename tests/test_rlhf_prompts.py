"""Prompts from texts, messages, and comparisons of every known format."""

import gzip
import json

import pytest
from conftest import DATA

from rlhf.data.comparisons import Message
from rlhf.data.prompts import read_prompts
from rlhf.errors import UserError

REMEDY = "; set data.on_bad_rows=skip to leave such rows out and count them"


def user(text):
    return Message("user", text)


def chat(*turns):
    return [{"role": message.role, "content": message.content} for message in turns]


HELLO = (Message("system", "be kind"), user("hi"), Message("assistant", "hello"), user("joke?"))
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: joke?\n\nAssistant: "


def jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def read(*specs, on_bad_rows="stop", **options):
    return read_prompts(specs, on_bad_rows=on_bad_rows, **options)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "id": 3}, (user("q"),)),
        ({"prompt": chat(*HELLO)}, HELLO),
        ({"messages": chat(*HELLO)}, HELLO),
        ({"messages": chat(*HELLO, Message("assistant", "knock knock"))}, HELLO),
        ({"prompt": HH}, HELLO[1:]),
        ({"chosen": HH + "a", "rejected": HH + "b"}, HELLO[1:]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, (user("q"),)),
        ({"prompt": chat(*HELLO), "responses": ["a", "b"], "ranks": [0, 1]}, HELLO),
    ],
)
def test_every_form_of_a_row_gives_its_prompt(tmp_path, row, prompt):
    prompts, counts = read(jsonl(tmp_path / "a.jsonl", row))
    assert prompts == [prompt]
    assert counts.read == counts.kept == 1


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("\ufefffirst one\r\n\nHuman: is a word\n\nça va?".encode()))
    assert read(str(path))[0] == [(user("first one"),), (user("Human: is a word"),), (user("ça va?"),)]


def test_repeated_prompts_are_removed_across_files_and_counted(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", {"prompt": "q"}, {"prompt": "r"}, {"prompt": "q "})
    second = jsonl(tmp_path / "b.jsonl", {"messages": chat(user("r"))}, {"prompt": "s"})
    prompts, counts = read(first, second)
    assert prompts == [(user("q"),), (user("r"),), (user("s"),)]
    assert counts.as_dict() == {
        "read": 5,
        "kept": 3,
        "dropped": {"duplicate prompt": 2},
        "duplicate_responses": 0,
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON: "),
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": []}, "empty prompt"),
        ({"messages": chat(Message("assistant", "a"))}, "empty prompt"),
        ({"prompt": chat(user("q"), Message("assistant", "a"))}, "the prompt does not end in a user turn"),
        (
            {"messages": chat(Message("bot", "a"), user("q"))},
            "unknown role 'bot' (known: system, user, assistant)",
        ),
        ({"messages": "q"}, 'messages are not a list: "messages" is a str'),
        ({"messages": [{"role": "user"}]}, 'a message without text in role and content: in "messages"'),
        ({"prompt": 3}, "fields of no known format: prompt; expected one of: native "),
    ],
)
def test_a_bad_row_stops_with_its_line_or_is_skipped_and_counted(tmp_path, row, message):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "q"}, row, {"prompt": "r"})
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert str(caught.value).endswith(REMEDY)
    prompts, counts = read(path, on_bad_rows="skip")
    assert len(prompts) == 2
    assert sum(counts.dropped.values()) == 1


def test_a_file_without_prompts_is_refused_in_both_modes(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"question": "q"})
    for mode in ("stop", "skip"):
        with pytest.raises(UserError, match=r"a\.jsonl:1: fields of no known format: question; "):
            read(path, on_bad_rows=mode)


def test_nothing_left_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n")
    with pytest.raises(UserError, match=r"no usable prompt in .*a\.txt: read 0, kept 0, dropped 0"):
        read(str(path))


def test_the_key_of_the_recipe_is_in_the_message(tmp_path):
    with pytest.raises(UserError, match=r"^data\.prompts: the pattern"):
        read(str(tmp_path / "*.txt"))
    with pytest.raises(UserError, match=r"^data\.held_out_prompts: the pattern"):
        read(str(tmp_path / "*.txt"), key="data.held_out_prompts")


@pytest.mark.parametrize(("name", "number", "repeated"), [("helpful", 2354, 0), ("harmless", 2312, 2)])
def test_hh_files_serve_as_prompts(name, number, repeated):
    path = DATA / "hh" / f"{name}-base-test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the real data set {path} is not on this machine")
    prompts, counts = read(str(path))
    assert (counts.read, len(prompts)) == (number, number - repeated)
    assert all(prompt[-1].role == "user" for prompt in prompts)
