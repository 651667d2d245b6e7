"""Work that was done is not done again, and work for other settings never passes for it."""

import json

import pytest
from conftest import tiny_recipe

from rlhf.runs.artifacts import read_jsonl, write_jsonl
from rlhf.runs.cache import remember
from rlhf.runs.stage import open_stage


def never():
    raise AssertionError("computed again")


def test_a_value_is_computed_once_a_key(tmp_path):
    assert remember(tmp_path, "a--b/c", {"seed": 1}, lambda: {"x": (1.0, "ä")}) == {"x": [1.0, "ä"]}
    assert remember(tmp_path, "a--b/c", {"seed": 2}, lambda: None) is None
    assert remember(tmp_path, "a--b/c", None, lambda: 3) == 3
    assert remember(tmp_path, "a--b", {"seed": 1}, lambda: 4) == 4
    assert remember(tmp_path, "a--b/c", {"seed": 1}, never) == {"x": [1.0, "ä"]}  # they lie side by side
    assert remember(tmp_path, "a--b/c", {"seed": 2}, never) is None
    assert json.loads((tmp_path / "a--b-c.json").read_text())["value"] == 3


FLIPPED = "one bit flipped"


@pytest.mark.parametrize("key", [{"seed": 1}, None])
@pytest.mark.parametrize("damage", [b'{"key": {"seed": 1}, "val', b"\xff", b"[1]", b"{}", b"5", FLIPPED])
def test_a_damaged_value_is_computed_again(tmp_path, damage, key):
    remember(tmp_path, "a", key, lambda: [0.25, "text"])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b"0.25", b"0.35") if damage is FLIPPED else damage)
    assert remember(tmp_path, "a", key, lambda: 6) == 6
    assert remember(tmp_path, "a", key, never) == 6


def test_the_main_process_alone_writes(tmp_path):
    assert remember(tmp_path, "a", None, lambda: 5, is_main=False, on_new=never) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_stage_keeps_its_values_in_parts_and_the_time_they_took(inside):
    run = open_stage(tiny_recipe(), "comparisons")
    assert run.remember("a", lambda: [0.1]) == [0.1]
    assert run.remember("a", never) == [0.1]
    assert json.loads((run.folder / "parts" / "a.json").read_text())["value"] == [0.1]
    assert (run.folder / "clock.json").is_file()


def test_json_lines_come_back_with_any_line_separator_in_a_text(tmp_path):
    rows = [{"a": "ä\u2028\x85\r\n"}, [1], "b"]
    write_jsonl(tmp_path / "x" / "rows.jsonl", iter(rows))
    assert read_jsonl(tmp_path / "x" / "rows.jsonl") == rows
