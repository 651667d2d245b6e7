"""A stop by Ctrl-C, SIGTERM or SIGHUP saves, is one line, and the same command goes on to the same end."""

import os
import shutil
import signal
import time

import pytest
from sft_cases import FAST, begun

from benchmarks.faults.killed_process import Start
from rlhf.runs.artifacts import MANIFEST, read_json

OPTIONS = {
    "sft": (*FAST, "sft.epochs=2", "sft.checkpoint_every=1000"),
    "reward": (*FAST, "reward.epochs=3", "reward.checkpoint_every=1000"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The tiny model and comparisons."""
    return begun(tmp_path_factory.mktemp("lab") / "here")


@pytest.mark.parametrize(("name", "number"), [("sft", signal.SIGINT), ("reward", signal.SIGHUP)])
def test_a_stopped_training_saves_its_last_step_and_goes_on(name, number, lab, tmp_path):
    alone, here = (shutil.copytree(lab, tmp_path / folder) for folder in ("alone", "here"))
    whole = Start(alone, OPTIONS[name], name=name)
    assert whole.wait() == 0, whole.output()
    stopped = Start(here, OPTIONS[name], name=name)
    log = here / f"runs/tiny/{name}/metrics.jsonl"
    while stopped.process.is_alive() and not (log.is_file() and log.read_text().count("\n") >= 2):
        time.sleep(0.001)
    os.kill(stopped.process.pid, number)
    assert stopped.wait() == 128 + number, stopped.output()
    assert f"{name}: asked to stop ({number.name}); saved after step " in stopped.output()
    assert "Traceback" not in stopped.output()
    assert not (here / f"runs/tiny/{name}/{MANIFEST}").exists()
    again = Start(here, OPTIONS[name], name=name)
    assert again.wait() == 0, again.output()
    assert f"{name}: going on after step " in again.output()
    ends = [read_json(folder / f"runs/tiny/{name}/{MANIFEST}") for folder in (alone, here)]
    adapters = [{n: h for n, h in end["files"].items() if n.endswith(".safetensors")} for end in ends]
    assert adapters[0] == adapters[1] != {}
    assert ends[0]["results"] == ends[1]["results"]
