"""The command lines of the benchmarks against trl on a child that stands in for both sides; no timing."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT

from benchmarks import harness, report
from benchmarks.ppo import __main__ as ppo
from benchmarks.reward import __main__ as reward
from rlhf.errors import UserError
from rlhf.runs.artifacts import read_json

# A child that measures nothing: its figures follow from the case, the side and the number of its call.
STAND_IN = """
import json, os, pathlib, sys
kind, task, result = sys.argv[1:]
task = json.loads(pathlib.Path(task).read_text())
log = pathlib.Path({log!r})
calls = json.loads(log.read_text()) if log.is_file() else []
log.write_text(json.dumps([*calls, [kind, task, os.environ.get("PYTHONPATH")]]))
print("noise on stdout"), print("noise on stderr", file=sys.stderr)
figures = {{}}
if kind == "tiny":
    pathlib.Path(task["base"]).mkdir()
    (pathlib.Path(task["base"]) / "config.json").write_text('{{"num_hidden_layers": 3}}')
elif kind == "prepare":
    responses = [[7, 1]] * task.get("responses", 1)
    figures = {{"rows": [{{"text": "x", "ids": [5] * (16 + i), "prompt": [5, 6, 9], "responses": responses}}
                         for i in range(task["number"])]}}
elif kind == "matmul":
    figures = {{"flops_per_s": 1e9 * len(calls)}}
elif kind in ("ours", "theirs"):
    rows = json.loads(pathlib.Path(task["rows"]).read_text())["rows"]
    peer = kind == "theirs"
    cost = (6.0 if peer else 2.0) * len(rows[0]["responses"]) + 0.01 * len(calls) ** 2
    cost /= 4.0 if task["layers"] != "all" else 1.0
    figures = dict.fromkeys(("s_per_step", "s_per_comparison", "generate_s", "score_s", "update_s"), cost)
    figures |= dict.fromkeys(("cpu_s_per_step", "cpu_s_per_comparison"), cost * (9 if peer else 1))
    figures |= dict(step_s=[9.0, cost], measured_steps=1, steps=3, rows=len(rows), comparisons=len(rows),
        comparisons_steady=9, prompt_tokens=sum(len(r["ids"]) for r in rows), response_tokens=40.0,
        mean_response_tokens=2.5, trainable_parameters=len(task["layers"]), tokens_per_s=100 / cost,
        s_per_token=cost / (200 if peer else 100), whole_s_per_comparison=cost + 1, flops_per_s=1e9 / cost,
        comparisons_per_s=1 / cost, peak_bytes=1e9 * (3 + len(kind)) + len(calls) * 1e6,
        losses=[0.7, 0.6], first_loss=0.7, final_loss=0.6, positions_per_comparison=9.5,
        threads=int(os.environ["OMP_NUM_THREADS"]), versions={{"torch": "2"}})
    figures |= {extra}
pathlib.Path(result).write_text(json.dumps(figures))
"""
TEXTS = ROOT / ppo.PROMPTS


class Finished(NamedTuple):
    report: dict[str, Any]
    calls: list[Any]
    page: str

    def median(self, case, side, name):
        chosen = [r[name] for r in self.report["runs"] if (r["case"], r["side"]) == (case, side)]
        return sorted(chosen)[len(chosen) // 2]

    @property
    def sides(self):
        """The tasks of both sides, in the order of their calls."""
        return [(kind, task) for kind, task, _ in self.calls if kind in harness.SIDES]


def stand_in(folder, extra="{}"):
    """The command of a stand-in child that notes its calls in ``calls.json``."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text('{"num_hidden_layers": 30}')
    (folder / "child.py").write_text(STAND_IN.format(log=str(folder / "calls.json"), extra=extra))
    return [sys.executable, "-I", "-S", str(folder / "child.py")]


def run(folder, module, *words, extra="{}", name=None):
    """Run a benchmark in the current folder on a stand-in child."""
    fixed = ["--base", "base", "--output", "out", *(["--prompts", str(TEXTS)] if module is ppo else [])]
    peer = {"peer": lambda: Path("/trl-1.12.0")} if module is ppo else {}  # never asked for without rounds
    found = module.benchmark([*fixed, *words], stand_in(folder, extra), **peer)
    name = name or module.__name__.split(".")[1]
    assert found == read_json(folder / "out" / f"{name}.json")
    calls = json.loads((folder / "calls.json").read_text())
    text = json.dumps(found) + (folder / "out" / f"{name}.md").read_text()
    assert str(folder) not in text
    assert tempfile.gettempdir() not in text
    return Finished(found, calls, (folder / "out" / f"{name}.md").read_text())


