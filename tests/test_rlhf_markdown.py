"""Figures as text: what is not known says so, and a cell stays in its table."""

from rlhf import markdown

KNOWN = {"mean": 0.5, "ci95": [0.25, 0.75], "n": 4}
HALF_KNOWN = {"mean": 1.0, "ci95": None, "n": 1}
UNKNOWN = {"mean": None, "ci95": None, "n": 0}


def test_figures_come_with_their_interval():
    assert markdown.value(KNOWN, ".2f") == ("0.50", "[0.25, 0.75]")
    assert markdown.plain(KNOWN, ".1f") == "0.5 [0.2, 0.8]"
    assert markdown.share(KNOWN) == ("50.0%", "[25.0, 75.0]")
    assert markdown.percent(KNOWN) == "50.0% [25.0, 75.0]"
    assert markdown.points({"mean": -0.25, "ci95": [-0.5, 0.0]}) == "-25.0 [-50.0, +0.0] points"


def test_unknown_figures_say_so_once():
    assert markdown.value(UNKNOWN, ".2f") == ("unknown", "unknown")
    assert markdown.plain(UNKNOWN, ".2f") == markdown.percent(UNKNOWN) == "unknown"
    assert markdown.share(UNKNOWN)[0] == "unknown"


def test_a_figure_of_one_seed_stands_without_an_interval():
    assert markdown.plain(HALF_KNOWN, "+.1f") == "+1.0"
    assert markdown.percent(HALF_KNOWN) == "100.0%"
    assert markdown.points(HALF_KNOWN) == "+100.0 points"
    assert markdown.value(HALF_KNOWN, ".1f") == ("1.0", "no interval")


def test_a_cell_stays_in_its_table():
    table = markdown.table(["a", "b"], [["x|y", "two\nlines"]])
    assert table == "| a | b |\n| --- | --- |\n| x\\|y | two lines |\n"
