"""Rows of every format as comparisons, prompts and demonstrations; bad ones are named or counted."""

import gzip
import json

import pytest
from conftest import DATA
from source_rows import (
    HH,
    NATIVE,
    REMEDY,
    SHP,
    TRL,
    bot,
    chat,
    comment,
    hub,
    jsonl,
    read,
    refusal,
    scored,
    user,
)

from rlhf.data.comparisons import Comparison, Message
from rlhf.data.demonstrations import Demonstration, best_of, read_demonstrations
from rlhf.data.prompts import read_prompts
from rlhf.data.readers.rows import BadRow

SYSTEM = Message("system", "be kind")
HELLO = (SYSTEM, user("hi"), bot("hello"), user("joke?"))
ASKED = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: joke?\n\nAssistant: "
HI, HO = user("hi"), bot("ho")


def prompts_of(*specs, **options):
    return read(*specs, reader=read_prompts, **options)


def demonstrations_of(*specs, **options):
    return read(*specs, reader=read_demonstrations, **options)


# --- prompts and demonstrations of every form ------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "id": 3}, (user("q"),)),
        ({"prompt": chat(*HELLO)}, HELLO),
        ({"messages": chat(*HELLO)}, HELLO),
        ({"messages": chat(*HELLO, bot("knock knock"))}, HELLO),
        ({"prompt": ASKED}, HELLO[1:]),
        ({"chosen": ASKED + "a", "rejected": ASKED + "b"}, HELLO[1:]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, (user("q"),)),
        ({"prompt": chat(*HELLO), "responses": ["a", "b"], "ranks": [0, 1]}, HELLO),
        (SHP, (user("How do I salt water?"),)),
        ({"title": "t", "comments": [comment("[deleted]"), comment("x", 1)]}, (user("t"),)),
    ],
)
def test_every_form_of_a_row_gives_its_prompt(tmp_path, row, prompt):
    prompts, counts = prompts_of(jsonl(tmp_path / "a.jsonl", row))
    assert prompts == [prompt]
    assert counts.read == counts.kept == 1


FORMS = {
    "messages": {"messages": chat(HI, HO)},
    "further columns": {"prompt": "hi", "messages": chat(HI, HO), "score": 3},
    "empty columns": {"messages": None, "prompt": "hi", "completion": "ho"},
    "texts": {"prompt": "hi", "completion": "ho"},
    "conversation": {"prompt": chat(HI), "completion": chat(HO)},
    "text and messages": {"prompt": "hi", "completion": chat(HO)},
    "transcript": {"prompt": "\n\nHuman: hi\n\nAssistant:", "completion": " ho"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    "roles under another name": {"conversations": chat(HI, HO)},
    "hh": {"chosen": "\n\nHuman: hi\n\nAssistant: ho", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    "trl": {"prompt": "hi", "chosen": "ho", "rejected": "no"},
    "native": {"prompt": "hi", "responses": ["no", "ho"], "ranks": [1, 0]},
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("form", FORMS)
def test_every_known_form_is_a_prompt_and_an_answer(form, name, tmp_path):
    (tmp_path / name).write_text(json.dumps(FORMS[form] if name == "a.jsonl" else [FORMS[form]]))
    found, counts = demonstrations_of(str(tmp_path / name))
    assert [(d.prompt, d.response) for d in found] == [((HI,), "ho")]
    assert (counts.read, counts.kept) == (1, 1)


def test_a_parquet_file_holds_chats_too(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"messages": chat(HI, HO)}, {"messages": chat(HI, HO, HI, HO)}])
    parquet.write_table(table, tmp_path / "a.parquet")
    found, _ = demonstrations_of(str(tmp_path / "a.parquet"))
    assert [len(d.prompt) for d in found] == [1, 3]


def test_a_longer_chat_keeps_its_turns_and_joins_those_of_one_speaker(tmp_path):
    turns = chat(SYSTEM, HI, HO, HI, HI, HO, HO)
    (found,), _ = demonstrations_of(jsonl(tmp_path / "a.jsonl", {"messages": turns}))
    assert found.prompt == (SYSTEM, HI, HO, user("hi\n\nhi"))
    assert found.response == "ho\n\nho"


def test_the_best_response_of_a_comparison_is_taken_and_all_that_are_tied_with_it():
    comparison = Comparison((HI,), ("a", "b", "c", "d"), (1, 0, 2, 0), "x")
    assert best_of(comparison) == [Demonstration((HI,), "b", "x"), Demonstration((HI,), "d", "x")]


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("\ufefffirst one\r\n\nHuman: is a word\n\nça va?".encode()))
    assert prompts_of(str(path))[0] == [(user("first one"),), (user("Human: is a word"),), (user("ça va?"),)]