@pytest.fixture(scope="module", params=[ppo, reward], ids=["ppo", "reward"])
def finished(request, tmp_path_factory):
    """Module, and report, calls and page of its benchmark of three rounds."""
    folder, data = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("data") / "hh.jsonl"
    data.touch()
    words = {
        ppo: ["--scaling", "--their-micro-batch", "16"],
        reward: ["--comparisons", str(data), "--their-pairs-at-once", "4", "--epochs", "2", "--pairs", "24"],
    }[request.param]
    before = os.getcwd()
    os.chdir(folder)
    try:
        return request.param, run(folder, request.param, *words)
    finally:
        os.chdir(before)


RATIOS = {  # name: theirs, ours, target
    ppo: {
        "speed_ratio_all_layers": ("all_layers", "all_layers", 2.0),
        "speed_ratio_top_third": ("all_layers", "top_third", 4.0),
        "speed_ratio_top_third_same_layers": ("top_third", "top_third", None),
        "memory_ratio": ("all_layers", "all_layers", 3.0),
        "memory_ratio_top_third": ("all_layers", "top_third", 3.0),
        "memory_ratio_top_third_same_layers": ("top_third", "top_third", None),
    },
    reward: {
        "speed_ratio_pairs_all_layers": ("pairs_all_layers", "pairs_all_layers", 2.5),
        "speed_ratio_pairs_top_third": ("pairs_top_third", "pairs_top_third", 3.0),
        "speed_ratio_top_third_against_all_layers": ("pairs_all_layers", "pairs_top_third", 3.0),
        "speed_ratio_k4": ("k4", "k4", 10.0),
        "memory_ratio": ("pairs_all_layers", "pairs_all_layers", 1.0),
        "memory_ratio_pairs_top_third": ("pairs_top_third", "pairs_top_third", 1.0),
        "memory_ratio_k4": ("k4", "k4", 1.0),
    },
}


def test_the_result_holds_the_raw_runs_and_the_ratios_of_their_medians(finished):
    module, done = finished
    assert len(done.report["runs"]) == 3 * 2 * len(module.CASES)
    assert [r["place"] for r in done.report["runs"]] == list(range(6 * len(module.CASES)))
    assert done.report["ratios"].keys() == RATIOS[module].keys()
    for name, (theirs, ours, target) in RATIOS[module].items():
        figure = "peak_bytes" if name.startswith("memory") else module._SPEED
        found = done.report["ratios"][name]
        expected = done.median(theirs, "theirs", figure) / done.median(ours, "ours", figure)
        assert found["value"] == pytest.approx(expected)
        assert (found["target"], len(found["by_round"])) == (target, 3)
        assert f"| {found['value']:.2f} | {found['low']:.2f} to {found['high']:.2f} |" in done.page
        if figure == module._SPEED and theirs == ours:
            assert found["by_processor_time"] == pytest.approx(9 * found["value"])
            assert found.get("by_token", found["value"] / 2) == pytest.approx(found["value"] / 2)
            assert 1 < found.get("with_first_step", 1.1) < found["value"]
    for case, side in itertools.product(module.CASES, harness.SIDES):
        found = done.report["medians"][case][side]
        assert found[module._SPEED] == done.median(case, side, module._SPEED)
        assert not {"round", "place", "case", "losses"} & set(found)


def test_each_side_computes_in_its_own_type(inside):
    for module, more in ((ppo, []), (reward, [])):
        done = run(inside, module, "--rounds", "1", "--dtype", "bfloat16", "--their-dtype", "autocast", *more)
        asked = {kind: {task["dtype"] for k, task, _ in done.calls if k == kind} for kind in harness.SIDES}
        assert asked == {"ours": {"bfloat16"}, "theirs": {"autocast"}}
        assert "ours in bfloat16, theirs in float32 under bfloat16 autocast" in done.page


