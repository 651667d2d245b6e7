"""The check of a machine's GPUs survives whatever a part does, and tells it."""

import json
import sys
import time

import pytest

from benchmarks import harness
from benchmarks.gpu_check import __main__, child, parts, report
from benchmarks.gpu_check.parts import PARTS, Machine, Part
from benchmarks.gpu_check.roads import Deadline, Failure, Road, call, largest_difference
from benchmarks.ppo import task
from rlhf.errors import UserError

CPU = Machine(0, quick=True)


def part(do, **more):
    return Part("p", "something", lambda machine, deadline: do(), 5, **more)


def fails():
    raise Failure("losses are apart")


def breaks():
    raise ZeroDivisionError("a fault")


@pytest.mark.parametrize(
    ("found", "state", "why"),
    [
        (part(lambda: {"x": 1.0}), "passed", None),
        (part(fails), "failed", "losses are apart"),
        (part(breaks), "failed", "ZeroDivisionError: a fault"),
        (part(lambda: {}, gpu_only=True), "skipped", "needs a GPU"),
    ],
)
def test_a_part_is_told_whatever_it_does(found, state, why):
    result = parts.run(found, CPU, 100.0)
    assert (result["state"], result.get("why")) == (state, why)


def test_zero_and_offload_need_more_than_one_process_and_are_never_passed_with_one():
    for name in ("zero-0", "zero-3", "offload"):
        (found,) = (p for p in PARTS if p.name == name)
        result = parts.run(found, Machine(1, quick=False), 100.0)
        assert result == {"state": "skipped", "why": "needs two GPUs: one process runs without DeepSpeed"}
        assert not found.gpu_only, "two processes of the CPU do it too"


def test_what_would_end_too_late_is_left_out():
    assert parts.run(part(breaks), CPU, 1.0)["state"] == "skipped"


def test_all_parts_stand_in_the_report_and_a_failed_one_in_the_status(tmp_path, monkeypatch):
    chosen = [part(breaks), Part("device", "d", lambda m, d: {"cpu": "an abacus", "float32_tflops": 0.5}, 5)]
    content = __main__.check(chosen, CPU, 1.0, tmp_path / "new", "the command")
    assert [p["state"] for p in content["parts"]] == ["failed", "passed"]
    page = (tmp_path / "new" / "gpu-check.md").read_text()
    assert "**FAILED**" in page
    assert "a fault" in page
    assert "an abacus" in page
    assert "1 passed, 1 failed" in page
    assert json.loads((tmp_path / "new" / "gpu-check.json").read_text())["parts"] == content["parts"]
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--output", str(tmp_path)])
    monkeypatch.setattr(__main__, "chosen", lambda arguments: chosen)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 1


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path):
    alive = tmp_path / "alive"
    with pytest.raises(Failure, match="did not end in time"):
        call(["sh", "-c", f"(sleep 1; touch {alive}) & wait"], Deadline(0.3))
    time.sleep(1)
    assert not alive.exists()


def test_the_reason_of_a_failure_is_its_last_error_line():
    script = "print('step 1'); print('RuntimeError: out of luck'); print('bye'); raise SystemExit(3)"
    with pytest.raises(Failure, match="status 3: RuntimeError: out of luck"):
        call([sys.executable, "-c", script], Deadline(20))


def test_a_process_is_killed_in_the_middle_or_it_is_a_failure(tmp_path):
    began = time.monotonic()
    call([sys.executable, "-c", "import time; time.sleep(60)"], Deadline(50), until=lambda: True)
    assert time.monotonic() - began < 20
    with pytest.raises(Failure, match="before it could be killed"):
        call([sys.executable, "-c", ""], Deadline(20), until=lambda: False)


def test_losses_are_compared_relative_to_the_largest_step_by_step():
    assert largest_difference([2.0, 4.0], [2.0, 4.4]) == pytest.approx(0.1)
    assert largest_difference([0.5], [0.4]) == pytest.approx(0.1)
    with pytest.raises(Failure, match="2 steps against 1"):
        largest_difference([1.0, 1.0], [1.0])


def test_a_log_that_is_not_finite_or_not_there_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Road("x", Deadline(5)) as road:
        folder = road.folder / "ppo"
        folder.mkdir(parents=True)
        with pytest.raises(Failure, match="no policy/loss"):
            road.column("ppo", "policy/loss")
        (folder / "metrics.jsonl").write_text('{"policy/loss": 1.0}\n{"policy/loss": NaN}\n')
        assert road.steps("ppo") == 2
        with pytest.raises(Failure, match="not finite"):
            road.column("ppo", "policy/loss")
    assert not road.folder.exists()


def test_a_difference_between_devices_fails_the_part(monkeypatch):
    losses = iter([[1.0], [1.0], [1.0], [1.01]])
    monkeypatch.setattr(Road, "run", lambda self, *packages, until=None: None)
    monkeypatch.setattr(Road, "column", lambda self, stage, name: next(losses))
    with pytest.raises(Failure, match=r"1\.0e-02 apart"):
        parts.parity(CPU, Deadline(5))


