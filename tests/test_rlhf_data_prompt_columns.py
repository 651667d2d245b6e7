"""Columns of prompts: read with them, stored by their keys, given to functions."""

import json

import pytest
from conftest import stage, tiny_recipe

from rlhf.collect import __main__ as collect
from rlhf.data.comparisons import Message, prompt_key
from rlhf.data.prompts import read_prompts
from rlhf.errors import UserError
from rlhf.models import prepare

ROWS = [
    {"prompt": "two and two", "answer": "4", "level": 1},
    {"prompt": [{"role": "user", "content": "a river"}], "answer": "Rhine"},
    {"prompt": "two and two", "answer": "four"},
]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "asked.jsonl"


def key(text):
    return prompt_key((Message("user", text),))


def test_the_columns_of_the_first_row_of_a_prompt_are_kept(file):
    kept = {}
    prompts, _ = read_prompts([file], on_bad_rows="stop", columns=["answer", "level"], kept=kept)
    assert len(prompts) == 2
    assert kept == {
        key("two and two"): {"answer": "4", "level": 1},
        key("a river"): {"answer": "Rhine", "level": None},
    }


def test_a_column_that_is_nowhere_is_refused(file):
    with pytest.raises(UserError, match=r"no row of asked\.jsonl \(data\.prompts\) has a column solution"):
        read_prompts([file], on_bad_rows="stop", columns=["solution"])
    with pytest.raises(UserError, match=r"prompt_columns are columns of data\.prompts, which names no file"):
        tiny_recipe("data.comparisons=a.jsonl", "data.prompts=[]", "data.prompt_columns=answer")


def test_the_lab_judges_with_the_columns_of_its_prompts(file, tmp_path):
    held_out = [{"prompt": f"number {i}", "answer": str(i)} for i in range(4)]
    (tmp_path / "asked_later.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (tmp_path / "own.py").write_text(
        "def right(completions, answer):\n"
        "    return [len(said) + 1000 * len(answer) for said, answer in zip(completions, answer)]\n"
    )
    stage(prepare.main)
    stage(
        collect.main, f"data.prompts={file}", "data.held_out_prompts=asked_later.jsonl",
        "data.prompt_columns=[answer]", "collect={prompts: 8, judge: own.py:right, noise: 0.0}",
    )  # fmt: skip
    folder = tmp_path / "runs/tiny/comparisons"
    rows = [json.loads(line) for line in (folder / "columns.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {key(t) for t in ("two and two", "a river")} | {
        key(f"number {i}") for i in range(4)
    }
    made = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert {row["source"] for row in made} == {"lab-own.py:right"}
    for row in made:
        lengths = [len(text) for text in row["responses"]]
        assert row["ranks"] == [sorted(set(lengths), reverse=True).index(n) for n in lengths]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "own.py" in manifest["fingerprint"]["inputs"]
