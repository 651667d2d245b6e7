"""Columns, roles and line ends of other tools: read as they are meant, or refused by their names."""

import json
from pathlib import Path

import pytest
from source_rows import HH, NATIVE, REMEDY, TRL, bot, chat, jsonl, one, read, refusal, user
from test_rlhf_sources import fake_hub

from rlhf.data.comparisons import Comparison, Counts, Message, write_native
from rlhf.data.prompts import read_prompts
from rlhf.data.readers.native import read_native
from rlhf.data.stored import write_prompts
from rlhf.errors import UserError
from rlhf.runs.artifacts import read_jsonl
from rlhf.runs.stage import input_hashes
from rlhf.training.metrics import read_metrics

Q, KIND = user("q"), Message("system", "Be kind.")
ANSWERS = {
    "chosen": "To cook it, boil",
    "rejected": "To cook it, no",
}  # with a beginning to guess a prompt from
EMPTY = {"input": "", "context": None, "history": []}
ASKED, ANSWER = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
FROM_VALUE = {"chosen": [ASKED, ANSWER], "rejected": [ASKED, {"from": "gpt", "value": "b"}]}
ONE_MESSAGE = {"chosen": ANSWER, "rejected": {"from": "gpt", "value": "b"}}
PARTS = {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]}
CRLF = {side: text.replace("\n", "\r\n") for side, text in HH.items()}
HH_TURNS = (user("Hi"), bot("Hello"), user("Joke?"))


def named(user_role, bot_role):
    return {
        side: [{"role": user_role, "content": "q"}, {"role": bot_role, "content": text}]
        for side, text in (("chosen", "a"), ("rejected", "b"))
    }


