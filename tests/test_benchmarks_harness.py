"""What the benchmarks share: child processes, the peer's release, ratios, pages, made comparisons."""

from __future__ import annotations

import itertools
import os
import shlex
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import harness, report
from benchmarks.gold import page as gold
from benchmarks.ppo import __main__ as ppo
from benchmarks.reward import __main__ as reward
from benchmarks.synthetic_hh import hh_shaped
from rlhf.data.comparisons import problem
from rlhf.errors import UserError
from rlhf.runs.artifacts import read_json

# ------------------------------------------------------------------ child processes


def run_python(tmp_path, text, environment=None):
    """The figures of a child that is this program and gets the name of its result file."""
    (tmp_path / "child.py").write_text(textwrap.dedent(text))
    result = tmp_path / "result.json"
    result.write_text('{"x": "left from before"}')
    command = [sys.executable, str(tmp_path / "child.py"), str(result)]
    return harness.run_child(command, result, environment or {})


def test_a_child_hands_back_its_figures_and_gets_its_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("X", "the parent's")
    text = """
        import json, os, sys, time
        print("noise"); time.sleep(0.3)
        json.dump({"x": os.environ["X"], "home": "PATH" in os.environ}, open(sys.argv[1], "w"))
        """
    figures = run_python(tmp_path, text, {"X": "7"})
    assert (figures["x"], figures["home"]) == ("7", True)
    assert 0.3 < figures["process_s"] < 60


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("print('well')", RuntimeError, "status 0"),  # it wrote nothing
        ("import sys; open(sys.argv[1], 'w').write('{}'); sys.exit(3)", RuntimeError, "status 3"),
        (
            "print('begin', *range(100), sep='\\n'); raise ValueError('no memory')",
            RuntimeError,
            r"status 1:\n(?!.*\n50\n)(?s:.*)\n99\n(?s:.*)no memory",
        ),
        ("import sys; print('x', 'error: use y', file=sys.stderr, sep='\\n'); sys.exit(2)", UserError,
         "^use y$"),
    ],
)  # fmt: skip
def test_a_child_that_fails_is_not_believed_and_shows_the_end_of_its_output(text, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        run_python(tmp_path, text)
    assert "\n50\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_of_this_program_not_of_its_parent():
    big = bytearray(os.urandom(1)) * 300_000_000  # so that this process is far larger than its child
    text = "import benchmarks.harness as h; print(h.peak_bytes()); b = bytearray(60_000_000); " \
           "print(h.peak_bytes()); del b; print(h.peak_bytes())"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, more, still = map(int, done.stdout.split())
    assert len(big) > 2 * peak > 0
    assert 55e6 < more - peak < 70e6
    assert abs(still - more) < 2e6  # the kernel counts in lumps


def test_the_parent_loads_nothing_heavy():
    imports = "import sys, benchmarks.reward.__main__, benchmarks.ppo.__main__, benchmarks.gold.__main__"
    text = f"{imports}; assert not {{'torch', 'transformers', 'trl'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True)


# ------------------------------------------------------------------ the peer's release


def pip(status, calls):
    def run(command, **options):
        calls.append(command)
        if not status:
            (Path(command[command.index("--target") + 1]) / "trl-1.12.0.dist-info").mkdir()
        return subprocess.CompletedProcess(command, status, "", "WARNING: x\nERROR: no network\n")

    return run


def test_the_peer_is_installed_once_without_its_dependencies(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(harness.subprocess, "run", pip(0, calls))
    folder = harness.peer_folder(tmp_path / "kept")
    assert folder == tmp_path / "kept" / "trl-1.12.0"
    assert (folder / "trl-1.12.0.dist-info").is_dir()
    assert harness.peer_folder(tmp_path / "kept") == folder
    assert len(calls) == 1
    assert calls[0][-1] == "trl==1.12.0"
    assert "--no-deps" in calls[0]
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["trl-1.12.0"]


def test_a_peer_that_cannot_be_installed_is_an_error_of_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.subprocess, "run", pip(1, []))
    with pytest.raises(UserError, match=r"trl==1.12.0.*ERROR: no network.*with a network"):
        harness.peer_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_peer_comes_first_on_the_path_and_another_release_is_refused(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    assert harness.environment(1, Path("/p"))["PYTHONPATH"] == f"/p{os.pathsep}before"
    monkeypatch.delenv("PYTHONPATH")
    assert harness.environment(1, Path("/p"))["PYTHONPATH"] == "/p"
    with pytest.raises(RuntimeError, match=r"theirs runs trl 1.1[^2].*, not 1.12.0"):
        harness.check_release()  # this process has the project's own


# ------------------------------------------------------------------ figures and pages


def test_raw_figures_are_those_of_one_side_in_the_order_of_the_rounds():
    keys = ("round", "case", "side", "x")
    rows = [(1, "a", "ours", 5), (0, "a", "ours", 3), (0, "b", "ours", 7), (0, "a", "theirs", 9)]
    runs = [dict(zip(keys, row, strict=True)) for row in rows]
    assert report.raw(runs, "a", "ours", "x") == [3, 5]


def test_the_ratio_is_their_median_over_our_median():
    found = report.ratio([9.0, 4.0, 100.0], [2.0, 1.0, 5.0])
    assert found == {"value": 4.5, "by_round": [4.5, 4.0, 20.0], "low": 4.0, "high": 20.0}


@pytest.mark.parametrize(("theirs", "ours"), [([1.0], [1.0, 2.0]), ([], []), ([1.0], [0.0]), ([-1.0], [1.0])])
def test_a_ratio_of_nothing_comparable_is_refused(theirs, ours):
    with pytest.raises(ValueError, match=r"runs of theirs|positive"):
        report.ratio(theirs, ours)


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
    assert report.relative_name(word) == shown
    assert report.opening("m", [word, "x"], [])["command"] == f"python -m m {shown} x"


def test_a_command_can_be_run_as_it_is_written_down():
    words = ["--variant", "ppo.kl_coef=0.1 ppo.lam=1", "data/*.jsonl"]
    written = report.opening("m", words, [])["command"]
    assert shlex.split(written) == ["python", "-m", "m", *words]


@pytest.mark.parametrize(
    ("name", "page"),
    [("ppo", ppo), ("ppo_scaling", ppo), ("reward", reward), ("gold", gold), ("gold_settings", gold)],
)
def test_a_kept_page_is_what_its_report_makes(name, page):
    kept = ROOT / report.RESULTS / f"{name}.md"
    found = read_json(kept.with_suffix(".json"))
    assert page.markdown(found) == kept.read_text()


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
    response = statistics.mean(len(r.split()) for c in some for r in c.responses)
    # of the HH test files: 2.9 turns, 43 words a prompt, 29 words a response, cut at 256 tokens
    assert 2.6 < statistics.mean(len(c.prompt) for c in some) < 3.1
    assert 40 < statistics.mean(sum(len(m.content.split()) for m in c.prompt) for c in some) < 60
    assert 27 < response < 42
    scaled = [len(r.split()) for c in itertools.islice(hh_shaped(0, 2, 0.2), 3000) for r in c.responses]
    assert statistics.mean(scaled) == pytest.approx(0.2 * response, rel=0.2)