def test_a_target_is_reached_or_not(finished):
    module, done = finished
    for name, (theirs, ours, target) in RATIOS[module].items():
        for value, reached in ((target or 1.0, True), (0.99 * (target or 1.0), False)):
            figure = "peak_bytes" if name.startswith("memory") else module._SPEED
            made = [{**r, figure: value if r["side"] == "theirs" else 1.0} for r in done.report["runs"]]
            found = report.against_targets(module.RATIOS, made, module._BESIDE)[name]
            assert found["reached"] is (None if target is None else reached), (theirs, ours)


def test_sides_run_in_turn_swap_every_second_round_and_get_the_same_tasks(finished):
    module, done = finished
    number = len(module.CASES)
    tasks = done.sides[: 6 * number]
    swapped = ["ours", "theirs"] * number + ["theirs", "ours"] * number + ["ours", "theirs"] * number
    assert [kind for kind, _ in tasks] == swapped == [r["side"] for r in done.report["runs"]]
    cases = [case for _ in range(3) for case in module.CASES]
    assert [r["case"] for r in done.report["runs"][::2]] == cases
    assert [r["round"] for r in done.report["runs"]] == [n for n in range(3) for _ in range(2 * number)]
    for (one, a), (other, b) in zip(tasks[::2], tasks[1::2], strict=True):
        if module is ppo:
            assert {one: a.pop("micro_batch"), other: b.pop("micro_batch")} == {"ours": 8, "theirs": 16}
        assert a == b
    shown = {(Path(t["rows"]).name, t["layers"]) for _, t in tasks}
    a = tasks[-1][1]
    if module is ppo:
        assert shown == {("rows-16.json", "all"), ("rows-16.json", "top_10")}
        assert (a["response_tokens"], a["epochs"], a["steps"], a["value"]) == (48, 4, 3, "full")
        assert [t["seed"] for _, t in tasks] == [0] * 4 + [1] * 4 + [2] * 4
    else:
        assert shown == {("rows-2.json", "all"), ("rows-2.json", "top_10"), ("rows-4.json", "all")}
        assert (a["batch_size"], a["epochs"], a["their_pairs_at_once"], a["max_tokens"]) == (2, 2, 4, 256)
        assert tasks[0][1]["batch_size"] == 8
        assert [t["responses"] for kind, t, _ in done.calls if kind == "prepare"] == [2, 4]
    for kind, _, path in done.calls:
        first = (path or "").split(os.pathsep)[0]
        assert (first == "/trl-1.12.0") is (module is ppo and kind == "theirs")


def test_the_report_holds_what_it_is_of(finished):
    module, done = finished
    found = done.report
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    assert found["settings"]["base"] == "base"
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert found["machine"]["cpu"]
    assert found["machine"]["versions"].keys() == {*module.PACKAGES, "trl"}
    assert all(f"- {note}" in done.page for note in module.NOTES)
    if module is ppo:
        assert "prompts of 16 to 31 tokens (made of sentiment_train.jsonl)" in done.page
        peaks = [1e9 * number for number, (kind, *_) in enumerate(done.calls) if kind == "matmul"]
        assert len(peaks) == 2
        assert found["matmul_peak"] == {"flops_per_s": max(peaks), "measured": peaks}
        for case, side in itertools.product(ppo.CASES, harness.SIDES):
            share = done.median(case, side, "flops_per_s") / max(peaks)
            assert found["matmul_share"][case][side] == pytest.approx(share)
    else:
        two, four = found["data"]["responses_2"], found["data"]["responses_4"]
        assert two["source"] == ["hh.jsonl"]
        assert "made" in four["source"]
        assert (two["mean_prompt_tokens"], two["mean_response_tokens"]) == (3, 2)
        assert "--comparisons hh.jsonl" in found["command"]