def test_repeats_are_removed_across_files_and_counted(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", {"prompt": "q"}, {"prompt": "r"}, {"prompt": "q "})
    second = jsonl(tmp_path / "b.jsonl", {"messages": chat(user("r"))}, {"prompt": "s"})
    prompts, counts = prompts_of(first, second)
    assert prompts == [(user("q"),), (user("r"),), (user("s"),)]
    assert (counts.read, counts.kept, counts.dropped) == (5, 3, {"duplicate prompt": 2})
    answers = [{"prompt": "hi", "completion": c} for c in ("ho", " ho ", "ha")]
    found, counts = demonstrations_of(jsonl(tmp_path / "c.jsonl", *answers))
    assert [d.response for d in found] == ["ho", "ha"]
    assert counts.dropped == {"duplicate demonstration": 1}


@pytest.mark.parametrize(("name", "number", "repeated"), [("helpful", 2354, 0), ("harmless", 2312, 2)])
def test_hh_files_serve_as_prompts(name, number, repeated):
    path = DATA / "hh" / f"{name}-base-test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the real data set {path} is not on this machine")
    prompts, counts = prompts_of(str(path))
    assert (counts.read, len(prompts)) == (number, number - repeated)
    assert all(prompt[-1].role == "user" for prompt in prompts)


# --- bad rows --------------------------------------------------------------------------------------------

