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

SHP = {
    "post_id": "x1",
    "domain": "askculinary_train",
    "history": "How do I salt water?",
    "c_root_id_A": "a",
    "human_ref_A": "With salt.",
    "human_ref_B": "Slowly.",
    "labels": 1,
    "score_A": 12,
    "score_B": 4,
    "created_at_utc_A": 200,
    "created_at_utc_B": 100,
    "seconds_difference": 100.0,
    "score_ratio": 3.0,
}


def user(text):
    return Message("user", text)


def bot(text):
    return Message("assistant", text)


def chat(*turns):
    return [{"role": message.role, "content": message.content} for message in turns]


def jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def read(*specs, reader=read_comparisons, on_bad_rows="stop", **options):
    return reader(specs, on_bad_rows=on_bad_rows, **options)


def one(tmp_path, row):
    (comparison,), counts = read(jsonl(tmp_path / "file.jsonl", row))
    assert counts.read == counts.kept == 1
    return comparison


def refusal(*specs, reading=read, **options):
    with pytest.raises(UserError) as caught:
        reading(*specs, **options)
    return str(caught.value)


def dropped(counts):
    assert counts.read == counts.kept + sum(counts.dropped.values())
    return counts.dropped


def comment(body, score=None, *replies, **more):
    return {"body": body, "score": score, "replies": list(replies), **more}


def hub(*answers, question="<p>q</p>"):
    return {"qid": 7, "question": question, "answers": list(answers), "date": "2020/1/1", "metadata": []}


def scored(number, text):
    return {"answer_id": 1, "author": "x", "pm_score": number, "selected": True, "text": text}