@pytest.mark.parametrize(
    ("module", "change", "message"),
    [
        (ppo, "{'prompt_tokens': len(kind)}", "prompt_tokens differs"),
        (ppo, "{'threads': len(kind)}", "threads differs"),
        (ppo, "{'versions': {'torch': kind}}", "versions differs"),
        (reward, "{'steps': len(kind)}", "steps differs"),
        (reward, "{'response_tokens': len(kind)}", "response_tokens differs"),
        (reward, "{'comparisons': len(kind)}", "comparisons differs"),
        (reward, "{'trainable_parameters': len(kind)}", "trainable_parameters differs"),
    ],
)
def test_nothing_is_written_where_the_sides_did_other_work(module, change, message, inside):
    with pytest.raises(RuntimeError, match=message):
        run(inside, module, "--rounds", "1", extra=change)
    assert not (inside / "out").exists()


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (ppo, ["--steps", "0"], "--steps: at least 1"),
        (ppo, ["--rounds", "0"], "--rounds: at least 1"),
        (ppo, ["--micro-batch", "5"], "--micro-batch 5: use a divisor of --batch 16"),
        (ppo, ["--their-micro-batch", "5"], "--their-micro-batch 5"),
        (ppo, ["--longest", "8"], "--longest: at least --shortest"),
        (ppo, ["--scaling", "--response", "1"], "--scaling halves"),
        (ppo, ["--prompts", "none.jsonl"], "--prompts: no file matches none.jsonl"),
        (ppo, ["--base", "nowhere"], "--base: no model at nowhere; run `make model"),
        (reward, ["--base", "nowhere"], "--base: no model at nowhere; run `make model"),
        (reward, ["--pairs", "8"], "two optimizer steps"),
        (reward, ["--ranked", "3"], "two optimizer steps"),
        (reward, ["--rounds", "0"], "at least 1"),
        (reward, ["--comparisons", "none-*.jsonl"], "no file matches none"),
    ],
)
def test_a_mistake_is_an_error_before_anything_runs(module, words, message, inside):
    with pytest.raises(UserError, match=message):
        run(inside, module, *words)
    assert not (inside / "calls.json").exists()


def test_quick_is_small_and_does_not_touch_the_kept_results(inside):
    found = reward.benchmark(["--quick"], stand_in(inside))
    calls = json.loads((inside / "calls.json").read_text())
    assert [kind for kind, *_ in calls[:3]] == ["tiny", "prepare", "prepare"]
    assert len(found["runs"]) == 6
    assert {task["scale"] for kind, task, _ in calls if kind == "prepare"} == {0.15}
    assert sorted(p.name for p in inside.iterdir()) == ["base", "calls.json", "child.py"]
    quick = ppo.parse(["--quick", "--prompts", str(TEXTS)])
    assert (quick.rounds, quick.steps, quick.output, quick.their_micro_batch) == (1, 1, None, 2)
    assert reward.parse([]).rounds == 3


def test_the_scaling_is_ours_alone_one_thing_changed_at_a_time_and_needs_no_peer(inside, monkeypatch):
    done = run(inside, ppo, "--scaling", "--rounds", "0", name="ppo_scaling")
    assert not {"ratios", "speed_ratio_all_layers"} & set(done.report)
    assert [kind for kind, _ in done.sides] == ["ours"] * 7
    assert [(Path(t["rows"]).stem, t["response_tokens"], Path(t["base"]).name) for _, t in done.sides] == [
        ("rows-8", 48, "base"), ("rows-16", 48, "base"), ("rows-32", 48, "base"), ("rows-16", 24, "base"),
        ("rows-16", 96, "base"), ("rows-16", 48, "random-1"), ("rows-16", 48, "random-2"),
    ]  # fmt: skip
    made = [task for kind, task, _ in done.calls if kind == "random"]
    assert [(Path(t["folder"]).name, t["parts"]) for t in made] == [("random-1", 1), ("random-2", 2)]
    assert len(done.report["scaling"]) == 7
    assert all(found["words"] in done.page for found in done.report["scaling"])
    assert not any(path for *_, path in done.calls if "trl" in (path or ""))


def test_fewer_leaves_out_what_has_no_target(inside):
    done = run(inside, ppo, "--fewer", "--rounds", "2")
    assert [(kind, task["layers"]) for kind, task in done.sides] == [
        ("ours", "all"), ("theirs", "all"), ("ours", "top_10"),
        ("theirs", "all"), ("ours", "all"), ("ours", "top_10"),
    ]  # fmt: skip
    assert set(done.report["ratios"]) == {n for n, (*_, target) in RATIOS[ppo].items() if target is not None}
