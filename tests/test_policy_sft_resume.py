"""A fine-tuning that is killed at any moment ends bit for bit where an uninterrupted one does."""

import json
import shutil

from sft_cases import FAST, begun

from benchmarks.faults.killed_process import Start
from rlhf.runs.artifacts import sha256_of


def start(folder):
    return Start(folder, (*FAST, "sft.epochs=2"), name="sft")


def left(folder):
    """Everything of a finished stage that must not depend on interruptions."""
    done = folder / "runs/tiny/sft"
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    files = {p.name: sha256_of(p) for p in sorted((done / "policy").iterdir())}
    return lines, files, json.loads((done / "manifest.json").read_text())["results"]


def test_a_stage_that_was_killed_twice_ends_bit_for_bit_as_if_it_had_not_been(tmp_path):
    lab = begun(tmp_path / "here")
    alone = shutil.copytree(lab, tmp_path / "alone")
    whole = start(alone)
    assert whole.wait() == 0, whole.output()
    steps = len(left(alone)[0])
    for number, goal in enumerate((2, steps - 2)):
        killed = start(lab)
        assert killed.kill_when((lab / f"runs/tiny/sft/checkpoints/step-{goal:07d}").exists)
        assert ("sft: going on after step" in killed.output()) == bool(number)
        assert not (lab / "runs/tiny/sft/manifest.json").exists()
    last = start(lab)
    assert last.wait() == 0, last.output()
    assert f"sft: going on after step {steps - 2}" in last.output()
    assert left(lab) == left(alone)
    assert not (lab / "runs/tiny/sft/checkpoints").exists()
