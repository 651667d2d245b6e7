"""Start a stage in one process or in several: ``python -m rlhf.training.launch PACKAGE RECIPE ...``.

``PROCS`` (default: the visible GPUs, else one), ``HOSTFILE`` and ``PORT`` come from the environment, as the
Makefile passes them. One process needs no launcher. Several on this machine get DeepSpeed's, on the GPUs of
``CUDA_VISIBLE_DEVICES`` and on a free port; a host file gets it on every host (:mod:`rlhf.training.hosts`).
Processes that torchrun, Slurm or Kubernetes started already join each other.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from rlhf.errors import STOP_SIGNALS, UserError, exit_on_user_error
from rlhf.runs.processes import adopt_environment, processes

STOP, KILL = b"s", b"k"  # what a launcher tells those of other machines
_PORTS = range(1024, 65536)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; all without that variable.

    As CUDA reads it, the list ends at the first entry that is negative.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        shown = _output("nvidia-smi", "-L").splitlines()
        return [str(index) for index in range(sum(line.startswith("GPU ") for line in shown))]
    names: list[str] = []
    for name in (part.strip() for part in listed.split(",")):
        if not name or name.startswith("-"):
            break
        names.append(name)
    return names


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _whole(environment: Mapping[str, str], name: str, allowed: range) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if number not in allowed:
        raise UserError(f"{name}={text[:40]} must be a number from {allowed[0]} to {allowed[-1]}")
    return number


def wanted_processes(environment: Mapping[str, str]) -> int:
    """How many processes a stage will have.

    Raises:
        UserError: ``PROCS`` is no number, or the host file cannot be used.
    """
    if processes() > 1:
        return processes()
    if environment.get("HOSTFILE"):
        from rlhf.training.hosts import read_hosts

        return sum(host.slots for host in read_hosts(environment["HOSTFILE"]))
    return _whole(environment, "PROCS", range(1, 4097)) or len(visible_gpus(environment)) or 1


def command_of(package: str, arguments: Sequence[str], environment: dict[str, str]) -> list[str]:
    """The command that runs a stage; the environment is completed for it.

    Args:
        package: the stage's package.
        arguments: the recipe and its settings.
        environment: of the command; ``PROCS``, ``PORT``, ``CUDA_VISIBLE_DEVICES`` are read.

    Raises:
        UserError: more processes than GPUs, or no such port.
    """
    alone = [sys.executable, "-m", package, *arguments]
    if processes() > 1:  # started by a cluster: this is one of its processes
        return alone
    port = _whole(environment, "PORT", _PORTS)
    gpus = visible_gpus(environment)
    number = _whole(environment, "PROCS", range(1, 4097)) or len(gpus) or 1
    if number == 1:
        return alone
    if gpus and number > len(gpus):
        listed = environment.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES={listed})" if listed is not None else ""
        raise UserError(f"PROCS={number}, and {len(gpus)} GPUs are visible{why}: at most one process a GPU")
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    # The launcher's own front end counts all GPUs of the machine as soon as it is told a number, and takes
    # those of other users: its back end takes the very list.
    slots = gpus[:number] or [str(index) for index in range(number)]
    return launcher_of({"localhost": slots}, "127.0.0.1", port or free_port(), package, arguments)


def launcher_of(
    world: Mapping[str, Sequence[str]],
    address: str,
    port: int,
    package: str,
    arguments: Sequence[str],
    *,
    node: int = 0,
) -> list[str]:
    """DeepSpeed's launcher on one machine.

    Args:
        world: by machine the devices of its processes, whose ranks count through all of them.
        address: where the processes meet: the first machine.
        port: of that address.
        package: the stage's package.
        arguments: the recipe and its settings.
        node: which of the machines this one is.
    """
    coded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={coded}"),
        # the processes name their errors themselves
        *("--log_level=critical", f"--node_rank={node}", f"--master_addr={address}", f"--master_port={port}"),
        *("--module", package, *arguments),
    ]


def run(command: Sequence[str], environment: Mapping[str, str], *, until: int | None = None) -> int:
    """Run a command to its end; a request to stop goes to the processes that can save.

    until: a descriptor on which a byte, or its end, is such a request, and :data:`KILL` more than that; the
    command does not read it.

    Returns:
        The command's exit status.
    """
    # in a session of its own: a Ctrl-C would end DeepSpeed's launcher, which gives its processes 30 seconds
    stdin = None if until is None else subprocess.DEVNULL
    child = subprocess.Popen(command, env=dict(environment), stdin=stdin, start_new_session=True)

    def send(number: int) -> None:
        for process in _workers(child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def pass_on(number: int, frame: FrameType | None) -> None:
        send(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    if until is not None:
        threading.Thread(target=_obey, args=(until, send), daemon=True).start()
    try:
        while child.poll() is None:
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = child.returncode
    return 128 - status if status < 0 else status


def _obey(descriptor: int, send: Callable[[int], None]) -> None:
    """Send a signal for each byte that is read, and for the end."""
    while told := os.read(descriptor, 1):
        send(signal.SIGKILL if told == KILL else signal.SIGTERM)
    send(signal.SIGTERM)


def _workers(launcher: int) -> list[int]:
    """The processes that a launcher started; itself where it has none yet."""
    import psutil

    try:
        return [process.pid for process in psutil.Process(launcher).children()] or [launcher]
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    """``python -m rlhf.training.launch PACKAGE RECIPE [section.key=value ...]``."""
    adopt_environment()
    environment = dict(os.environ)
    tools = os.path.dirname(sys.executable)  # ninja lies beside the interpreter
    environment["PATH"] = os.pathsep.join((tools, environment.get("PATH", os.defpath)))
    if environment.get("HOSTFILE") and processes() == 1:
        from rlhf.training.hosts import Hosts

        if environment.get("PROCS", "").strip():
            raise UserError("PROCS: the slots of HOSTFILE say how many processes start; leave PROCS out")
        port = _whole(environment, "PORT", _PORTS)
        sys.exit(Hosts(environment["HOSTFILE"], environment).run(port, sys.argv[1], sys.argv[2:]))
    command = command_of(sys.argv[1], sys.argv[2:], environment)
    if "deepspeed.launcher" not in " ".join(command[:4]):
        os.execve(command[0], command, environment)
    sys.exit(run(command, environment))


if __name__ == "__main__":
    exit_on_user_error(main)