def test_steps_over_a_known_shape_are_measured():
    found = child.ppo("8b", quick=True)
    assert found["s_per_step"] > 0
    assert 0 < found["share_of_bfloat16_peak"] < 1
    assert 0.3e9 < found["planned_bytes"] < 3e9  # libraries, and a model of a few megabytes
    assert "process" in report.line(found)
    assert "GB" in report.line(found)


def test_ours_and_the_installed_trl_do_the_same_work(tmp_path):
    found = child.sides(str(tmp_path), ["ours", "rloo"], samples=4, quick=True)
    compared = parts.compared(found, "rloo")
    for side in found.values():
        assert (side["rows"], side["measured_steps"]) == (4, 1)
        assert 4 <= side["response_tokens"] <= 4 * 4
        assert side["sampled_per_s"] * side["s_per_step"] == pytest.approx(side["response_tokens"])
        tokens = side["prompt_tokens"] + side["response_tokens"]
        assert side["trained_per_s"] * side["s_per_step"] == pytest.approx(2 * tokens)  # epochs
        assert side["gpu_bytes"] is None
    assert compared["their_time_a_step_over_ours"] > 0
    assert "their_gpu_memory_over_ours" not in compared
    (rows,) = report.beside([{"name": "t", "figures": compared}, {"name": "failed"}])
    assert [line.split("|")[1].strip() for line in rows.splitlines()[2:]] == ["t: ours", "t: rloo"]


@pytest.mark.parametrize(("side", "quick"), [("theirs", False), ("rloo", False), ("rloo", True)])
def test_sides_have_the_first_card_and_processes_of_their_own(monkeypatch, tmp_path, side, quick):
    asked = []
    figures = dict.fromkeys(("s_per_step", "s_per_token", "sampled_per_s", "trained_per_s"), 2.0)
    figures |= {"rows": 4, "prompt_tokens": 9, "response_tokens": 16.0, "gpu_bytes": 6e9, "peak_bytes": 1e9}

    def measure(kind, values, deadline, told):
        asked.append((values["names"], told))
        return {name: figures | {"gpu_bytes": 3e9 if name == "ours" else 6e9} for name in values["names"]}

    monkeypatch.setattr(parts, "child", measure)
    monkeypatch.setattr(parts, "peer_folder", lambda seconds: tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    found = parts.beside(side, 4)(Machine(2, quick), Deadline(9))
    assert [names for names, _ in asked] == ([["ours", side]] if quick else [[], ["ours"], [side]])
    told = {told["CUDA_VISIBLE_DEVICES"] + told.get("PYTHONPATH", "").split(":")[0] for _, told in asked}
    assert told == {f"3{tmp_path}" if side == "theirs" else "3"}
    assert found["their_gpu_memory_over_ours"] == 2
    assert "6.00" in report.beside([{"name": "t", "figures": found}])[0]
    with pytest.raises(Failure, match="other prompts"):
        parts.compared({"ours": figures, side: figures | {"prompt_tokens": 8}}, side)


def test_a_release_that_is_not_in_place_leaves_its_part_out(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(harness.subprocess, "run", lambda *words, **options: 1 / 0)  # nothing is installed
    found = parts.run(Part("p", "w", parts.beside("theirs", 1), 5), CPU, 100.0)
    assert found["state"] == "skipped"
    assert "not in place: trl==1.12.0: run `make bench-ppo BENCH=--quick` once" in found["why"]

    def late(command, timeout, **options):
        raise harness.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(harness.subprocess, "run", late)
    with pytest.raises(UserError, match=r"cannot be installed \(pip took more than 20 s\)"):
        harness.peer_folder(tmp_path / "kept", 20)
    assert not list((tmp_path / "kept").iterdir())


def test_a_step_ends_when_the_gpu_has_done_its_work(monkeypatch):
    waits = []
    clock = task.Clock()
    monkeypatch.setattr(task.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(task.torch.cuda, "synchronize", lambda: waits.append(time.sleep(0.05)))
    clock.end_step({}, 0.0)
    assert len(waits) == 1
    assert clock.steps[0].seconds >= 0.05


@pytest.mark.parametrize(("name", "billions"), [("0.6b", 0.596), ("8b", 8.03)])
def test_the_shapes_have_the_published_sizes(name, billions):
    import torch
    from transformers import AutoModelForCausalLM

    kind, values = child.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**values))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_command_line_chooses_parts():
    quick = __main__.chosen(__main__.parse(["--quick"]))
    assert 2 < len(quick) < len(PARTS)
    assert [p.name for p in __main__.chosen(__main__.parse(["--parts", "nf4", "device"]))] == [
        "device",
        "nf4",
    ]
    assert len({p.name for p in PARTS}) == len(PARTS)
    with pytest.raises(Exception, match="--minutes 0"):
        __main__.parse(["--minutes", "0"])
