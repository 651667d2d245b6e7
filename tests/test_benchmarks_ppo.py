"""The PPO benchmark: figures and ratios on stand-ins, both sides on a tiny model; no timing."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import harness, peer
from benchmarks.ppo import __main__ as ppo
from benchmarks.ppo.ours import ours
from benchmarks.ppo.sides import prepare
from benchmarks.ppo.task import Task, dialogue_of
from benchmarks.ppo.work import sizes_of
from rlhf.errors import UserError
from rlhf.models.tiny import tiny_model, write_tiny_model
from rlhf.runs.artifacts import read_json, write_json

LAYERS, PROMPTS = 3, str(ROOT / ppo.PROMPTS)

# ------------------------------------------------------------------ the two sides


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows(base):
    return prepare(base, PROMPTS, 4, 16, 64, 0)


def test_prompts_have_the_wanted_lengths_and_are_those_of_the_seed(base, rows):
    dialogue = dialogue_of(base)
    assert rows == prepare(base, PROMPTS, 6, 16, 64, 0)[:4]
    assert rows != prepare(base, PROMPTS, 4, 16, 64, 1)
    assert all(row["ids"] == dialogue.tokenizer(row["text"])["input_ids"] for row in rows)
    many = [len(row["ids"]) for row in prepare(base, PROMPTS, 60, 30, 40, 0)]
    assert {min(many), max(many)} <= {30, 31, 39, 40}
    assert len(set(many)) > 5
    assert dialogue.pad_id not in [i for row in rows for i in row["ids"]]


def test_prompts_are_texts_of_the_file_joined(base, tmp_path):
    (tmp_path / "some.txt").write_text("abc\ndef\nghi\n")
    (row,) = prepare(base, str(tmp_path / "some.txt"), 1, 11, 11, 0)
    assert sorted(row["text"].split()) == ["abc", "def", "ghi"]
    with pytest.raises(UserError, match=r"some.txt: 3 texts make 1 prompts of 11 to 11 tokens, 2 are wanted"):
        prepare(base, str(tmp_path / "some.txt"), 2, 11, 11, 0)


def task_of(base, rows, folder, **values):
    write_json(folder / "rows.json", {"rows": rows})
    small = {"response_tokens": 6, "epochs": 2, "micro_batch": 2, "threads": 1}
    return Task(base, str(folder / "rows.json"), **{"layers": "top_1", **small, **values})


def test_ours_runs_the_steps_of_a_task(base, rows, tmp_path):
    found = {k: ours(task_of(base, rows, tmp_path, layers=k), rows, tmp_path / k) for k in ("all", "top_1")}
    for figures_ in found.values():
        assert len(figures_["step_s"]) == 3
        assert figures_["prompt_tokens"] == sum(len(row["ids"]) for row in rows)
        assert 1 <= figures_["mean_response_tokens"] <= 6
        assert figures_["rollout_s"] + figures_["update_s"] == pytest.approx(figures_["s_per_step"], rel=0.5)
    assert (found["all"]["trunk_kept"], found["top_1"]["trunk_kept"]) == (False, True)
    whole, top = (found[k]["trainable_parameters"] - 33 for k in ("all", "top_1"))  # the value's head
    assert whole == LAYERS * top
    lines = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    assert [line["policy/updates"] for line in lines] == [2, 2, 2]
    assert found["all"]["response_tokens"] == pytest.approx(
        sum(4 * line["response/length"] for line in lines[1:]) / 2
    )


def test_ours_refuses_prompts_that_are_other_tokens(base, rows, tmp_path):
    wrong = [{**rows[0], "ids": rows[1]["ids"]}, *rows[1:]]
    with pytest.raises(RuntimeError, match="not the token ids"):
        ours(task_of(base, wrong, tmp_path), wrong, tmp_path)


RELEASE = peer.FOLDER / "trl-1.12.0"


@pytest.mark.skipif(not (ROOT / RELEASE).is_dir(), reason="the peer is installed by `make bench-ppo`")
def test_theirs_runs_the_same_task_with_its_own_release(base, rows, tmp_path):
    write_json(tmp_path / "task.json", vars(task_of(base, rows, tmp_path, steps=2)))
    told = peer.with_peer(harness.environment(1), ROOT / RELEASE)
    command = [*ppo.CHILD, "theirs", str(tmp_path / "task.json"), str(tmp_path / "result.json")]
    found = harness.run_child(command, tmp_path / "result.json", told)
    assert found["versions"]["trl"] == "1.12.0"
    assert len(found["step_s"]) == 2
    assert found["prompt_tokens"] == sum(len(row["ids"]) for row in rows)
    assert 1 <= found["mean_response_tokens"] <= 6
    whole = found["generate_s"] + found["score_s"] + found["update_s"]
    assert whole == pytest.approx(found["s_per_step"], rel=1e-3)
    assert min(found["generate_s"], found["score_s"], found["update_s"]) > 0
    mine = sizes_of(tiny_model(40))
    adapter = 8 * sum(m.inputs + m.outputs for m in mine.linears)
    classifier = 259 * 32 + LAYERS * (mine.layer_weights + 2 * 32) + 32 + 32  # embeddings, norms, head
    assert found["trainable_parameters"] == adapter + classifier


# ------------------------------------------------------------------ the peer's folder


def pip(status, calls):
    def run(command, **options):
        calls.append(command)
        if not status:
            (Path(command[command.index("--target") + 1]) / "trl-1.12.0.dist-info").mkdir()
        return subprocess.CompletedProcess(command, status, "", "WARNING: x\nERROR: no network\n")

    return run


def test_the_peer_is_installed_once_without_its_dependencies(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(peer.subprocess, "run", pip(0, calls))
    folder = peer.peer_folder("trl", "1.12.0", tmp_path / "kept")
    assert folder == tmp_path / "kept" / "trl-1.12.0"
    assert (folder / "trl-1.12.0.dist-info").is_dir()
    assert peer.peer_folder("trl", "1.12.0", tmp_path / "kept") == folder
    assert len(calls) == 1
    assert calls[0][-1] == "trl==1.12.0"
    assert "--no-deps" in calls[0]
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["trl-1.12.0"]


def test_a_peer_that_cannot_be_installed_is_told_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(peer.subprocess, "run", pip(1, []))
    with pytest.raises(UserError, match=r"trl==1.12.0.*ERROR: no network.*with a network") as caught:
        peer.peer_folder("trl", "1.12.0", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_peer_comes_first_on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    assert peer.with_peer({"A": "1"}, Path("/p")) == {"A": "1", "PYTHONPATH": f"/p{os.pathsep}before"}
    monkeypatch.delenv("PYTHONPATH")
    assert peer.with_peer({}, Path("/p")) == {"PYTHONPATH": "/p"}


# ------------------------------------------------------------------ the benchmark

# A child that measures nothing: its figures follow from the case, the side and the number of its call.
STAND_IN = """
import json, os, pathlib, sys
kind, task, result = sys.argv[1:]
task = json.loads(pathlib.Path(task).read_text())
log = pathlib.Path({log!r})
calls = json.loads(log.read_text()) if log.is_file() else []
log.write_text(json.dumps([*calls, [kind, task, os.environ.get("PYTHONPATH")]]))
figures = {{}}
if kind == "prepare":
    figures = {{"rows": [{{"text": "x", "ids": [5] * (16 + i)}} for i in range(task["number"])]}}
