"""Rows of every format, and short ways to read them, for the tests of the readers."""

import json

import pytest

from rlhf.data.comparisons import Message
from rlhf.data.readers import read_comparisons
from rlhf.errors import UserError

REMEDY = "; set data.on_bad_rows=skip to leave such rows out and count them"
TRL = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Joke?\n\nAssistant: Knock knock",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Joke?\n\nAssistant: No",
}
NATIVE = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 0, 1], "source": "me", "confidence": 0.5}


def user(text):
    return Message("user", text)


def bot(text):
    return Message("assistant", text)


def chat(*turns):
    return [{"role": message.role, "content": message.content} for message in turns]


def jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def read(*specs, on_bad_rows="stop", **options):
    return read_comparisons(specs, on_bad_rows=on_bad_rows, **options)


def one(tmp_path, row):
    (comparison,), counts = read(jsonl(tmp_path / "file.jsonl", row))
    assert counts.read == counts.kept == 1
    return comparison


def refusal(*specs, **options):
    with pytest.raises(UserError) as caught:
        read(*specs, **options)
    return str(caught.value)
