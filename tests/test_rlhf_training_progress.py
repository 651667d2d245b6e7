"""Bars: silent where work is short, on one process only, and with something to say where it is long."""

import re
import shutil

import pytest
from conftest import ROOT, tiny_recipe

from rlhf.runs.artifacts import read_json, write_manifest
from rlhf.runs.stage import ROAD, open_stage
from rlhf.training import progress as module
from rlhf.training.progress import progress


def go_through(**options):
    for _ in progress("probe", range(3), **options):
        pass


def test_short_work_says_nothing(capsys):
    go_through()
    assert capsys.readouterr() == ("", "")


def test_long_work_says_how_far_it_is_on_standard_output(capsys, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    monkeypatch.setattr(module, "_REFRESH_IN_FILES", 0.0)
    go_through()
    out, err = capsys.readouterr()
    assert "probe:  67%" in out
    assert re.search(r"2/3 \[\d\d:\d\d<\d\d:\d\d", out)  # how long it has taken, and what is left
    assert err == ""


@pytest.mark.parametrize(("rank", "silent"), [("0", False), ("1", True)])
def test_one_process_speaks_for_all(rank, silent, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    go_through(delay=0, leave=True)
    assert (capsys.readouterr().out == "") is silent


def test_a_file_gets_a_line_seldom(capsys):
    with progress("ppo", total=1000, delay=0, leave=True) as bar:
        for _ in range(1000):
            bar.update()
    assert capsys.readouterr().out.count("\r") <= 4


# --- what is left on the disk, for `make watch` ----------------------------------------------------------


def test_the_main_bar_of_a_stage_notes_how_far_it_is(inside, monkeypatch):
    monkeypatch.setattr(module, "_NOTED", 0.0)
    run = open_stage(tiny_recipe(), "ppo")
    note = run.folder / "progress.json"
    with progress("ppo", total=9, initial=4, leave=True, delay=0) as bar:
        bar.update(2)
        found = read_json(note)
        assert (found["what"], found["done"], found["total"], found["first"]) == ("ppo", 6, 9, 4)
        assert found["began"] <= found["at"]
        for _ in progress("a part", range(3)):
            pass
        assert read_json(note) == found
    run.finish({})
    assert not note.exists()
    for _ in progress("later", range(3), leave=True):
        pass
    assert not note.exists()


def test_a_note_that_cannot_be_written_ends_nothing(inside, monkeypatch):
    monkeypatch.setattr(module, "_NOTED", 0.0)
    run = open_stage(tiny_recipe(), "ppo")
    (run.folder / "progress.json").mkdir()
    for _ in progress("ppo", range(3), leave=True):
        pass
    shutil.rmtree(run.folder)
    for _ in progress("ppo", range(3), leave=True):
        pass
    assert not run.folder.exists()


def test_a_stage_of_the_whole_road_says_what_is_still_to_come(inside, capsys, monkeypatch):
    recipe = tiny_recipe("name=road")
    assert open_stage(recipe, "reward") is not None
    assert "stage" not in capsys.readouterr().out.partition("\n")[2]
    monkeypatch.setenv("WHOLE_ROAD", "1")
    made = inside / "runs/road/comparisons"
    made.mkdir()
    write_manifest(made, {"seconds": 90.0})
    open_stage(recipe, "ppo")
    told = "stage 3 of 5, those before took 1.5 min; still to come: card, evaluate\n"
    assert capsys.readouterr().out.endswith(told)
    open_stage(recipe, "evaluate_dpo")  # which is no part of it
    assert "still to come" not in capsys.readouterr().out
    open_stage(recipe, "evaluate")
    assert capsys.readouterr().out.endswith("; still to come: the report\n")


def test_the_road_is_that_of_make_rlhf():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rule = makefile.partition("\nrlhf: preflight reward")[2].partition("\n\n")[0]
    prepared = makefile.partition("\nreward:")[2].partition("##")[0].split()
    run = [name.rpartition(".")[2] for name in re.findall(r"\$\(RUN\) ([\w.]+)", rule)]
    assert list(ROAD) == [*prepared, "reward", *run[:-1], "tax"]
    assert run[-1] == "alignment_tax"