elif kind == "matmul":
    figures = {{"flops_per_s": 1e9 * len(calls)}}
elif kind in ("ours", "theirs"):
    rows = json.loads(pathlib.Path(task["rows"]).read_text())["rows"]
    cost = (6.0 if kind == "theirs" else 2.0) + 0.01 * len(calls) ** 2
    cost /= 2.0 if task["layers"] != "all" else 1.0
    prompt = sum(len(r["ids"]) for r in rows)
    figures = dict(step_s=[9.0, cost], measured_steps=task["steps"] - 1, s_per_step=cost,
        cpu_s_per_step=cost * (9 if kind == "theirs" else 1), update_s=0.5 * cost, rollout_s=0.5 * cost,
        rows=len(rows), prompt_tokens=prompt, response_tokens=40.0, mean_response_tokens=2.5,
        tokens_per_s=100 / cost, s_per_token=cost / (200 if kind == "theirs" else 100),
        flops_per_step=1e9, flops_per_s=1e9 / cost, peak_bytes=1e9 * (3 + len(kind)) + len(calls) * 1e6,
        trainable_parameters=7, threads=task["threads"],
        versions={{n: "2" for n in ("torch", "transformers", "peft", "accelerate")}})
    if kind == "theirs":
        figures["versions"]["trl"] = "1.12.0"
        figures |= dict(generate_s=0.3 * cost, score_s=0.2 * cost)
    figures |= {extra}
pathlib.Path(result).write_text(json.dumps(figures))
"""


def stand_in(folder, extra="{}"):
    """The command of a stand-in child that notes its calls in ``calls.json``."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text('{"num_hidden_layers": 30}')
    (folder / "texts.jsonl").touch()
    (folder / "child.py").write_text(STAND_IN.format(log=str(folder / "calls.json"), extra=extra))
    return [sys.executable, "-S", str(folder / "child.py")]