CHAT = {"prompt": chat(user("q")), "chosen": chat(bot("a")), "rejected": chat(bot("b"))}
TREE = {"text": "q", "role": "prompter", "replies": []}
NO_ANSWER, NO_SHARE = "does not end in an assistant turn", "do not share a prompt"
NO_PROMPT = "the prompt is neither a text nor messages: a int"
NO_SCORE = "the score of a comment is not a whole number: "
NO_LIST = "the replies of a comment are not a list of comments"
NO_CONTENT = "a message without text in role and content"
TWO = [comment("y", 1)]
COMPARISONS = [
    ('{"prompt": ', "not valid JSON: Expecting value at column 12"),
    ("[" * 100_000, "not valid JSON: "),
    ([1], "not a row with fields: a list"),
    ({"x": 1}, "fields of no known format: x; columns of comparisons "),
    ({**HH, "rejected": "\n\nHuman: Yo\n\nAssistant: No"}, f"the two transcripts {NO_SHARE}"),
    ({**HH, "chosen": HH["chosen"] + "\n\nHuman: Who?\n\nAssistant: Me"}, f"the two transcripts {NO_SHARE}"),
    ({**HH, "chosen": "\n\nHuman: Hi"}, f"one of the two transcripts {NO_ANSWER}"),
    ({**HH, "chosen": "Hi"}, "not a transcript of Human and Assistant turns"),
    ({"chosen": ASKED, "rejected": ASKED + "a"}, "empty response"),
    ({"chosen": "a b", "rejected": "c d"}, "empty prompt"),
    ({**TRL, "chosen": " "}, "empty response"),
    ({**TRL, "prompt": 3}, NO_PROMPT),
    ({**CHAT, "prompt": 3}, NO_PROMPT),
    (
        {**CHAT, "chosen": [{"role": "assistant", "content": [{"type": "text"}]}]},
        f'{NO_CONTENT}: in "chosen"',
    ),
    ({**CHAT, "chosen": []}, f"one of the two conversations {NO_ANSWER}"),
    ({"chosen": chat(HI, bot("a")), "rejected": chat(user("r"), HO)}, f"the two conversations {NO_SHARE}"),
    (
        {**CHAT, "chosen": chat(user("r"), bot("a")), "rejected": chat(user("r"), bot("b"))},
        "the prompt is not in the conversations",
    ),
    (
        {**CHAT, "prompt": chat(Message("tool", "x"), HI)},
        "unknown role 'tool' (known: system, user, assistant)",
    ),
    ({**TRL, "confidence": "high"}, "confidence is not a number: 'high'"),
    ({**TRL, "confidence": 2}, "confidence outside [0, 1]"),
    ({**NATIVE, "responses": "ab"}, "responses are not a list of strings"),
    ({**NATIVE, "responses": ["a", "b", 3]}, "responses are not a list of strings"),
    ({**NATIVE, "ranks": 1}, "ranks are not a list"),
    ({**NATIVE, "source": 1}, "source is not a string"),
    ({**NATIVE, "prompt": 1}, NO_PROMPT),
    ({**NATIVE, "ranks": [1, 1, 1]}, "all responses are tied, which says nothing about preference"),
    ({**NATIVE, "ranks": [0, 1]}, "the number of ranks is not the number of responses"),
    ({**NATIVE, "ranks": [0, 1, -1]}, "a rank is not an integer >= 0"),
    ({**NATIVE, "responses": ["a"], "ranks": [0]}, "fewer than 2 responses"),
    ({**NATIVE, "prompt": chat(HI, HO)}, "the prompt does not end in a user turn"),
    ({"prompt": {**TREE, "role": "x"}}, "a message of the tree without text or without the role prompter or"),
    ({"prompt": {**TREE, "replies": ["a"]}}, "the replies of a message are not a list of messages"),
    *(({**SHP, "labels": x}, f"labels is neither 0 nor 1: {x!r}") for x in (2, -1, None, "A", True, [1])),
    ({"title": "t", "selftext": 3, "comments": []}, "the text of a post is not a text: a int"),
    *(
        ({"title": "t", "comments": comments}, message)
        for comments, message in (
            ([comment("x", "9"), *TWO], f"{NO_SCORE}'9'"),
            ([comment("x", True), *TWO], f"{NO_SCORE}True"),
            ([comment(None, 2), *TWO], "a comment without text in body"),
            ([comment(" ", 2), *TWO], "empty response"),
            (["x", "y"], NO_LIST),
            ([{**comment("x", 2), "replies": {"a": 1}}], NO_LIST),
        )
    ),
    (hub(scored(None, "a"), scored(1, "b")), "an answer whose pm_score is not a number: None"),
    (hub(scored(True, "a"), scored(0, "b")), "an answer whose pm_score is not a number: True"),
    (hub({**scored(2, "a"), "text": 3}, scored(1, "b")), "the text of an answer is not a text: a int"),
    (hub(scored(2, ""), scored(1, "b")), "empty response"),
    (hub("a", "b"), "an answer is not a row with fields: a str"),
    (hub(question=3), "the question is not a text"),
]
PROMPTS = [
    ("{", "not valid JSON: "),
    ({"prompt": " "}, "empty prompt"),
    ({"prompt": []}, "empty prompt"),
    ({"messages": chat(bot("a"))}, "empty prompt"),
    ({"prompt": chat(HI, HO)}, "the prompt does not end in a user turn"),
    (
        {"messages": chat(Message("narrator", "a"), HI)},
        "unknown role 'narrator' (known: system, user, assistant)",
    ),
    ({"messages": "q"}, 'messages are not a list: "messages" is a str'),
    ({"messages": [{"role": "user"}]}, f'{NO_CONTENT}: in "messages"'),
    ({"prompt": 3}, "fields of no known format: prompt; nearest: "),
]
DEMONSTRATIONS = [
    ({"messages": chat(HI)}, f"the conversation {NO_ANSWER}"),
    ({"messages": []}, f"the conversation {NO_ANSWER}"),
    ({"messages": "hi"}, "messages are not a list"),
    ({"messages": [{"role": "user"}]}, NO_CONTENT),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *chat(HO)]}, NO_CONTENT),
    ({"messages": chat(Message("tool", "x"), HO)}, "unknown role 'tool'"),
    ({"prompt": "hi", "completion": "  "}, "empty response"),
    ({"prompt": "", "completion": "ho"}, "empty prompt"),
    ({"prompt": "hi", "completion": 3}, "the completion is neither a text nor messages"),
    ({"prompt": 3, "completion": "ho"}, "the prompt is neither a text nor messages"),
    ({"prompt": "hi", "completion": "\ud800"}, "text that is not valid Unicode"),
    ({"conversations": [{"from": "human"}]}, NO_CONTENT),
]
BAD = [
    *((read, row, message) for row, message in COMPARISONS),
    *((prompts_of, row, message) for row, message in PROMPTS),
    *((demonstrations_of, row, message) for row, message in DEMONSTRATIONS),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_row_stops_with_its_line_or_is_skipped_and_counted(tmp_path, number):
    reading, row, message = BAD[number]
    path = jsonl(tmp_path / "a.jsonl", TRL, "", row, HH)
    stopped = refusal(path, reading=reading)
    assert stopped.startswith(f"{path}:3: {message}")
    assert stopped.endswith(REMEDY)
    found, counts = reading(path, on_bad_rows="skip")
    assert len(found) == 2
    assert counts.read == 3
    ((reason, dropped),) = counts.dropped.items()
    assert dropped == 1
    assert reason in stopped


def test_a_row_of_a_json_list_is_numbered_as_a_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([TRL, {**TRL, "chosen": ""}]))
    assert refusal(str(path)) == f"{path}: row 2: empty response" + REMEDY


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("reading", [read, prompts_of, demonstrations_of])
def test_a_file_of_an_unknown_format_is_refused_even_when_bad_rows_are_skipped(tmp_path, reading, mode):
    good = jsonl(tmp_path / "a.jsonl", TRL)
    path = jsonl(tmp_path / "b.jsonl", {"history": "q", "human_ref_a": "x"})
    message = refusal(good, path, reading=reading, on_bad_rows=mode)
    assert message.startswith(
        f"{path}:1: fields of no known format: history, human_ref_a; nearest: Reddit: SHP "
    )
    assert "data.columns={prompt: " in message
    assert REMEDY not in message


