"""What is ranked: candidates of files and of policies, fixed when a session begins; tasks for other tools."""

import json

import pytest
from conftest import tiny_recipe

from rlhf.data.comparisons import Message
from rlhf.data.readers import read_comparisons
from rlhf.errors import UserError
from rlhf.rank.candidates import candidates
from rlhf.rank.export import argilla, label_studio
from rlhf.rank.session import Item

QUESTION = (Message("user", "Which?"),)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = (
    {"prompt": "one", "responses": ["a", "b", "a"]},
    {"prompt": [{"role": "user", "content": "two"}], "responses": ["c", "d"], "ranks": [0, 1]},
    {"prompt": "three", "chosen": "e", "rejected": "f"},
)


def test_candidates_of_files_are_fixed_when_the_session_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "rows.jsonl", *ROWS)
    made = candidates(tiny_recipe(f"rank.files={file}"))
    assert sorted(item.responses for item in made) == [("a", "b"), ("c", "d"), ("e", "f")]
    assert candidates(tiny_recipe(f"rank.files={file}", "rank.annotators=3", "rank.instructions=x")) == made
    assert len(candidates(tiny_recipe(f"rank.files={file}", "rank.prompts=2", "name=two"))) == 2
    write(tmp_path / "rows.jsonl", *ROWS[:2])
    with pytest.raises(UserError, match=r"began with other prompts .*rows\.jsonl.*answers are kept"):
        candidates(tiny_recipe(f"rank.files={file}"))
    write(tmp_path / "rows.jsonl", *ROWS)
    assert candidates(tiny_recipe(f"rank.files={file}")) == made
    with pytest.raises(UserError, match="other prompts"):
        candidates(tiny_recipe(f"rank.files={file}", "rank.prompts=2"))


def test_rows_may_say_who_wrote_and_a_text_that_stands_twice_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "q", "responses": ["b", "a", "b "], "writers": ["runs/x", "base", "base"]}
    (item,) = candidates(tiny_recipe(f"rank.files={write(tmp_path / 'rows.jsonl', row)}"))
    assert (item.responses, item.writers) == (("b", "a"), ("runs/x", "base"))


def test_damaged_candidates_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(f"rank.files={write(tmp_path / 'rows.jsonl', *ROWS)}")
    made = candidates(recipe)
    file = tmp_path / "runs/tiny/rank/candidates.json"
    file.write_text(file.read_text().replace('"a"', '"x"'))
    with pytest.raises(UserError, match="is damaged"):
        candidates(recipe)
    file.unlink()
    assert candidates(recipe) == made


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "q", "responses": ["a"]}, "not 2 to 9 different responses"),
        ({"prompt": "q", "responses": ["a", "a "]}, "not 2 to 9 different responses"),
        ({"prompt": "q", "responses": list("abcdefghij")}, "not 2 to 9 different responses"),
        ({"prompt": "q", "responses": ["a", " "]}, "empty response"),
        ({"prompt": "q", "responses": ["a", 3]}, "not a list of strings"),
        ({"prompt": " ", "responses": ["a", "b"]}, "empty prompt"),
        ({"text": "q"}, "fields of no known format"),
    ],
)
def test_rows_that_cannot_be_ranked_are_named(tmp_path, monkeypatch, row, fault):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{fault}"):
        candidates(tiny_recipe(f"rank.files={write(tmp_path / 'rows.jsonl', row)}"))
    assert not (tmp_path / "runs/tiny/rank/candidates.json").exists()


def test_responses_are_sampled_from_the_base_and_from_policies(road, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(road / "models")
    policy = road / "runs/tiny/ppo/policy"
    options = ["rank.prompts=5", "rank.responses=3", f"rank.policies=[base, {policy}]"]
    made = candidates(tiny_recipe(*options))
    assert 1 <= len(made) <= 5
    assert {writer for item in made for writer in item.writers} == {"base", str(policy)}
    assert all(2 <= len(set(item.responses)) <= 3 for item in made)
    assert candidates(tiny_recipe(*options)) == made
    for other in (
        "rank.temperature=0.5",
        "rank.responses=2",
        "rank.policies=[base]",
        "dialogue.max_response_tokens=4",
    ):
        with pytest.raises(UserError, match="other prompts or responses"):
            candidates(tiny_recipe(*options, other))
    (tmp_path / "runs/tiny/rank/candidates.json").unlink()
    assert candidates(tiny_recipe(*options)) == made


# ---------------------------------------------------------------- other tools

MANY = [
    Item(
        "i", (Message("system", "Be kind."), Message("user", "Q?")), ("good", "middling", "bad"), ("w",) * 3
    ),
    Item("j", QUESTION, ("good", "bad"), ("w",) * 2),
]
QUALITY = ["good", "middling", "bad"]


def test_tasks_for_label_studio_come_back_as_comparisons(tmp_path):
    tasks = label_studio(MANY)
    assert "writers" not in json.dumps(tasks)
    for task in tasks:  # as its export has them: the ids, the best first
        order = sorted(task["data"]["items"], key=lambda x: QUALITY.index(x["body"]))
        value = {"ranker": {"rank": [x["id"] for x in order]}}
        task["annotations"] = [{"result": [{"type": "ranker", "from_name": "rank", "value": value}]}]
    file = tmp_path / "export.json"
    file.write_text(json.dumps(tasks))
    found, _ = read_comparisons([str(file)], on_bad_rows="stop")
    check(found)


def test_records_for_argilla_come_back_as_comparisons(tmp_path):
    sets = argilla(MANY, "Rank them.")
    assert [len(one["questions"][0]["values"]) for one in sets] == [2, 3]
    rows = []
    for record in (record for one in sets for record in one["records"]):
        names = sorted((n for n in record if n != "prompt"), key=lambda n: QUALITY.index(record[n]))
        value = [{"value": name, "rank": place} for place, name in enumerate(names, 1)]
        rows.append({"fields": record, "responses": {"ranking": [{"value": value, "status": "submitted"}]}})
    found, _ = read_comparisons([write(tmp_path / "export.jsonl", *rows)], on_bad_rows="stop")
    check(found[::-1])


def check(found):
    assert [c.prompt for c in found] == [item.prompt for item in MANY]
    for comparison, item in zip(found, MANY, strict=True):
        order = [x for _, x in sorted(zip(comparison.ranks, comparison.responses, strict=True))]
        assert order == list(item.responses)
