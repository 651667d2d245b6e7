"""One process or several: which GPUs, which port, whose environment."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROMPTS, ROOT, TINY, stage

from policy.alignment_tax import preflight
from rlhf.errors import UserError
from rlhf.runs.processes import adopt_environment, check_alone
from rlhf.training import launch

CLUSTER = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def eight_gpus(monkeypatch):
    """A machine with eight GPUs, of which other people use some."""
    listing = "".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-{i})\n" for i in range(8))
    monkeypatch.setattr(launch, "_output", lambda *command: listing)


def slots_of(command):
    (world,) = [w.partition("=")[2] for w in command if w.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(world))["localhost"]


def command_of(**environment):
    return launch.command_of("policy.ppo", ["r.yaml", "name=a b"], environment)


@pytest.mark.parametrize(
    ("listed", "seen"),
    [
        (None, [str(i) for i in range(8)]),
        ("", []),
        ("-1", []),
        ("2,5", ["2", "5"]),
        ("2, 5,-1,6", ["2", "5"]),
        ("GPU-8932f937,MIG-1", ["GPU-8932f937", "MIG-1"]),
    ],
)
def test_the_visible_gpus_are_those_of_the_variable(eight_gpus, listed, seen):
    environment = {} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}
    assert launch.visible_gpus(environment) == seen


def test_the_launcher_gets_the_visible_gpus_and_no_others(eight_gpus):
    assert slots_of(command_of(CUDA_VISIBLE_DEVICES="2,5")) == ["2", "5"]
    assert slots_of(command_of(CUDA_VISIBLE_DEVICES="6,2,5", PROCS="2")) == ["6", "2"]
    assert len(slots_of(command_of())) == 8
    command = command_of(CUDA_VISIBLE_DEVICES="2,5")
    assert not any(word.startswith("--num_gpus") for word in command)
    assert command[-4:] == ["--module", "policy.ppo", "r.yaml", "name=a b"]


def test_one_process_needs_no_launcher(eight_gpus):
    assert command_of(PROCS="1")[1:] == ["-m", "policy.ppo", "r.yaml", "name=a b"]
    assert command_of(CUDA_VISIBLE_DEVICES="3")[1:3] == ["-m", "policy.ppo"]
    assert command_of(CUDA_VISIBLE_DEVICES="")[1:3] == ["-m", "policy.ppo"]


def test_cpu_processes_are_numbered_and_use_deepspeeds_cpu_accelerator():
    environment = {
        "PROCS": "2",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": os.environ["PATH"],
        "CXX": sys.executable,
    }
    assert slots_of(launch.command_of("policy.ppo", [], environment)) == ["0", "1"]
    assert environment["DS_ACCELERATOR"] == "cpu"


def test_two_runs_on_one_machine_get_two_ports(eight_gpus):
    ports = set()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for _ in range(3):
            (port,) = [w for w in command_of() if w.startswith("--master_port=")]
            ports.add(port)
        assert f"--master_port={taken.getsockname()[1]}" not in ports
    assert "--master_port=29511" in command_of(PORT="29511")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"PROCS": "3", "CUDA_VISIBLE_DEVICES": "2,5"}, "2 GPUs are visible (CUDA_VISIBLE_DEVICES=2,5)"),
        ({"PROCS": "two"}, "PROCS=two must be a number from 1"),
        ({"PROCS": "0"}, "PROCS=0 must be a number from 1"),
        ({"PORT": "80"}, "PORT=80 must be a number from 1024 to 65535"),
    ],
)
def test_what_cannot_start_is_one_line(eight_gpus, environment, line):
    with pytest.raises(UserError) as caught:
        command_of(**environment)
    assert line in str(caught.value)


# ---- processes that a cluster started


def test_a_complete_environment_is_obeyed():
    environment = dict(CLUSTER)
    adopt_environment(environment)
    assert environment == {**CLUSTER, "LOCAL_RANK": "0"}
    environment = {**CLUSTER, "LOCAL_WORLD_SIZE": "2"}
    adopt_environment(environment)
    assert environment["LOCAL_RANK"] == "1"


def test_a_step_of_slurm_becomes_the_same_variables():
    step = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08],cpu1",
        "SLURM_JOB_ID": "123456",
    }
    environment = dict(step)
    adopt_environment(environment)
    assert {k: environment[k] for k in (*CLUSTER, "LOCAL_RANK")} == {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23456",
    }
    alone = {**step, "SLURM_STEP_NUM_TASKS": "1"}
    adopt_environment(alone)
    assert "WORLD_SIZE" not in alone


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WORLD_SIZE": "8"}, "has WORLD_SIZE=8 but not RANK MASTER_ADDR MASTER_PORT"),
        ({"RANK": "1"}, "has RANK=1 but not WORLD_SIZE MASTER_ADDR MASTER_PORT"),
        ({**CLUSTER, "MASTER_ADDR": ""}, "but not MASTER_ADDR"),
        ({**CLUSTER, "RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' in the environment is no number"),
    ],
)
def test_a_stray_environment_is_one_line(environment, line):
    with pytest.raises(UserError) as caught:
        adopt_environment(environment)
    assert line in str(caught.value)


def test_variables_of_one_process_change_nothing():
    environment = {"WORLD_SIZE": "1", "RANK": "0"}
    adopt_environment(environment)
    assert environment == {"WORLD_SIZE": "1", "RANK": "0"}


def test_a_stage_for_one_process_refuses_several(monkeypatch):
    check_alone("comparisons")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_alone("ppo")
    with pytest.raises(UserError, match="comparisons runs in one process, and the env"):
        check_alone("comparisons")


def test_a_stray_variable_ends_a_command_with_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "rlhf.recipe", "recipes/tiny.yaml"],
        cwd=ROOT,
        env={**os.environ, "WORLD_SIZE": "8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: the environment has WORLD_SIZE=8 but not RANK")
    assert done.stderr.count("\n") == 1


# ---- a request to stop goes to the processes, which are waited for

LAUNCHER = """
import signal, subprocess, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: sys.exit(99))
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
WORKER = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3); pathlib.Path("saved").touch(); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_reaches_the_processes_and_waits_for_their_save(number, tmp_path):
    script = (
        f"from rlhf.training.launch import run; import os, sys; "
        f"sys.exit(run([sys.executable, '-c', {LAUNCHER!r}, {WORKER!r}], os.environ))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(number)
    assert started.wait(20) == 143
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_said_once(inside):
    """Only the stage's own batches count, and the launcher ends the others while the first one speaks."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROCS": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "rlhf.training.launch", "policy.ppo", str(TINY), *PROMPTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: ppo.batch_size / ppo.minibatches = 8 does not divide over 3 processes; use a multiple of 3, "
        "for example 9\n"
    )


def test_a_road_is_told_of_all_batches_before_it_starts(inside, monkeypatch, capsys):
    monkeypatch.setenv("PROCS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError) as caught:
        stage(preflight.main)
    assert str(caught.value).count("does not divide over 3 processes") == 2
    Path("hosts").write_text("a slots=2\nb slots=3\n")
    assert launch.wanted_processes({"HOSTFILE": "hosts"}) == 5


def test_a_makefile_passes_its_variables_and_no_count_of_gpus():
    made = subprocess.run(
        ["make", "--no-print-directory", "-n", "ppo", "PROCS=3", "PORT=29511"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert ".venv/bin/python -m rlhf.training.launch policy.ppo recipes/sentiment.yaml" in made
    assert "num_gpus" not in Path(ROOT / "Makefile").read_text(encoding="utf-8")


def set_up(python, folder):
    """`make setup` with a Python, into an environment in a folder."""
    places = (f"PYTHON={python}", f"VENV={folder}/v", f"STAMPS={folder}/s")
    command = ["make", "-C", str(ROOT), "setup", *places]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_old_python_is_named_before_anything_is_made(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 4); $2"\n')
    stub.chmod(0o755)
    done = set_up(stub, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: Python 3.10 is too old, 3.11 or later is needed: make setup PYTHON="
    )
    assert not (tmp_path / "v").exists()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    stub, kept = tmp_path / "python", tmp_path / "v" / "kept.txt"
    kept.parent.mkdir()
    kept.touch()
    stub.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 1\nexec {sys.executable} "$@"\n')  # has no venv
    stub.chmod(0o755)
    done = set_up(stub, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {stub} cannot make a virtual environment with pip: install its venv"
    )
    assert kept.exists()
