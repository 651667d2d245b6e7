"""The benchmark of the reward stage: order, medians, ratios and result files on stand-ins; no timing."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT

from benchmarks import harness
from benchmarks.reward import __main__ as reward
from benchmarks.synthetic_hh import hh_shaped
from rlhf.data.comparisons import problem
from rlhf.errors import UserError

SPEED = "s_per_comparison"

# A child that measures nothing: its figures follow from the case, the side and the number of its call.
STAND_IN = """
import json, pathlib, sys
kind, task, result = sys.argv[1:]
task = json.loads(pathlib.Path(task).read_text())
log = pathlib.Path({log!r})
calls = json.loads(log.read_text()) if log.is_file() else []
log.write_text(json.dumps([*calls, [kind, task]]))
print("noise on stdout"), print("noise on stderr", file=sys.stderr)
figures = {{}}
if kind == "tiny":
    pathlib.Path(task["base"]).mkdir()
    (pathlib.Path(task["base"]) / "config.json").write_text('{{"num_hidden_layers": 3}}')
elif kind == "prepare":
    row = {{"prompt": [5, 6, 9], "responses": [[7, 1]] * task["responses"], "index": 0}}
    figures = {{"rows": [row] * task["number"]}}
else:
    rows = json.loads(pathlib.Path(task["rows"]).read_text())["rows"]
    cost = (2.0 if kind == "theirs" else 1.0) * len(rows[0]["responses"]) + 0.01 * len(calls) ** 2
    cost /= 4.0 if task["layers"] != "all" else 1.0
    figures = dict(comparisons=len(rows), comparisons_steady=len(rows) - task["batch_size"], steps=3,
        response_tokens=4 * len(rows), trainable_parameters=len(task["layers"]), threads=task["threads"],
        s_per_comparison=cost, comparisons_per_s=1 / cost,
        cpu_s_per_comparison=cost * (9 if kind == "theirs" else 1),
        whole_s_per_comparison=cost + 1, peak_bytes=1e9 * (3 + len(kind)) + len(calls) * 1e6,
        losses=[0.7, 0.6], first_loss=0.7, final_loss=0.6, positions_per_comparison=9.5)
    figures |= {extra}
pathlib.Path(result).write_text(json.dumps(figures))
"""


def stand_in(folder, extra="{}"):
    """The command of a stand-in child that notes its calls in ``calls.json``."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text('{"num_hidden_layers": 30}')
    (folder / "child.py").write_text(STAND_IN.format(log=str(folder / "calls.json"), extra=extra))
    return [sys.executable, "-I", "-S", str(folder / "child.py")]


def run(command, *words):
    return reward.benchmark(["--base", "base", "--pairs", "24", "--output", "out", *words], command)


