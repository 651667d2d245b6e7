"""Each public format becomes comparisons, from each kind of file and from the hub."""

import csv
import gzip
import json
import sys
import types

import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from source_rows import HH, NATIVE, REMEDY, TRL, bot, chat, jsonl, one, read, refusal, user

from rlhf.data.comparisons import Comparison, problem
from rlhf.data.readers.trl import parse as parse_trl


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the real data set {path} is not on this machine")
    return str(path)


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


ROWS = "".join(json.dumps({**TRL, "prompt": str(n)}) + "\n" for n in range(5))
ZIPPED = gzip.compress(ROWS.encode(), mtime=0)  # the name of a test holds these bytes
NOT_UTF8 = "not UTF-8 text (invalid start byte); save it as UTF-8"
DAMAGED = ": truncated or damaged gzip file"
ONE_A_LINE = ":2: not valid JSON: Extra data; a file with one object a line is named .jsonl"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"", ": unknown kind of file; known: .jsonl, .json, .csv"),
        ("a.jsonl", b'{"a": 1}\n\xff\xfe\n', f":2: {NOT_UTF8}"),
        ("a.csv", b"a\n\xff\n", f":2: {NOT_UTF8}"),
        ("a.json", b"[\xff]", f": {NOT_UTF8}"),
        ("a.jsonl.gz", ZIPPED[:-12], DAMAGED),
        ("a.json.gz", ZIPPED[:-12], DAMAGED),
        ("a.json.gz", b"this is no archive", DAMAGED),
        ("a.json", b'{"rows": []}', ": expected a list of rows"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}]', ":3: not valid JSON: Expecting ':' delimiter"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', ONE_A_LINE),
        ("a.parquet", b"PAR2", ": not a readable parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert refusal(str(tmp_path / name), on_bad_rows="skip").startswith(f"{tmp_path / name}{message}")


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
        ("hub:org/name/some/part@test", ("org/name", None, "test", "some/part")),
    ],
)
def test_a_hub_spec_names_data_set_config_and_split(monkeypatch, spec, call):
    calls = []

    def load_dataset(name, config, *, split, **folder):
        calls.append((name, config, split, *folder.values()))
        assert set(folder) <= {"data_dir"}
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