def run(command, *words):
    fixed = ["--base", "base", "--prompts", str(Path("texts.jsonl").absolute()), "--output", "out"]
    return ppo.benchmark([*fixed, *words], command, lambda package, version: Path(f"/{package}-{version}"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Report, calls and page of a benchmark of three rounds."""
    folder = tmp_path_factory.mktemp("bench")
    before, printed = os.getcwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            report = run(stand_in(folder), "--scaling", "--their-micro-batch", "16")
    finally:
        os.chdir(before)
    page = (folder / "out" / "ppo.md").read_text()
    assert report == read_json(folder / "out" / "ppo.json")
    return report, json.loads((folder / "calls.json").read_text()), page, folder


def median(report, case, side, name):
    return sorted(r[name] for r in report["runs"] if (r["case"], r["side"]) == (case, side))[1]


def test_the_result_holds_the_ratios_of_the_medians(finished):
    report = finished[0]
    assert len(report["runs"]) == 3 * 2 * 2
    for name, figure, theirs, mine, target in [
        ("speed_ratio_all_layers", "s_per_step", "all_layers", "all_layers", 1.5),
        ("speed_ratio_top_third", "s_per_step", "all_layers", "top_third", 4.0),
        ("speed_ratio_top_third_same_layers", "s_per_step", "top_third", "top_third", None),
        ("memory_ratio", "peak_bytes", "all_layers", "all_layers", 3.0),
        ("memory_ratio_top_third", "peak_bytes", "all_layers", "top_third", 3.0),
        ("memory_ratio_top_third_same_layers", "peak_bytes", "top_third", "top_third", None),
    ]:
        expected = median(report, theirs, "theirs", figure) / median(report, mine, "ours", figure)
        assert report[name] == report["ratios"][name]["value"] == pytest.approx(expected)
        assert report["ratios"][name]["target"] == target
        assert len(report["ratios"][name]["by_round"]) == 3
    assert len(report["ratios"]) == 6
    speed = report["ratios"]["speed_ratio_all_layers"]
    assert speed["by_processor_time"] == pytest.approx(9 * speed["value"])
    assert speed["by_token"] == pytest.approx(speed["value"] / 2)


def test_a_target_is_reached_or_not(finished):
    for theirs, reached in ((1.5, True), (1.49, False)):
        made = [{**r, "s_per_step": 1.0 if r["side"] == "ours" else theirs} for r in finished[0]["runs"]]
        found = ppo.evaluate(made)
        assert found["speed_ratio_all_layers"]["reached"] is reached
        assert found["speed_ratio_top_third_same_layers"]["reached"] is None


def test_the_share_is_of_the_best_measured_peak(finished):
    report, calls, _, _ = finished
    peaks = [1e9 * number for number, (kind, *_) in enumerate(calls) if kind == "matmul"]
    assert report["matmul_peak"] == {"flops_per_s": max(peaks), "measured": peaks}
    assert len(peaks) == 2
    for case, side in itertools.product(ppo.CASES, ppo.SIDES):
        expected = median(report, case, side, "flops_per_s") / max(peaks)
        assert report["matmul_share"][case][side] == pytest.approx(expected)


def test_both_sides_get_the_same_tasks_in_turn_and_only_theirs_the_peer(finished):
    _, calls, _, _ = finished
    sides = [(kind, task, path) for kind, task, path in calls if kind in ppo.SIDES][:12]
    assert [kind for kind, *_ in sides] == ["ours", "theirs"] * 2 + ["theirs", "ours"] * 2 + [
        "ours",
        "theirs",
    ] * 2
    assert [task["layers"] for _, task, _ in sides[::2]] == ["all", "top_10"] * 3
    assert [task["seed"] for _, task, _ in sides] == [0] * 4 + [1] * 4 + [2] * 4
    for (_, one, _), (_, other, _) in zip(sides[::2], sides[1::2], strict=True):
        assert {one.pop("micro_batch"), other.pop("micro_batch")} == {8, 16}
        assert one == other
        assert (one["response_tokens"], one["epochs"], one["steps"], one["value"]) == (48, 4, 3, "full")
        assert Path(one["rows"]).name == "rows-16.json"
    for kind, _, path in sides:
        assert ((path or "").split(os.pathsep)[0] == "/trl-1.12.0") is (kind == "theirs")


def test_the_scaling_is_ours_alone_one_thing_changed_at_a_time(finished):
    report, calls, page, _ = finished
    tasks = [task for kind, task, _ in calls if kind in ppo.SIDES][12:]
    assert [kind for kind, *_ in calls if kind in ppo.SIDES][12:] == ["ours"] * 7
    assert [(Path(t["rows"]).stem, t["response_tokens"]) for t in tasks] == [
        ("rows-8", 48), ("rows-16", 48), ("rows-32", 48), ("rows-16", 24), ("rows-16", 96),
        ("rows-16", 48), ("rows-16", 48),
    ]  # fmt: skip
    assert [Path(t["base"]).name for t in tasks] == ["base"] * 5 + ["random-1", "random-2"]
    made = [task for kind, task, _ in calls if kind == "random"]
    assert [(Path(t["folder"]).name, t["parts"]) for t in made] == [("random-1", 1), ("random-2", 2)]
    assert len(report["scaling"]) == 7
    assert all(found["words"] in page for found in report["scaling"])


def test_the_page_says_what_was_measured_and_holds_no_path(finished):
    report, _, page, folder = finished
    text = json.dumps(report) + page
    assert str(folder) not in text
    assert tempfile.gettempdir() not in text
    assert "16 tokens" not in page
    assert "prompts of 16 to 31 tokens (made of texts.jsonl)" in page
    assert "trl 1.12.0" in page
    for name in ("speed_ratio_all_layers", "memory_ratio_top_third"):
        assert f"| {report[name]:.2f} |" in page
    cost = report["medians"]["all_layers"]["theirs"]["s_per_step"]
    assert f"| all layers adapted: theirs | {cost:.2f} | {0.3 * cost:.2f} | {0.2 * cost:.2f} |" in page
    assert f"| {report['matmul_share']['top_third']['ours']:.1%} |" in page
    assert "4.0, missed" in page or "4.0, reached" in page
    assert all(note in page for note in report["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": 1}, "prompt_tokens differs"),
        ({"threads": 9}, "threads differs"),
        (
            {"versions": dict.fromkeys(("torch", "transformers", "peft", "accelerate", "trl"), "3")},
            "of torch",
        ),
    ],
)
def test_sides_that_did_other_work_are_refused(change, message, finished):
    runs = finished[0]["runs"]
    ppo.check_same_work(runs)
    with pytest.raises(RuntimeError, match=message):
        ppo.check_same_work([{**runs[0], **change}, *runs[1:]])


def test_another_release_of_the_peer_is_refused(finished):
    runs = [{**r, "versions": {**r["versions"], "trl": "1.16.0"}} for r in finished[0]["runs"]]
    with pytest.raises(RuntimeError, match=r"trl \['1.16.0'\], not 1.12.0"):
        ppo.check_same_work(runs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps: at least 1"),
        (["--micro-batch", "5"], "--micro-batch 5: use a divisor of --batch 16"),
        (["--their-micro-batch", "5"], "--their-micro-batch 5"),
        (["--longest", "8"], "--longest: at least --shortest"),
        (["--base", "nowhere"], "--base: no model at nowhere; run `make model"),
        (["--prompts", "none.jsonl"], "--prompts: no file matches none.jsonl"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(stand_in(tmp_path), *words)
    assert not (tmp_path / "calls.json").exists()


def test_quick_writes_nothing_unless_asked():
    quick = ppo.parse(["--quick"])
    assert (quick.rounds, quick.steps, quick.output, quick.their_micro_batch) == (1, 1, None, 2)


def test_the_scaling_alone_runs_no_side_and_needs_no_peer(inside):
    def no_peer(package, version):
        raise AssertionError("asked for the peer")

    words = ["--base", "base", "--prompts", str(Path("texts.jsonl").absolute()), "--output", "out"]
    report = ppo.benchmark([*words, "--scaling", "--rounds", "0"], stand_in(Path()), no_peer)
    calls = json.loads(Path("calls.json").read_text())
    assert [kind for kind, *_ in calls if kind in ppo.SIDES] == ["ours"] * 7
    assert not {"ratios", "runs", "speed_ratio_all_layers"} & set(report)
    page = Path("out/ppo_scaling.md").read_text()
    assert all(found["words"] in page for found in report["scaling"])
    with pytest.raises(UserError, match=r"--rounds: at least 1"):
        ppo.parse(["--rounds", "0"])


def test_fewer_leaves_out_what_has_no_target(inside):
    report = run(stand_in(Path()), "--fewer", "--rounds", "2")
    calls = json.loads(Path("calls.json").read_text())
    assert [(k, t["layers"]) for k, t, _ in calls if k in ppo.SIDES] == [
        ("ours", "all"), ("theirs", "all"), ("ours", "top_10"),
        ("theirs", "all"), ("ours", "all"), ("ours", "top_10"),
    ]  # fmt: skip
    assert set(report["ratios"]) == set(ppo.RATIOS) - {
        "speed_ratio_top_third_same_layers",
        "memory_ratio_top_third_same_layers",
    }
    assert "our top third" in Path("out/ppo.md").read_text()
