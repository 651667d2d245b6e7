"""A fine-tuning that is killed at any moment ends bit for bit where an uninterrupted one does."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time

from conftest import stage
from sft_cases import FAST, begun

from policy import sft
from rlhf.artifacts import sha256_of
from rlhf.errors import exit_on_user_error

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["policy.fine_tuning.fit", "trl", "tensorboard", "conftest"])


def work(folder, log):
    """What a process of its own does: the stage in one folder, like the command line."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    exit_on_user_error(lambda: stage(sft.main, *FAST, "sft.epochs=2"))


def start(folder):
    process = SERVER.Process(target=work, args=(str(folder), str(folder / "log")))
    process.start()
    return process


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
    whole.join(120)
    assert whole.exitcode == 0, (alone / "log").read_text()
    steps = len(left(alone)[0])
    kills = 0
    for goal in (2, steps - 2):
        process, wanted = start(lab), lab / f"runs/tiny/sft/checkpoints/step-{goal:07d}"
        while process.is_alive() and not wanted.exists():
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert not (lab / "runs/tiny/sft/manifest.json").exists()
    last = start(lab)
    last.join(120)
    assert last.exitcode == 0, (lab / "log").read_text()
    assert kills == 2
    assert (lab / "log").read_text().count("sft: going on after step") == 2
    assert left(lab) == left(alone)
    assert not (lab / "runs/tiny/sft/checkpoints").exists()
