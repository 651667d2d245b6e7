"""Bars: silent where work is short, on one process only, and with something to say where it is long."""

import pytest

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
    assert "2/3" in out
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