GOOD = [  # row, prompt, answers; columns that are not used
    *(({name: "q", **ANSWERS}, (Q,), None) for name in ("question", "query", "instruction", "input")),
    *(({name: "q", **ANSWERS}, (Q,), None) for name in ("context", "problem", "user", "Question", "PROMPT")),
    ({"prompt": None, "question": "q", **ANSWERS}, (Q,), None),
    ({"prompt": "", "question": "q", **ANSWERS}, (Q,), None),
    ({"question": "q", **EMPTY, **ANSWERS}, (Q,), None),
    ({"instruction": "q", "input": "r", **ANSWERS}, (user("q\n\nr"),), None),
    ({"system": "Be kind.", "question": "q", **ANSWERS}, (KIND, Q), None),
    ({"system": "Be kind.", "instruction": "q", "input": "r", **ANSWERS}, (KIND, user("q\n\nr")), None),
    ({"system": " ", "question": "q", **ANSWERS}, (Q,), None),
    ({"messages": chat(Q), **ANSWERS}, (Q,), None),
    ({"question": "\n\nHuman: q\n\nAssistant:", **ANSWERS}, (Q,), None),
    ({"question": "q", "chosen": chat(bot("a")), "rejected": chat(bot("b"))}, (Q,), "a b"),
    # an explicit prompt is the prompt, whatever else is there, and whole conversations have their own
    ({"prompt": "q", "question": "r", "system": "Be kind.", **ANSWERS}, (Q,), None),
    ({"question": "r", "chosen": chat(Q, bot("a")), "rejected": chat(Q, bot("b"))}, (Q,), "a b"),
    ({"question": "r", **HH}, HH_TURNS, "Knock knock|No"),
    # labels do not hide that the answers begin with the prompt
    ({**ANSWERS, "id": "x", "chosen_model": "m", "score_chosen": "7"}, (user("To cook it,"),), " boil| no"),
    ({**ANSWERS, "seconds": "3.5", "n": 3, "tags": ["a"]}, (user("To cook it,"),), " boil| no"),
    # roles and fields of other tools
    *((named(*roles), (Q,), "a b") for roles in (("Human", "Assistant"), ("USER", "gpt"), ("human", "bot"))),
    (FROM_VALUE, (Q,), "a b"),
    ({"conversations": [ASKED], **ONE_MESSAGE}, (Q,), "a b"),
    ({"conversations": [ASKED], "system": "Be kind.", **ONE_MESSAGE}, (KIND, Q), "a b"),
    ({"chosen": [PARTS, *chat(bot("a"))], "rejected": [PARTS, *chat(bot("b"))]}, (user("q?"),), "a b"),
    (CRLF, HH_TURNS, "Knock knock|No"),
    ({"chosen": CRLF["chosen"], "rejected": HH["rejected"]}, HH_TURNS, "Knock knock|No"),
    ({"prompt": "\r\n\r\nHuman: q\r\n\r\nAssistant:", "chosen": " a", "rejected": " b"}, (Q,), "a b"),
    ({side: text.replace("Hi", "Hi\r\n\r\nyou") for side, text in HH.items()},
     (user("Hi\r\n\r\nyou"), *HH_TURNS[1:]), "Knock knock|No"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_a_row_of_another_tool_is_read_as_it_is_meant(tmp_path, number):
    row, prompt, answers = GOOD[number]
    texts = ANSWERS.values() if answers is None else answers.split("|" if "|" in answers else " ")
    assert one(tmp_path, row) == Comparison(prompt, tuple(texts), (0, 1), "file")
    found, _ = read(jsonl(tmp_path / "p.jsonl", row), reader=read_prompts)
    assert found == [prompt]


NO_CONTENT = "a message without text in role and content: in "
OTHER = "no prompt, but other text: rename the column of the prompt ("
SEVERAL = "the prompt can be in several columns: "
IMAGE = [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image"}]}]
CALL = [{"role": "assistant", "content": None, "tool_calls": [{}]}]
CHATS = named("user", "assistant")
TYPES = "chosen and rejected are not both texts, or both messages: a "
BAD = [
    ({**ANSWERS, "prompt": None}, "the prompt is null"),
    ({**ANSWERS, "title": "q", "id": "x"}, OTHER + "'title'?) to prompt"),
    ({**ANSWERS, "text": "q", "prompt": None, "post": "q"}, OTHER + "'post', 'text'?) to prompt"),
    ({**ANSWERS, "system": "Be kind."}, OTHER + "'system'?) to prompt"),
    ({**ANSWERS, "\ud800": "q"}, OTHER + "'\\ud800'?) to prompt"),
    ({**ANSWERS, "question": "q", "context": "r"}, SEVERAL + "question, context; rename one of"),
    ({**ANSWERS, "instruction": "q", "history": [["a", "b"]]}, SEVERAL + "instruction, history"),
    ({**ANSWERS, "history": [["a", "b"]]}, NO_CONTENT + '"history", message 1: a list'),
    ({**TRL, "chosen": None}, "chosen is null"),
    ({**TRL, "rejected": None}, "rejected is null"),
    ({**TRL, "chosen": None, "rejected": None}, "chosen and rejected are null"),
    ({**TRL, "chosen": 3}, TYPES + "int and a str"),
    ({**TRL, "rejected": chat(bot("a"))}, TYPES + "str and a list"),
    (named("user", "tool"), "one of the two conversations does not end in an assistant turn"),
    (named("function", "assistant"), "unknown role 'function' (known: system, user, assistant)"),
    ({**CHATS, "chosen": ["a"]}, NO_CONTENT + '"chosen", message 1: a str'),
    ({**CHATS, "chosen": [*chat(Q), *CALL]}, NO_CONTENT + '"chosen", message 2: content is null'),
    ({**CHATS, "chosen": IMAGE}, NO_CONTENT + '"chosen", message 1: content has parts that'),
    ({**CHATS, "chosen": [{"role": [1]}]}, NO_CONTENT + '"chosen", message 1: role is a list'),
    ({**NATIVE, "source": "\ud800"}, "text that is not valid Unicode (a lone surrogate)"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_an_unclear_row_is_refused_in_words_that_say_why_or_counted(tmp_path, number):
    row, message = BAD[number]
    path = jsonl(tmp_path / "a.jsonl", TRL, row)
    stopped = refusal(path)
    assert stopped.startswith(f"{path}:2: {message}")
    assert stopped.endswith(REMEDY)
    found, counts = read(path, on_bad_rows="skip")
    assert (len(found), counts.read, sum(counts.dropped.values())) == (1, 2, 1)


def test_columns_that_are_not_used_are_counted_and_named_in_the_line(tmp_path):
    scored = {**TRL, "margin": 0.5, "score_chosen": 7, "note": ""}
    rows = [scored, {**scored, "prompt": "Grass is", "margin": None, "a\nb\ud800": 1}]
    _, counts = read(jsonl(tmp_path / "a.jsonl", *rows))
    assert counts.unused == {"margin": 1, "score_chosen": 2, "a b\\ud800": 1}
    line = "; columns not used (in rows): margin (1), score_chosen (2), a b\\ud800 (1)"
    assert str(counts) == "read 2, kept 2, dropped 0" + line
    assert counts.as_dict()["unused"] == counts.unused
    _, counts = read(jsonl(tmp_path / "b.jsonl", TRL, HH))
    assert "unused" not in counts.as_dict()
    _, counts = read(jsonl(tmp_path / "c.jsonl", *({**TRL, f"column {n}": n + 1} for n in range(100))))
    assert len(counts.unused) == 20


# --- lines end at \n only --------------------------------------------------------------------------------

ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj"


def test_what_unicode_calls_a_line_end_stays_inside_a_text(tmp_path):
    row = {"prompt": f"q{ENDS}", "chosen": f"a{ENDS}", "rejected": f"b{ENDS}"}
    path = tmp_path / "a.jsonl"
    path.write_bytes((json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(TRL) + "\n").encode())
    comparisons, counts = read(str(path))
    assert counts.read == 2
    assert comparisons[0] == Comparison((user(f"q{ENDS}"),), (f"a{ENDS}", f"b{ENDS}"), (0, 1), "a")
    write_native(tmp_path / "native.jsonl", comparisons)
    assert read_native(tmp_path / "native.jsonl", "stop", Counts()) == comparisons
    write_prompts(tmp_path / "prompts.jsonl", [comparisons[0].prompt])
    assert read_jsonl(tmp_path / "prompts.jsonl") == [{"messages": chat(user(f"q{ENDS}"))}]
    lines = tmp_path / "a.txt"
    lines.write_bytes(f"q{ENDS}\nr\n".encode())
    assert read(str(lines), reader=read_prompts)[0] == [(user(f"q{ENDS}"),), (user("r"),)]
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 1, "text": "a\u2028b"}\n'.encode())
    assert read_metrics(tmp_path) == [{"step": 1, "text": "a\u2028b"}]


# --- one line for what cannot be read --------------------------------------------------------------------


def test_a_row_of_the_hub_that_its_library_cannot_read_is_one_line(monkeypatch):
    def rows(*_, **__):
        yield TRL
        raise ValueError("cannot cast\na list")

    fake_hub(monkeypatch, rows)
    assert refusal("hub:org/name") == (
        "hub:org/name: row 2: cannot be read (ValueError: cannot cast); "
        "download the set, mend it and give local files"
    )


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path):
    name = str(tmp_path / "a\udcff.jsonl")
    try:
        jsonl(Path(name), TRL)
    except OSError:
        pytest.skip("this file system takes names of UTF-8 only")
    with pytest.raises(UserError, match=r"the name of the file '.*a\\udcff.jsonl' is not UTF-8: rename it"):
        input_hashes([str(tmp_path / "*.jsonl")])
