"""Several processes of one run, for the tests: under the real launcher, or forked, which begins far sooner.

A forked process comes from a server that has imported the libraries but computed nothing. It finds the others
through the environment, as a process does that the launcher has started.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from conftest import PROMPTS, ROOT, TINY, stage

from rlhf.errors import exit_on_user_error

RANKS = 2
SECONDS = 240.0
"""Longest run of a test; the first start of DeepSpeed on a machine compiles a kernel."""
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["policy.fit", "policy.fine_tuning.fit", "reward.fit", "trl", "deepspeed", "tensorboard", "conftest"]
)


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _work(folder, module, overrides, environment):
    output = os.open(Path(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    exit_on_user_error(lambda: stage(importlib.import_module(module).main, *overrides))


class Forked:
    """A stage in :data:`RANKS` processes, without a launcher."""

    def __init__(self, folder, module, *overrides):
        shared = {
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "DS_ACCELERATOR": "cpu",
        }
        self.processes = []
        for rank in range(RANKS):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (str(folder), module, overrides, environment)
            self.processes.append(_SERVER.Process(target=_work, args=arguments))
        for process in self.processes:
            process.start()

    def status(self):
        """None while all run; 0 when all ended well; else the status of one that did not."""
        found = [process.exitcode for process in self.processes]
        wrong = [code for code in found if code]
        return wrong[0] if wrong else None if None in found else 0

    def kill(self):
        """SIGKILL to all of them."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


class Launched:
    """The same under DeepSpeed's launcher, as the Makefile starts it."""

    def __init__(self, folder, module, *overrides):
        tools = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        launcher = [str(tools / "deepspeed"), "--num_gpus", str(RANKS), "--master_port", str(free_port())]
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*launcher, "--module", module, str(TINY), *PROMPTS, *overrides],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def status(self):
        """As that of :class:`Forked`."""
        return self.process.poll()

    def kill(self):
        """SIGKILL to the launcher and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def finish(folder, module, *overrides, start=Forked):
    """Start a stage in ``folder`` and wait for its end; what its processes said."""
    run, deadline = start(folder, module, *overrides), time.monotonic() + SECONDS
    while run.status() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    status = run.status()
    run.kill()
    said = (folder / "log").read_text()
    assert status == 0, (status, said[-4000:])
    return said


def interrupt(folder, module, wanted, finished, *overrides):
    """Start a stage, and kill all of it as soon as ``wanted()`` holds, which must be before ``finished``."""
    run, deadline = Forked(folder, module, *overrides), time.monotonic() + SECONDS
    try:
        while run.status() is None and not wanted():
            assert time.monotonic() < deadline, "it never came so far"
            time.sleep(0.005)
        assert run.status() is None, (folder / "log").read_text()[-4000:]
    finally:
        run.kill()
    assert not finished.exists(), "the kill came too late"
