"""The check of a machine's GPUs survives whatever a part does, and tells it."""

import json
import sys
import time

import pytest

from benchmarks.gpu_check import __main__, child, parts, report
from benchmarks.gpu_check.parts import PARTS, Machine, Part
from benchmarks.gpu_check.roads import Deadline, Failure, Road, call, largest_difference

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