def test_one_bad_set_does_not_take_its_tree_along(tmp_path):
    def replies(*texts):
        return [{"role": "assistant", "text": t, "rank": i, "replies": []} for i, t in enumerate(texts)]

    good = {"role": "prompter", "text": "r", "replies": replies("c", "d")}
    best, worst = replies("a", " ")
    tree = {"prompt": {**TREE, "replies": [{**best, "replies": [good]}, worst]}}
    comparisons, counts = read(jsonl(tmp_path / "a.jsonl", tree), on_bad_rows="skip")
    assert [c.prompt[-1].content for c in comparisons] == ["r"]
    assert (counts.read, counts.kept, counts.dropped) == (2, 1, {"empty response": 1})


@pytest.mark.parametrize(
    ("reading", "row", "dropped"),
    [
        (read, {**TRL, "rejected": " blue."}, "1 empty response; 1 all responses are the same text"),
        (prompts_of, {"prompt": []}, "2 empty prompt"),
        (demonstrations_of, {"prompt": "hi", "completion": ""}, "2 empty response"),
    ],
)
def test_nothing_left_is_an_error_that_says_why(tmp_path, reading, row, dropped):
    first = {"prompt": ""} if reading is prompts_of else {**TRL, "chosen": ""}
    path = jsonl(tmp_path / "a.jsonl", first, row)
    message = refusal(path, reading=reading, on_bad_rows="skip")
    assert message.startswith("no usable ")
    assert message.endswith(f" in {path}: read 2, kept 0, dropped 2 ({dropped})")


def test_the_key_of_the_recipe_is_in_the_message(tmp_path):
    pattern = str(tmp_path / "*.txt")
    assert refusal(pattern, reading=prompts_of).startswith("data.prompts: the pattern")
    message = refusal(pattern, reading=prompts_of, key="data.held_out_prompts")
    assert message.startswith("data.held_out_prompts: the pattern")
    assert refusal(pattern, reading=demonstrations_of).startswith("sft.data: the pattern")


def test_a_bad_row_tells_reason_and_detail_apart():
    assert (str(BadRow("a", "b")), BadRow("a", "b").reason, str(BadRow("a"))) == ("a: b", "a", "a")
