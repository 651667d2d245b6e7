"""Each public format becomes comparisons; each kind of bad input is named with its place."""

import csv
import gzip
import json
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.comparisons import Comparison, Message, problem
from rlhf.errors import UserError
from rlhf.sources import read_comparisons
from rlhf.sources.rows import BadRow
from rlhf.sources.trl import parse as parse_trl

DATA = Path(__file__).parents[2] / "shared" / "data"
REMEDY = "; set data.on_bad_rows=skip to leave such rows out and count them"
TRL = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Joke?\n\nAssistant: Knock knock",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Joke?\n\nAssistant: No",
}
NATIVE = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 0, 1], "source": "me", "confidence": 0.5}


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the real data set {path} is not on this machine")
    return str(path)


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


# --- formats ---------------------------------------------------------------------------------------------


def test_a_native_row_is_taken_as_it_is(tmp_path):
    assert one(tmp_path, NATIVE) == Comparison((user("q"),), ("a", "b", "c"), (1, 0, 1), "me", 0.5)


def test_an_hh_pair_shares_the_dialogue_before_the_last_answer(tmp_path):
    assert one(tmp_path, HH) == Comparison(
        (user("Hi"), bot("Hello"), user("Joke?")), ("Knock knock", "No"), (0, 1), "file"
    )


def test_a_second_assistant_marker_is_a_paragraph_of_the_same_turn(tmp_path):
    row = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant: e\n\nAssistant: f",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant: g",
    }
    comparison = one(tmp_path, row)
    assert comparison.prompt == (user("a"), bot("b\n\nc"), user("d"))
    assert comparison.responses == ("e\n\nf", "g")


def test_a_silent_turn_of_a_transcript_stays_silent(tmp_path):
    start = "\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: "
    comparison = one(tmp_path, {"chosen": start + "c", "rejected": start + "d"})
    assert comparison.prompt == (user("a"), bot(""), user("b"))


def test_a_speaker_name_inside_a_paragraph_is_text(tmp_path):
    start = "\n\nHuman: a\nAssistant: b  Human: c\n\nAssistant: "
    comparison = one(tmp_path, {"chosen": start + "Humans: d", "rejected": start + "e"})
    assert comparison.prompt == (user("a\nAssistant: b  Human: c"),)
    assert comparison.responses == ("Humans: d", "e")


def test_every_ranked_set_of_a_tree_is_one_comparison(tmp_path):
    def node(role, text, rank=None, replies=(), deleted=False):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies), "deleted": deleted}

    follow_up = node("prompter", "more", 0, [node("assistant", "x", 1), node("assistant", "y", 0)])
    best = node("assistant", "best", 0, [follow_up])
    gone = node("assistant", "gone", 2, [follow_up], deleted=True)
    worst = node("assistant", "worst", 3, [node("prompter", "lonely", None, [node("assistant", "z", 0)])])
    root = node("prompter", "root", None, [worst, best, gone, node("assistant", "unranked")])
    comparisons, counts = read(jsonl(tmp_path / "trees.jsonl", {"message_tree_id": "1", "prompt": root}))
    assert comparisons == [
        Comparison((user("root"),), ("worst", "best"), (1, 0), "trees"),
        Comparison((user("root"), bot("best"), user("more")), ("x", "y"), (1, 0), "trees"),
    ]
    assert counts.read == 2


@pytest.mark.parametrize(
    "row",
    [
        TRL,
        {"prompt": chat(user("The sky is")), "chosen": chat(bot(" blue.")), "rejected": chat(bot(" green."))},
        {
            "chosen": chat(user("The sky is"), bot(" blue.")),
            "rejected": chat(user("The sky is"), bot(" green.")),
        },
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {  # a text prompt next to whole conversations
            "prompt": "The sky is",
            "chosen": chat(user("The sky is"), bot(" blue.")),
            "rejected": chat(user("The sky is"), bot(" green.")),
            "score_chosen": 3.0,
        },
    ],
)
def test_the_forms_of_a_trl_row_say_the_same(tmp_path, row):
    assert one(tmp_path, row) == Comparison((user("The sky is"),), (" blue.", " green."), (0, 1), "file")


def test_a_trl_prompt_that_is_a_transcript_becomes_turns(tmp_path):
    row = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"}
    assert one(tmp_path, row) == Comparison((user("a"),), ("b", "c"), (0, 1), "file")


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_an_implicit_prompt_is_cut_before_white_space_and_loses_nothing(start, left, right):
    (comparison,) = parse_trl({"chosen": start + left, "rejected": start + right}, "s")
    prompt, (chosen, rejected) = comparison.prompt[0].content, comparison.responses
    assert (prompt + chosen, prompt + rejected) == (start + left, start + right)
    if prompt:
        assert not prompt[-1].isspace()
        assert chosen[0].isspace()
        assert rejected[0].isspace()
        assert chosen.strip()
        assert rejected.strip()


