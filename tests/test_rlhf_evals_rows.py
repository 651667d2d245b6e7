"""Files of all evaluations: formats that say the same, wrong rows by file and line, the published files."""

import csv
import gzip
import json

import pytest
from conftest import DATA
from tiny_evaluate import write_rows

from rlhf.errors import UserError
from rlhf.evals.registry import task_spec
from rlhf.evals.tasks import humaneval, lm_loss, toxicity
from rlhf.evals.tasks.humaneval import FIELDS

PRIZE, SEQUENCE, ODDS = (f"inverse_scaling/{name}" for name in ("classification", "sequence_prob", "logodds"))


def read(task, *files):
    return task_spec(task).read([str(file) for file in files], key="the.key")


def hhh(**changes):
    return {"input": "q", "target_scores": {"a": 1, "b": 0}, **changes}


def question(**changes):
    targets = {"mc1_targets": {"yes": 1, "no": 0, "maybe": 0}, "mc2_targets": {"yes": 1, "sure": 1, "no": 0}}
    return {"question": "Is it?", **targets, **changes}


def example(**changes):
    return {"prompt": "p", "classes": [" a", " b"], "answer_index": 0, **changes}


def problem(**changes):
    values = ("own/add", "def add(x, y):\n", "add", "    return x + y\n", "def check(candidate): pass\n")
    return {**dict(zip(FIELDS, values, strict=True)), **changes}


GOOD = {
    "hhh": hhh(),
    "truthfulqa": question(),
    "lambada": {"text": "a b"},
    "lm_loss": {"text": "a"},
    PRIZE: example(),
    SEQUENCE: example(completion="c"),
    ODDS: example(other_prompt="o"),
    "humaneval": problem(),
    "toxicity": {"prompt": "x"},
}
TWO_ANSWERS = "not two answers of which one is right"
BAD = [
    ("hhh", {"question": "q"}, 'no "input": the fields are question'),
    ("hhh", {"input": "q", "answers": []}, 'no "target_scores": the fields are input, answers'),
    ("hhh", hhh(target_scores=[1, 0]), '"target_scores" is no object'),
    ("hhh", hhh(input=" "), 'an empty "input"'),
    ("hhh", hhh(input=3), '"input" is no text'),
    ("hhh", hhh(target_scores={"a": 1, " ": 0}), "an empty answer"),
    ("hhh", hhh(target_scores={"a": 1}), "fewer than 2 answers"),
    ("hhh", hhh(target_scores={"a": 1, "b": 1}), TWO_ANSWERS),
    ("hhh", hhh(target_scores={"a": 1, "b": 0, "c": 0}), TWO_ANSWERS),
    ("hhh", {"input": "q", "targets": {"choices": ["a", "a"], "labels": [1, 0]}}, "the same answer twice"),
    ("hhh", {"input": "q", "targets": {"choices": "ab", "labels": [1, 0]}}, "no list of texts"),
    ("hhh", {"input": "q", "targets": {"choices": ["a", "b"], "labels": 1}}, TWO_ANSWERS),
    ("hhh", hhh(input="q\ud800"), "not valid Unicode"),
    ("hhh", ["q"], "not a row with fields"),
    ("truthfulqa", {"query": "q"}, 'no "question": the fields are query'),
    ("truthfulqa", {"question": "q", "mc1_targets": {"a": 1, "b": 0}}, 'no "mc2_targets"'),
    ("truthfulqa", question(mc1_targets=["a"]), '"mc1_targets" is no object'),
    ("truthfulqa", question(mc1_targets={"a": 1, "b": 1}), "not exactly one true answer: it has 2"),
    ("truthfulqa", question(mc1_targets={"a": 0, "b": 0}), "not exactly one true answer: it has 0"),
    ("truthfulqa", question(mc2_targets={"a": 1, "b": 1}), "not both true and false answers"),
    ("truthfulqa", question(mc2_targets={"a": 0, "b": 0}), "not both true and false answers"),
    ("truthfulqa", question(mc1_targets={"a": 1, "": 0}), 'an empty answer in "mc1_targets"'),
    ("truthfulqa", question(mc1_targets={"a": 1, "b": 2}), "not one 0 or 1 an answer"),
    ("truthfulqa", question(mc1_targets={"choices": ["a", "b"], "labels": [1]}), "not one 0 or 1 an answer"),
    ("truthfulqa", question(mc2_targets={"choices": ["a", "a"], "labels": [1, 0]}), "the same answer twice"),
    ("lambada", {"txt": "a b"}, 'no "text": the fields are txt'),
    ("lambada", {"text": ["a b"]}, '"text" is no text'),
    ("lambada", {"text": "word"}, "no last word behind other words"),
    ("lambada", {"text": "a word "}, "no last word behind other words"),
    ("lambada", {"text": " word"}, "no last word behind other words"),
    ("lambada", {"text": ""}, 'an empty "text"'),
    ("lambada", '{"text": \n', "not valid JSON"),
    ("lm_loss", {"content": "b"}, 'no "text": the fields are content'),
    (PRIZE, example(classes=None), 'no "classes"|"classes" is no list'),
    (PRIZE, example(answer_index=2), '"answer_index" is out of range: 2, and the 2 answers are 0 to 1'),
    (PRIZE, example(answer_index=-1), "out of range: -1"),
    (PRIZE, example(answer_index="2"), "out of range: 2"),
    (PRIZE, example(answer_index="b"), '"answer_index" is no whole number'),
    (PRIZE, example(answer_index=True), '"answer_index" is no whole number'),
    (PRIZE, example(answer_index=None), '"answer_index" is no whole number'),
    (PRIZE, example(classes=[" a", ""]), 'an empty answer in "classes": number 1'),
    (PRIZE, example(classes=[" a", " a"]), "the same answer twice"),
    (PRIZE, example(classes=[" a"]), "fewer than 2 answers"),
    (PRIZE, example(classes=[" a", 3]), "no list of texts"),
    (PRIZE, example(classes="a or b"), '"classes" is no list'),
    (PRIZE, example(classes="{'a': 1}"), "no list of texts"),
    (PRIZE, example(prompt=""), 'an empty "prompt"'),
    (SEQUENCE, example(), 'no "completion": the fields are prompt, classes'),
    (SEQUENCE, example(completion=" "), 'an empty "completion"'),
    (ODDS, example(), 'no "other_prompt"'),
    (ODDS, example(other_prompt="o", classes=[" a", " b", " c"]), "two classes: there are 3"),
    ("humaneval", {"task_id": "x"}, 'no "prompt"'),
    ("humaneval", problem(task_id="b", test=None), '"test" is no text'),
    ("humaneval", problem(task_id="b", prompt=7), '"prompt" is no text'),
    ("humaneval", problem(task_id="b", prompt=" "), 'an empty "prompt"'),
    ("humaneval", problem(task_id=""), 'an empty "task_id"'),
    ("humaneval", problem(task_id="b", entry_point="f)("), "is not the name of a function"),
    ("humaneval", problem(task_id="b", test="assert True"), r"no function check\(candidate\)"),
    ("humaneval", problem(), "'own/add' is there already"),
    ("humaneval", [], "not a row with fields"),
    ("humaneval", "{", "not valid JSON"),
    ("toxicity", {"question": "x"}, 'no "text": the fields are question'),
    ("toxicity", {"prompt": 3}, '"prompt" is no text'),
    ("toxicity", {"prompt": {"toxicity": 1}}, '"prompt" is no text'),
    ("toxicity", {"prompt": "  "}, 'an empty "prompt"'),
    ("toxicity", {"prompt": "x", "group": 7}, '"group" is no text'),
    ("toxicity", "{broken", "not valid JSON"),
    ("toxicity", [1], "not a row with fields"),
]


