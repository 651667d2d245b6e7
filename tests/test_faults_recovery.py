"""Full disks, damaged checkpoints, failing score functions, changed tokenizers: one line and status 2.

They cost no more than the steps since the last checkpoint: with the fault corrected, the run goes on and ends
as if nothing had happened.
"""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import slow_but

from benchmarks.faults.killed_process import FULL_DISK, STATEFUL, STEPS, Plan, Start, link_stages, outcome
from rlhf.runs.artifacts import write_manifest
from rlhf.training.metrics import Metrics

HERE = "runs/tiny/ppo"


@pytest.fixture(scope="module")
def stopped(road, tmp_path_factory):
    """A run killed after its last checkpoint, with two of them."""
    folder = link_stages(road, tmp_path_factory.mktemp("stopped") / "run")
    assert Start(folder, STATEFUL, Plan("finish")).wait() == -signal.SIGKILL
    assert len(checkpoints(folder)) == 2
    return folder


def checkpoints(folder):
    return sorted((folder / HERE / "checkpoints").glob("*"))


def contents(folder):
    """Every file of every checkpoint."""
    return {
        p.relative_to(folder): p.read_bytes() for p in (folder / HERE).rglob("step-*/**/*") if p.is_file()
    }


def goes_on(folder, alone, step):
    """Start again; it goes on after a step and ends as if nothing had happened."""
    again = Start(folder)
    assert f"ppo: going on after step {step} of {STEPS}" in again.finish()
    assert outcome(folder) == outcome(alone.root)
    return again.output()


def refusal(start):
    """The only line that looks like an error, of a start that ends with status 2."""
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    return line


def assert_full(start):
    line = refusal(start)
    assert line.startswith("error: the disk is full")
    assert line.endswith("run the same command again; the last complete checkpoint is untouched")


# ---- a full disk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "visit", "step"),
    [
        ("sync", 68, 2),  # in the third checkpoint: each has 29 syncs and 11 renames
        ("rename", 26, 2),
        ("log", 3, 3),
    ],
)
def test_a_disk_that_is_full_at_any_write_costs_only_the_steps_since(
    phase, visit, step, road, alone, tmp_path
):
    here = link_stages(road, tmp_path / "here")
    assert_full(Start(here, STATEFUL, Plan(phase, visit, 0.0, FULL_DISK)))
    assert [p.name for p in checkpoints(here)] == [f"step-{n:07d}" for n in (step - 1, step)]
    goes_on(here, alone, step)


def test_a_line_of_metrics_is_on_the_disk_before_its_checkpoint(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, total=1, done=0, shown={}, description="x")
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, metrics.file.read_text()))
    )
    metrics.log(1, {"x": 0.5})
    metrics.close()
    assert (metrics.file.stat().st_ino, '{"step": 1, "x": 0.5}\n') in synced