def test_an_implicit_prompt_is_as_long_as_it_can_be():
    (comparison,) = parse_trl({"chosen": "one two three four", "rejected": "one two thirty"}, "s")
    assert comparison.prompt == (user("one two"),)
    (comparison,) = parse_trl({"chosen": "one two", "rejected": "one two three"}, "s")
    assert comparison.responses == (" two", " two three")


# --- files -----------------------------------------------------------------------------------------------


def write_all_kinds(folder):
    """One TRL row as every kind of file, gzipped too."""
    import pyarrow
    from pyarrow import parquet

    jsonl(folder / "a.jsonl", "", TRL)
    (folder / "b.json").write_text(json.dumps([TRL]), encoding="utf-8-sig")
    (folder / "c.json").write_text(json.dumps({"version": 1, "data": [TRL]}))
    (folder / "d.json").write_text(json.dumps({"examples": [TRL]}))
    with (folder / "e.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, TRL)
        writer.writeheader()
        writer.writerow(TRL)
    parquet.write_table(pyarrow.Table.from_pylist([TRL]), folder / "f.parquet")
    for path in list(folder.iterdir()):
        (folder / (path.name + ".gz")).write_bytes(gzip.compress(path.read_bytes()))
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_the_same_row(tmp_path):
    files = write_all_kinds(tmp_path)
    assert len(files) == 12
    for path in files:
        (comparison,), _ = read(str(path))
        expected = Comparison((user("The sky is"),), (" blue.", " green."), (0, 1), path.name.split(".")[0])
        assert comparison == expected, path


def test_a_glob_is_read_in_the_order_of_names_and_duplicates_across_files_go(tmp_path):
    jsonl(tmp_path / "b.jsonl", HH, NATIVE)
    jsonl(tmp_path / "a.jsonl", TRL, HH)
    comparisons, counts = read(str(tmp_path / "*.jsonl"))
    assert [c.source for c in comparisons] == ["a", "a", "me"]
    assert counts.as_dict() == {
        "read": 4,
        "kept": 3,
        "dropped": {"duplicate comparison": 1},
        "duplicate_responses": 0,
    }


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path):
    assert len(read(jsonl(tmp_path / "a[1].jsonl", TRL))[0]) == 1


def test_a_missing_file_an_unmatched_pattern_and_a_directory_are_named(tmp_path):
    assert refusal(str(tmp_path / "no.jsonl")) == f"{tmp_path}/no.jsonl: no such file"
    pattern = f"{tmp_path}/*.jsonl"
    assert refusal(pattern) == f"data.comparisons: the pattern '{pattern}' matches no file"
    assert refusal(str(tmp_path)).startswith(f"{tmp_path} is a directory: name its files")
    assert refusal().startswith("data.comparisons names no file")


def test_an_unknown_ending_is_named(tmp_path):
    path = tmp_path / "a.xlsx"
    path.touch()
    assert refusal(str(path)).startswith(f"{path}: unknown kind of file; known: .jsonl, .json, .csv")


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        path = tmp_path / name
        path.write_bytes(b'{"a": 1}\n\xff\xfe\n' if name == "a.jsonl" else b"a\n\xff\n")
        message = f"{path}:2: not UTF-8 text (invalid start byte); save it as UTF-8"
        assert refusal(str(path), on_bad_rows="skip") == message
    path = tmp_path / "a.json"
    path.write_bytes(b"[\xff]")
    assert refusal(str(path)).startswith(f"{path}: not UTF-8 text")


def test_a_truncated_archive_is_named(tmp_path):
    whole = gzip.compress("".join(json.dumps({**TRL, "prompt": str(n)}) + "\n" for n in range(5)).encode())
    for name in ("a.jsonl.gz", "a.json.gz"):
        path = tmp_path / name
        path.write_bytes(whole[:-12])
        assert refusal(str(path), on_bad_rows="skip").startswith(f"{path}: truncated or damaged gzip file")
    path.write_bytes(b"this is no archive")
    assert refusal(str(path)).startswith(f"{path}: truncated or damaged gzip file")