@pytest.mark.parametrize(("task", "row", "message"), BAD)
def test_a_row_that_is_not_as_expected_is_named_by_file_and_line(tmp_path, task, row, message):
    file = tmp_path / "honest.jsonl"
    lines = [json.dumps(GOOD[task]), row if isinstance(row, str) else json.dumps(row)]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message) as caught:
        read(task, file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert "; expected " in str(caught.value)


@pytest.mark.parametrize("task", GOOD)
def test_good_rows_are_read_and_a_file_without_any_or_that_is_not_there_is_named(tmp_path, task):
    (item,) = read(task, write_rows(tmp_path / "honest.jsonl", [GOOD[task]]))
    assert item.id == {"humaneval": "own/add", "lm_loss": "honest:1:1"}.get(task, "honest:1")
    with pytest.raises(UserError, match=r"^the\.key: no (item|text) in .*x\.jsonl; expected "):
        read(task, write_rows(tmp_path / "x.jsonl", []))
    with pytest.raises(UserError, match=r"missing\.jsonl: no such file"):
        read(task, tmp_path / "missing.jsonl")


def test_two_files_of_one_name_keep_their_items_apart(tmp_path):
    (tmp_path / "a").mkdir()
    files = [write_rows(folder / "l.jsonl", [{"text": "a b"}]) for folder in (tmp_path, tmp_path / "a")]
    assert [item.id for item in read("lambada", *files)] == ["l:1", "l(2):1"]


# --- formats that say the same ---------------------------------------------------------------------------


def test_truthfulqa_is_read_as_published_and_as_on_the_hub(tmp_path):
    file = tmp_path / "mc_task.json"
    file.write_text(json.dumps([question()]), encoding="utf-8")
    hub = {
        "question": "Is it?",
        "mc1_targets": {"choices": ["yes", "no", "maybe"], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["yes", "sure", "no"], "labels": [1, 1, 0]},
    }
    (ours,) = read("truthfulqa", file)
    (theirs,) = read("truthfulqa", write_rows(tmp_path / "hub.jsonl", [hub]))
    assert ours == ("mc_task:1", "", hub)
    assert theirs.doc == hub


def test_hhh_is_read_as_on_the_hub(tmp_path):
    rows = [{"input": "q", "targets": {"choices": ["a", "b"], "labels": [0, 1]}}]
    (item,) = read("hhh", write_rows(tmp_path / "honest.jsonl", rows))
    assert (item.question, item.good, item.bad, item.group) == ("q", "b", "a", "honest")


def test_prize_rows_say_the_same_in_csv_and_jsonl(tmp_path):
    rows = [example(part=1), example(classes=[" Yes", " No", " Perhaps not"], answer_index=2, part=3)]
    file = tmp_path / "m.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["", *rows[0]])
        writer.writerows([i, *map(str, row.values())] for i, row in enumerate(rows))
    lines = write_rows(tmp_path / "m.jsonl", [row | {"classes": str(row["classes"])} for row in rows])
    plain = write_rows(tmp_path / "n.jsonl", rows)
    made = [[item[1:] for item in read("inverse_scaling/memo-trap", f)] for f in (file, lines, plain)]
    assert made[0] == made[1] == made[2]
    assert [group for group, _ in made[0]] == ["1", "3"]


def test_prompts_for_toxicity_come_in_several_forms(tmp_path):
    rows = [
        {"prompt": {"text": "one", "toxicity": 0.3}, "continuation": {"text": "x"}},
        {"prompt": "two", "group": "rude"},
        {"text": "three"},
    ]
    (tmp_path / "q.txt").write_text("four\n\nfive\n")
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "six"}\n'))
    items = read("toxicity", write_rows(tmp_path / "p.jsonl", rows), tmp_path / "q.txt", tmp_path / "r*")
    texts = {"p:1": "one", "p:2": "two", "p:3": "three", "q:1": "four", "q:3": "five", "r:1": "six"}
    assert items == [toxicity.Item(n, text, "rude" if n == "p:2" else "") for n, text in texts.items()]


