"""A full disk and damaged checkpoints cost no more than the steps since, and are named in one line."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from benchmarks.faults.killed_process import FULL_DISK, STATEFUL, STEPS, Plan, Start, link_stages, outcome
from rlhf.training.metrics import Metrics


@pytest.fixture(scope="module")
def alone(road, tmp_path_factory):
    """What a run left alone leaves."""
    folder = link_stages(road, tmp_path_factory.mktemp("alone") / "run")
    start = Start(folder)
    assert start.wait() == 0, start.output()
    return outcome(folder)


@pytest.fixture(scope="module")
def stopped(road, tmp_path_factory):
    """A run killed after its last checkpoint, with two of them."""
    folder = link_stages(road, tmp_path_factory.mktemp("stopped") / "run")
    assert Start(folder, STATEFUL, Plan("finish")).wait() == -signal.SIGKILL
    assert len(checkpoints(folder)) == 2
    return folder


def checkpoints(folder):
    return sorted((folder / "runs/tiny/ppo/checkpoints").glob("*"))


def contents(checkpoint):
    return {p.relative_to(checkpoint): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


def goes_on(folder, alone, step):
    """Start again; it goes on after a step and ends as if nothing had happened."""
    again = Start(folder)
    assert again.wait() == 0, again.output()
    assert f"ppo: going on after step {step} of {STEPS}" in again.output()
    assert outcome(folder) == alone
    return again.output()


def assert_told(start):
    """One line about a full disk, and nothing else that looks like an error."""
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    assert line.startswith("error: the disk is full")
    assert line.endswith("run the same command again; the last complete checkpoint is untouched")


# ---- a full disk


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
    assert_told(Start(here, STATEFUL, Plan(phase, visit, 0.0, FULL_DISK)))
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB at a place inside a folder."""
    place = tmp_path / "here" / "runs" / "tiny" / "ppo"

    def mount():
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip(f"a real full disk needs the right to mount one: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_really_fills_up(road, alone, tmp_path, small_disk):
    here = link_stages(road, tmp_path / "here")
    disk = small_disk()
    first = Start(here, STATEFUL, Plan("checkpoint", 2))
    assert first.wait() == -signal.SIGKILL
    before = {p.name: contents(p) for p in checkpoints(here)}
    assert sorted(before) == ["step-0000001", "step-0000002"]
    size = sum(map(len, before["step-0000002"].values()))
    filler = disk / "filler"
    for room in (0, 4096, size // 3, size - 8192):
        free = shutil.disk_usage(disk).free
        with contextlib.suppress(FileNotFoundError):
            free += filler.stat().st_size
        filler.write_bytes(b"x" * max(0, free - room))
        assert_told(Start(here))
        found = {p.name: contents(p) for p in checkpoints(here)}
        assert found == before, f"with room for {room} bytes"
    filler.unlink()
    goes_on(here, alone, 2)


# ---- damaged checkpoints


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["policy/adapter_model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(damage, name, stopped, alone, tmp_path):
    here = Path(shutil.copytree(stopped, tmp_path / "here", symlinks=True))
    file = checkpoints(here)[-1] / name
    damage(file)
    said = goes_on(here, alone, STEPS - 1)
    what = "missing" if damage is Path.unlink else "damaged"
    assert f"warning: {file.relative_to(here)} is {what}" in said
    assert f"using step-{STEPS - 1:07d} instead" in said


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_alone(stopped, tmp_path):
    here = Path(shutil.copytree(stopped, tmp_path / "here", symlinks=True))
    for checkpoint in checkpoints(here):
        flip(checkpoint / "optimizer.safetensors")
    before = {p.name: contents(p) for p in checkpoints(here)}
    start = Start(here)
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    assert line.startswith("error: no checkpoint can be used: runs/tiny/ppo/checkpoints/step-")
    assert line.endswith("remove runs/tiny/ppo/checkpoints to start again")
    assert {p.name: contents(p) for p in checkpoints(here)} == before