def test_a_json_file_that_is_no_list_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"rows": []}')
    assert refusal(str(path)).startswith(f"{path}: expected a list of rows")
    path.write_text('[\n{"a": 1},\n{"a" 2}]')
    assert refusal(str(path)) == f"{path}:3: not valid JSON: Expecting ':' delimiter"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert refusal(str(path)) == (
        f"{path}:2: not valid JSON: Extra data; a file with one object a line is named .jsonl"
    )


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR2")
    assert refusal(str(path)).startswith(f"{path}: not a readable parquet file")


def test_a_csv_row_is_numbered_by_the_line_on_which_it_starts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen,rejected\n"two\nlines",x,y\nq,x\nr,"x""y",z\n')
    assert refusal(str(path)) == (f"{path}:4: not as many cells as the header: 2 instead of 3" + REMEDY)
    comparisons, counts = read(str(path), on_bad_rows="skip")
    assert [c.prompt[0].content for c in comparisons] == ["two\nlines", "r"]
    assert comparisons[1].responses == ('x"y', "z")
    assert counts.dropped == {"not as many cells as the header": 1}


def test_a_very_long_cell_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\nq," + "x" * 200_000 + ",y\n")
    assert len(read(str(path))[0][0].responses[0]) == 200_000


# --- bad rows --------------------------------------------------------------------------------------------

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
    "native prompt": ({**NATIVE, "prompt": 1}, 'messages are not a list: "prompt" is a int'),
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


def test_unsure_comparisons_are_left_out_on_request(tmp_path):
    rows = [{**TRL, "prompt": str(c), "confidence": c} for c in (0.2, "0.9", None)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert len(read(path)[0]) == 3
    comparisons, counts = read(path, min_confidence=0.5)
    assert [c.confidence for c in comparisons] == [0.9, None]
    assert counts.dropped == {"confidence under 0.5": 1}


def test_a_bad_row_tells_reason_and_detail_apart():
    assert (str(BadRow("a", "b")), BadRow("a", "b").reason, str(BadRow("a"))) == ("a: b", "a", "a")


# --- the hub ---------------------------------------------------------------------------------------------


def fake_hub(monkeypatch, load_dataset):
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("spec", "call"),
    [
        ("hub:org/name", ("org/name", None, "train")),
        ("hub:org/name:conf", ("org/name", "conf", "train")),
        ("hub:org/name@test", ("org/name", None, "test")),
        ("hub:org/name:conf@train[:10%]", ("org/name", "conf", "train[:10%]")),
    ],
)
def test_a_hub_spec_names_data_set_config_and_split(monkeypatch, spec, call):
    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return [TRL, {**TRL, "chosen": ""}]

    fake_hub(monkeypatch, load_dataset)
    (comparison,), _ = read(spec, on_bad_rows="skip")
    assert calls == [call]
    assert comparison.source == "name"
    assert refusal(spec) == f"{spec}: row 2: empty response" + REMEDY


def test_a_hub_that_cannot_be_reached_gives_one_line_with_the_remedy(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto the hub")

    fake_hub(monkeypatch, load_dataset)
    assert refusal("hub:org/name") == (
        "hub:org/name: cannot be loaded from the hub (ConnectionError: no route); "
        "download it and give local files by data.comparisons=..."
    )
    assert "names no data set" in refusal("hub:")


# --- real data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "read_rows", "dropped"),
    [
        ("helpful", 2354, {"empty response": 4, "all responses are the same text": 2}),
        ("harmless", 2312, {"empty response": 4}),
    ],
)
def test_hh_test_files_are_read_but_for_the_pairs_that_say_nothing(name, read_rows, dropped):
    comparisons, counts = read(real(f"hh/{name}-base-test.jsonl.gz"), on_bad_rows="skip")
    assert counts.as_dict() == {
        "read": read_rows,
        "kept": read_rows - sum(dropped.values()),
        "dropped": dropped,
        "duplicate_responses": 0,
    }
    roles = {tuple(m.role for m in c.prompt) for c in comparisons}
    assert all(r == (("user", "assistant") * len(r))[: len(r)] for r in roles)
    assert not any("\n\nAssistant:" in text for c in comparisons for text in c.responses)


def test_the_100_oasst_trees_hold_212_ranked_sets():
    comparisons, counts = read(real("oasst/en_100_tree.jsonl"))
    assert counts.kept == counts.read == len(comparisons) == 212
    sizes = [len(c.responses) for c in comparisons]
    assert {k: sizes.count(k) for k in set(sizes)} == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    assert all(sorted(c.ranks) == list(range(len(c.ranks))) for c in comparisons)
    assert all(problem(c) is None for c in comparisons)