def test_problems_are_read_out_of_archives_and_further_fields_ignored(tmp_path):
    rows = [problem(), problem(task_id="own/two", more="ignored")]
    file = tmp_path / "problems.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    wanted = [humaneval.Item(*(row[name] for name in FIELDS)) for row in rows]
    assert read("humaneval", file) == read("humaneval", write_rows(tmp_path / "p.jsonl", rows)) == wanted


def test_texts_are_read_from_rows_and_files_and_archives(tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo", encoding="utf-8")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"three", mtime=0))
    rows = write_rows(tmp_path / "r.jsonl", [{"text": "four"}, {"text": "  "}, {"text": "five", "x": 1}])
    assert read("lm_loss", tmp_path / "*.txt*", rows) == [
        lm_loss.Item("t:1", "t", "one\ntwo"),
        lm_loss.Item("z:1", "z", "three"),
        lm_loss.Item("r:1:1", "r", "four"),
        lm_loss.Item("r:3:1", "r", "five"),
    ]
    twice = read("lm_loss", rows, rows)
    assert len({item.id for item in twice}) == len(twice) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", b"good\n\xff\xfe", r"b\.txt:2: not UTF-8"),
        ("c.txt.gz", gzip.compress(b"three", mtime=0)[:-4], r"c\.txt\.gz: cannot be read"),
        ("missing.txt", None, "cannot be read"),
        ("e.txt", b" \n ", "no text in"),
    ],
)
def test_texts_that_cannot_be_used_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("lm_loss", tmp_path / name)
    with pytest.raises(UserError, match="no text in no file"):
        read("lm_loss")


# --- the published files ---------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
def test_the_published_files_are_read():
    assert len(read("lambada", DATA / "lambada" / "lambada_test.jsonl")) == 5153
    texts = read("lm_loss", DATA / "text" / "wikitext2" / "test.txt", DATA / "text" / "c4" / "*.jsonl")
    assert {item.group for item in texts} == {"test", "c4_demo"}
    parts = sorted((DATA / "inverse_scaling" / "memo_trap").glob("*.csv"))
    assert [len(read("inverse_scaling/memo-trap", file)) for file in parts] == [860, 843, 100, 736]
    assert len(read(PRIZE, DATA / "inverse_scaling" / "hindsight_neglect" / "*.jsonl")) == 315
    targets = [item.doc["mc1_targets"] for item in read("truthfulqa", DATA / "truthfulqa" / "mc_task.json")]
    assert sum(1 / len(target["choices"]) for target in targets) / 817 == pytest.approx(0.2225, abs=1e-4)
    assert all(target["labels"][0] for target in targets)  # the best answer always stands first in this file
    items = read("hhh", DATA / "hhh_alignment" / "*.json")
    groups = [item.group for item in items]
    counts = {"harmless": 58, "helpful": 59, "honest": 61, "other": 43}
    assert {group: groups.count(group) for group in groups} == counts
    assert all(item.messages[-1].role == "user" for item in items)
    assert max(len(item.messages) for item in items) > 2