@pytest.mark.slow
def test_a_disk_that_really_fills_up(road, alone, tmp_path, small_disk):
    here = link_stages(road, tmp_path / "here")
    disk = small_disk(tmp_path / "here" / HERE)
    first = Start(here, STATEFUL, Plan("checkpoint", 2))
    assert first.wait() == -signal.SIGKILL
    before = contents(here)
    assert [p.name for p in checkpoints(here)] == ["step-0000001", "step-0000002"]
    size = sum(map(len, before.values())) // 2
    filler = disk / "filler"
    for room in (0, 4096, size // 3, size - 8192):
        free = shutil.disk_usage(disk).free
        with contextlib.suppress(FileNotFoundError):
            free += filler.stat().st_size
        filler.write_bytes(b"x" * max(0, free - room))
        assert_full(Start(here))
        assert contents(here) == before, f"with room for {room} bytes"
    filler.unlink()
    goes_on(here, alone, 2)


# ---- damaged checkpoints


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.slow
@pytest.mark.parametrize("damage", slow_but([flip], [flip, truncate, Path.unlink]))
@pytest.mark.parametrize("name", ["policy/adapter_model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(damage, name, stopped, alone, tmp_path):
    here = Path(shutil.copytree(stopped, tmp_path / "here", symlinks=True))
    file = checkpoints(here)[-1] / name
    damage(file)
    said = goes_on(here, alone, STEPS - 1)
    what = "missing" if damage is Path.unlink else "damaged"
    assert f"warning: {file.relative_to(here)} is {what}" in said
    assert f"using step-{STEPS - 1:07d} instead" in said


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_is_refused_and_left_alone(stopped, tmp_path):
    here = Path(shutil.copytree(stopped, tmp_path / "here", symlinks=True))
    for checkpoint in checkpoints(here):
        flip(checkpoint / "optimizer.safetensors")
    before = contents(here)
    line = refusal(Start(here))
    assert line.startswith("error: no checkpoint can be used: runs/tiny/ppo/checkpoints/step-")
    assert line.endswith("remove runs/tiny/ppo/checkpoints to start again")
    assert contents(here) == before


# ---- a score function that fails


def from_the_third_step(fault):
    """Let the reward model of the stage do something else from its ninth call: a rollout has four."""
    from policy.ppo.setup import EnsembleScore

    real, calls = EnsembleScore.__call__, iter(range(10**6))
    EnsembleScore.__call__ = lambda self, said: (
        fault(real(self, said)) if next(calls) >= 8 else real(self, said)
    )


def raises():
    def judge(scores):
        raise ConnectionError("the judge is not there\nsecond line")

    from_the_third_step(judge)


def hangs():
    import threading

    from_the_third_step(lambda scores: threading.Event().wait())


FAULTS = {
    raises: "ppo: the reward function failed on 4 responses (ConnectionError: the judge is not there)",
    hangs: "ppo: the reward function has not answered for 0.05 minutes (ppo.score_timeout_minutes)",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_score_function_that_fails_ends_the_run_and_mended_it_goes_on(fault, road, alone, tmp_path):
    here = link_stages(road, tmp_path / "here")
    limit = ("ppo.score_timeout_minutes=0.05",) if fault is hangs else ()
    line = refusal(Start(here, (*STATEFUL, *limit), before=fault))
    assert line.startswith(f"error: {FAULTS[fault]}")
    assert not (here / HERE / "manifest.json").exists()
    goes_on(here, alone, 2)  # the limit may be another one


# ---- a tokenizer that changed between two starts


def own_model(folder, road):
    """A folder whose model may be changed."""
    (folder / "models").unlink()
    shutil.copytree(road / "models", folder / "models")
    return folder / "models" / "tiny" / "tokenizer.json"


def swap_two_tokens(file):
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_tokenizer_is_refused_with_the_folder(finished, road, alone, tmp_path):
    here = link_stages(road, tmp_path / "here")
    tokenizer = own_model(here, road)
    old = tokenizer.read_bytes()
    first = Start(here, STATEFUL, None if finished else Plan("rollout", 2))
    assert first.wait() == (0 if finished else -9), first.output()
    swap_two_tokens(tokenizer)
    line = refusal(Start(here))
    state = "was finished" if finished else "was begun"
    assert line.startswith(f"error: {HERE} {state} with another recipe or data (data file tokenizer.json: ")
    tokenizer.write_bytes(old)
    Start(here).finish()
    assert outcome(here) == outcome(alone.root)


def test_a_checkpoint_of_another_token_contract_is_refused(road, tmp_path):
    """Where the files are not in a folder, or the template of the recipe's own code changed."""
    here = link_stages(road, tmp_path / "here")
    assert Start(here, STATEFUL, Plan("rollout", 1)).wait() == -9
    checkpoint = here / HERE / "checkpoints" / "step-0000001"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"contract": "0" * 64}))
    write_manifest(checkpoint, {"step": 1})
    line = refusal(Start(here))
    assert line == (
        f"error: {HERE}/checkpoints/step-0000001: the tokenizer or its template has changed since it was "
        f"written, so the run cannot go on; put the old one back, or remove {HERE} to start again"
    )