class Finished(NamedTuple):
    folder: Path
    report: dict[str, Any]
    calls: list[tuple[str, dict[str, Any]]]
    printed: str

    @property
    def page(self):
        return (self.folder / "out" / "reward.md").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A benchmark of three rounds, with a file of comparisons from another place."""
    folder, data = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("data") / "hh.jsonl"
    data.touch()
    before, printed = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            words = ["--comparisons", str(data), "--their-pairs-at-once", "4", "--epochs", "2"]
            report = run(stand_in(folder), *words)
    finally:
        os.chdir(before)
    return Finished(folder, report, json.loads((folder / "calls.json").read_text()), printed.getvalue())


def python(tmp_path, text):
    (tmp_path / "child.py").write_text(textwrap.dedent(text))
    return [sys.executable, str(tmp_path / "child.py")]


# ------------------------------------------------------------------ the harness


def test_sides_run_in_turn_and_swap_every_second_round():
    order = harness.turns(["a", "b"], ("ours", "theirs"), 3)
    assert [(t.round, t.case, t.side) for t in order] == [
        (0, "a", "ours"), (0, "a", "theirs"), (0, "b", "ours"), (0, "b", "theirs"),
        (1, "a", "theirs"), (1, "a", "ours"), (1, "b", "theirs"), (1, "b", "ours"),
        (2, "a", "ours"), (2, "a", "theirs"), (2, "b", "ours"), (2, "b", "theirs"),
    ]  # fmt: skip


def test_a_child_hands_back_its_figures_and_gets_its_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("X", "the parent's")
    command = python(
        tmp_path,
        """
        import json, os, sys, time
        print("noise"); time.sleep(0.3)
        json.dump({"x": os.environ["X"], "home": "PATH" in os.environ}, open(sys.argv[1], "w"))
        """,
    )
    result = tmp_path / "result.json"
    result.write_text('{"x": "left from before"}')
    figures = harness.run_child([*command, str(result)], result, {"X": "7"})
    assert figures["x"] == "7"
    assert figures["home"]
    assert 0.3 < figures["process_s"] < 60


def test_a_child_that_writes_nothing_does_not_hand_back_an_older_result(tmp_path):
    result = tmp_path / "result.json"
    result.write_text('{"x": 1}')
    with pytest.raises(RuntimeError, match="status 0"):
        harness.run_child(python(tmp_path, "print('well')"), result, {})


def test_a_child_that_fails_shows_the_end_of_its_output(tmp_path):
    text = "print('begin', *range(100), sep='\\n'); raise ValueError('no memory')"
    with pytest.raises(RuntimeError, match=r"status 1(?s:.*)no memory") as caught:
        harness.run_child(python(tmp_path, text), tmp_path / "r", {})
    assert "\n99\n" in str(caught.value)
    assert "\n50\n" not in str(caught.value)


def test_a_child_that_fails_after_writing_is_not_believed(tmp_path):
    text = "import sys; open(sys.argv[1], 'w').write('{}'); sys.exit(3)"
    with pytest.raises(RuntimeError, match="status 3"):
        harness.run_child([*python(tmp_path, text), str(tmp_path / "r")], tmp_path / "r", {})


def test_a_mistake_that_the_user_can_mend_comes_through_as_one_line(tmp_path):
    text = "import sys; print('warning', 'error: mend it', file=sys.stderr, sep='\\n'); sys.exit(2)"
    with pytest.raises(UserError, match=r"^mend it$"):
        harness.run_child(python(tmp_path, text), tmp_path / "r", {})


def test_runs_carry_round_case_side_and_place():
    order = harness.turns(["a"], ("ours", "theirs"), 2)
    runs = harness.run_all(order, lambda turn: {"x": f"{turn.side}{turn.round}"})
    assert [r["place"] for r in runs] == [0, 1, 2, 3]
    assert [r["x"] for r in runs] == ["ours0", "theirs0", "theirs1", "ours1"]
    assert [(r["round"], r["case"], r["side"]) for r in runs] == [tuple(turn) for turn in order]


def test_raw_figures_are_those_of_one_side_in_the_order_of_the_rounds():
    keys = ("round", "case", "side", "x")
    rows = [(1, "a", "ours", 5), (0, "a", "ours", 3), (0, "b", "ours", 7), (0, "a", "theirs", 9)]
    runs = [dict(zip(keys, row, strict=True)) for row in rows]
    assert harness.raw(runs, "a", "ours", "x") == [3, 5]


def test_the_ratio_is_their_median_over_our_median():
    theirs, ours = [9.0, 4.0, 100.0], [2.0, 1.0, 5.0]
    found = harness.ratio(theirs, ours)
    assert found["value"] == statistics.median(theirs) / statistics.median(ours) == 4.5
    assert found["by_round"] == [4.5, 4.0, 20.0]
    assert (found["low"], found["high"]) == (4.0, 20.0)


@pytest.mark.parametrize(("theirs", "ours"), [([1.0], [1.0, 2.0]), ([], []), ([1.0], [0.0]), ([-1.0], [1.0])])
def test_a_ratio_of_nothing_comparable_is_refused(theirs, ours):
    with pytest.raises(ValueError, match=r"runs of theirs|positive"):
        harness.ratio(theirs, ours)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_of_this_program_not_of_its_parent():
    big = bytearray(os.urandom(1)) * 300_000_000  # so that this process is far larger than its child
    text = "import resource, benchmarks.harness as h; print(h.peak_bytes(), h.resident_bytes()); " \
           "b = bytearray(60_000_000); print(h.peak_bytes(), h.resident_bytes()); " \
           "del b; print(h.peak_bytes(), h.resident_bytes())"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    (peak, now), (more, held), (still, freed) = [map(int, line.split()) for line in done.stdout.splitlines()]
    assert len(big) > 2 * peak > now > 0
    assert 55e6 < more - peak < 70e6
    assert 55e6 < held - now < 70e6
    assert abs(still - more) < 2e6  # the kernel counts in lumps
    assert freed < held - 50e6


def test_the_machine_is_described_without_a_path():
    host = harness.machine(["torch", "trl"])
    assert host["cores"] == os.cpu_count()
    assert 0.1 < host["memory_gb"] < 1e5
    assert host["cpu"]
    assert set(host["versions"]) == {"torch", "trl"}
    assert str(ROOT) not in json.dumps(host)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/data/hh/test.jsonl.gz", "test.jsonl.gz"),
        ("../data/test.jsonl", "test.jsonl"),
        ("--output=/tmp/x", "--output=x"),
        ("models/smollm2-135m", "models/smollm2-135m"),
        ("--pairs", "--pairs"),
        ("16", "16"),
    ],
)
def test_files_of_other_places_are_shown_by_name(word, shown):
    assert harness.relative_name(word) == shown
    assert harness.command_line("m", [word, "x"]) == f"python -m m {shown} x"


# ------------------------------------------------------------------ the made comparisons


def test_made_comparisons_are_usable_all_different_and_the_same_for_a_seed():
    some = list(itertools.islice(hh_shaped(0, 4), 300))
    assert some == list(itertools.islice(hh_shaped(0, 4), 300))
    assert some != list(itertools.islice(hh_shaped(1, 4), 300))
    assert not [c for c in some if problem(c)]
    assert len({c.prompt for c in some}) == 300
    assert all(len(set(c.responses)) == 4 for c in some)
    assert {c.ranks for c in some} == {(0, 1, 2, 3)}
    assert all(m.role == ("user", "assistant")[i % 2] for c in some for i, m in enumerate(c.prompt))


def test_made_comparisons_have_the_lengths_of_hh():
    some = list(itertools.islice(hh_shaped(0, 2), 3000))
    turns = [len(c.prompt) for c in some]
    prompt = [sum(len(m.content.split()) for m in c.prompt) for c in some]
    response = [len(r.split()) for c in some for r in c.responses]
    # of the HH test files: 2.9 turns, 43 words a prompt, 29 words a response, cut at 256 tokens
    assert 2.6 < statistics.mean(turns) < 3.1
    assert 40 < statistics.mean(prompt) < 60
    assert 27 < statistics.mean(response) < 42
    scaled = [len(r.split()) for c in itertools.islice(hh_shaped(0, 2, 0.2), 3000) for r in c.responses]
    assert statistics.mean(scaled) == pytest.approx(0.2 * statistics.mean(response), rel=0.2)


# ------------------------------------------------------------------ the benchmark


def test_the_result_file_holds_the_raw_runs_and_ratios_made_of_them(finished):
    report = finished.report
    assert report == json.loads((finished.folder / "out" / "reward.json").read_text())
    assert len(report["runs"]) == 3 * 3 * 2
    for name, figure, theirs, ours in [
        ("speed_ratio_pairs_all_layers", SPEED, "pairs_all_layers", "pairs_all_layers"),
        ("speed_ratio_pairs_top_third", SPEED, "pairs_top_third", "pairs_top_third"),
        ("speed_ratio_top_third_against_all_layers", SPEED, "pairs_all_layers", "pairs_top_third"),
        ("speed_ratio_k4", SPEED, "k4", "k4"),
        ("memory_ratio", "peak_bytes", "pairs_all_layers", "pairs_all_layers"),
        ("memory_ratio_pairs_top_third", "peak_bytes", "pairs_top_third", "pairs_top_third"),
        ("memory_ratio_k4", "peak_bytes", "k4", "k4"),
    ]:
        a = sorted(r[figure] for r in report["runs"] if (r["case"], r["side"]) == (theirs, "theirs"))
        b = sorted(r[figure] for r in report["runs"] if (r["case"], r["side"]) == (ours, "ours"))
        found = report["ratios"][name]
        assert found["value"] == pytest.approx(a[1] / b[1])
        assert len(found["by_round"]) == 3
        assert found["target"] == reward.RATIOS[name].target
    assert len(report["ratios"]) == 7
    speed = report["ratios"]["speed_ratio_k4"]
    assert speed["by_processor_time"] == pytest.approx(9 * speed["value"])
    assert 1 < speed["with_first_step"] < speed["value"]
    for case, side in itertools.product(reward.CASES, reward.SIDES):
        some = [r for r in report["runs"] if (r["case"], r["side"]) == (case, side)]
        found = report["medians"][case][side]
        assert found[SPEED] == sorted(r[SPEED] for r in some)[1]
        assert found["first_loss"] == 0.7
        assert not {"round", "place", "case", "losses"} & set(found)


def test_a_target_is_reached_or_not(finished):
    runs = finished.report["runs"]
    target = reward.RATIOS["speed_ratio_k4"].target
    for theirs, reached in ((target, True), (0.99 * target, False)):
        made = [{**r, SPEED: 1.0 if r["side"] == "ours" else theirs} for r in runs]
        assert reward.evaluate(made)["speed_ratio_k4"]["reached"] is reached


def test_both_sides_get_the_same_tasks(finished):
    assert [kind for kind, _ in finished.calls[:2]] == ["prepare", "prepare"]
    assert [task["responses"] for _, task in finished.calls[:2]] == [2, 4]
    tasks = {}
    for kind, task in finished.calls[2:]:
        case = tasks.setdefault((Path(task["rows"]).name, task["layers"]), {})
        case.setdefault(kind, []).append(task)
    assert set(tasks) == {("rows-2.json", "all"), ("rows-2.json", "top_10"), ("rows-4.json", "all")}
    for sides in tasks.values():
        assert sides["ours"] == sides["theirs"]
        assert len(sides["ours"]) == 3
    one = tasks["rows-4.json", "all"]["ours"][0]
    assert (one["batch_size"], one["epochs"], one["their_pairs_at_once"], one["max_tokens"]) == (2, 2, 4, 256)
    assert tasks["rows-2.json", "all"]["ours"][0]["batch_size"] == 8


def test_the_result_says_what_it_is_of_and_holds_no_path_of_this_machine(finished):
    report = finished.report
    text = json.dumps(report) + finished.page
    assert str(finished.folder) not in text
    assert tempfile.gettempdir() not in text
    assert report["data"]["responses_2"]["source"] == ["hh.jsonl"]
    assert "made" in report["data"]["responses_4"]["source"]
    assert report["data"]["responses_2"]["mean_response_tokens"] == 2
    assert report["data"]["responses_2"]["mean_prompt_tokens"] == 3
    assert "--comparisons hh.jsonl" in report["command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", report["date"])
    assert any("C(4,2)" in note and "rankings, not pairs" in note for note in report["notes"])
    assert report["settings"]["base"] == "base"
    assert report["machine"]["versions"]["trl"]


def test_the_page_shows_every_ratio_with_both_sides(finished):
    page, report = finished.page, finished.report
    assert page in finished.printed
    lines = [line for line in page.splitlines() if " /s |" in line or " GB |" in line]
    assert len(lines) == len(reward.RATIOS)
    assert all(what.words in line for what, line in zip(reward.RATIOS.values(), lines, strict=True))
    found = report["ratios"]["speed_ratio_top_third_against_all_layers"]
    ours = report["medians"]["pairs_top_third"]["ours"]["comparisons_per_s"]
    theirs = report["medians"]["pairs_all_layers"]["theirs"]["comparisons_per_s"]
    assert f"| {ours:.3f} /s | {theirs:.3f} /s | {found['value']:.2f} |" in page
    assert all(f"- {note}" in page for note in reward.NOTES)


@pytest.mark.parametrize("name", ["response_tokens", "comparisons", "trainable_parameters", "steps"])
def test_sides_that_did_not_do_the_same_work_are_refused(finished, name):
    runs = finished.report["runs"]
    reward.check_same_work(runs)
    other = [{**r, name: r[name] + (r["side"] == "ours" and r["case"] == "k4")} for r in runs]
    with pytest.raises(RuntimeError, match=f"k4: {name} differs"):
        reward.check_same_work(other)


def test_nothing_is_written_where_the_sides_differ(inside):
    with pytest.raises(RuntimeError, match="steps differs"):
        run(stand_in(inside, "{'steps': 3 + (kind == 'ours')}"), "--rounds", "1")
    assert not (inside / "out").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--base", "nowhere"], "no model at nowhere.*make model"),
        (["--pairs", "8"], "two optimiser steps"),
        (["--ranked", "3"], "two optimiser steps"),
        (["--rounds", "0"], "at least 1"),
        (["--comparisons", "none-*.jsonl"], "no file matches none"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(inside, words, match):
    with pytest.raises(UserError, match=match):
        run(stand_in(inside), *words)
    assert not (inside / "calls.json").exists()


def test_quick_is_small_and_does_not_touch_the_kept_results(inside):
    report = reward.benchmark(["--quick"], stand_in(inside))
    calls = json.loads((inside / "calls.json").read_text())
    assert [kind for kind, _ in calls[:3]] == ["tiny", "prepare", "prepare"]
    assert len(report["runs"]) == 6
    assert {task["scale"] for kind, task in calls if kind == "prepare"} == {0.15}
    assert sorted(p.name for p in inside.iterdir()) == ["base", "calls.json", "child.py"]
    assert reward.parse([]).rounds == 3


def test_the_parent_loads_nothing_heavy():
    text = "import sys, benchmarks.reward; assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True)
