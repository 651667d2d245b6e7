"""Two processes of one run, for the tests: under the real launcher, or forked, which begins far sooner.

A forked process finds the other through the environment, as one does that the launcher has started.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
from conftest import PROMPTS, ROOT, TINY

from benchmarks.faults.killed_process import MODULES, Start

RANKS = 2
SECONDS = 240.0
"""Longest run of a test."""


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pair(folder, name, overrides, plans=None):
    """A stage in two forked processes; ``plans`` tells by rank when one is to be hit."""
    shared = {
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "CXX": "/no/compiler",
    }
    return [
        Start(
            folder,
            overrides,
            (plans or {}).get(rank),
            name=name,
            rank=rank,
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]


class Forked:
    """A stage in two processes, without a launcher."""

    def __init__(self, folder, name, *overrides):
        self.starts = pair(folder, name, overrides)

    def status(self):
        """None while all run; 0 when all ended well; else the status of one that did not."""
        found = [start.process.exitcode for start in self.starts]
        wrong = [code for code in found if code]
        return wrong[0] if wrong else None if None in found else 0

    def output(self):
        """What they printed."""
        return "".join(start.output() for start in self.starts)

    def kill(self):
        """SIGKILL to all of them."""
        for start in self.starts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(start.process.pid, signal.SIGKILL)
        for start in self.starts:
            start.process.join()


class Launched:
    """The same under DeepSpeed's launcher, as the Makefile starts it; no compiler is at hand."""

    def __init__(self, folder, name, *overrides):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROCS": str(RANKS), "CXX": "/no/compiler"}
        command = [
            sys.executable,
            "-m",
            "rlhf.training.launch",
            MODULES[name],
            str(TINY),
            *PROMPTS,
            *overrides,
        ]
        self.log = folder / "launcher.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def status(self):
        """As that of :class:`Forked`."""
        return self.process.poll()

    def output(self):
        """What the launcher and its processes printed."""
        return self.log.read_text()

    def kill(self):
        """SIGKILL to the launcher and everything that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
        self.process.kill()
        self.process.wait()


def finish(folder, name, *overrides, start=Forked):
    """Start a stage in ``folder`` and wait for its end; what its processes said."""
    run, deadline = start(folder, name, *overrides), time.monotonic() + SECONDS
    while run.status() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    status = run.status()
    run.kill()
    assert status == 0, (status, run.output()[-4000:])
    return run.output()


def interrupt(folder, name, wanted, finished, *overrides):
    """Start a stage, and kill all of it as soon as ``wanted()`` holds, which must be before ``finished``."""
    run, deadline = Forked(folder, name, *overrides), time.monotonic() + SECONDS
    try:
        while run.status() is None and not wanted():
            assert time.monotonic() < deadline, "it never came so far"
            time.sleep(0.005)
        assert run.status() is None, run.output()[-4000:]
    finally:
        run.kill()
    assert not finished.exists(), "the kill came too late"
