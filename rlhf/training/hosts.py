"""Several machines: the host file, what is checked on them before a stage starts, the stage on all of them.

A host file is DeepSpeed's: a line ``HOST slots=N`` for each machine, N processes on it. A host is reached by
``ssh`` (the variable ``SSH`` names another command, or options), needs no pdsh or MPI, and gets a process
(:mod:`rlhf.training.node`) that starts DeepSpeed's launcher there. The ranks count through the hosts in the
order of the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf.errors import STOP_SIGNALS, USER_ERROR_STATUS, UserError
from rlhf.runs.artifacts import write_atomically
from rlhf.runs.stage import RUNS

SSH_OPTIONS = (  # no question at a prompt; a host that is switched off ends its connection within 45 seconds
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
CONNECTION_LOST = 255
"""ssh's own exit status."""
PASSED_ON = re.compile(
    r"(HF|NCCL|GLOO|WANDB|TRACKIO|OMP|MKL|CUDA_HOME|TORCH|TOKENIZERS|UCX|RLHF|http|https|no)_.*|LD_LIBRARY_PATH"
    r"|CXX|PYTHON.*|LC_ALL|LANG"
)
"""Variables that the processes on all hosts get from this one."""
CHECK_SECONDS = 120.0  # until a host has answered
GRACE_SECONDS = 2.0  # in which the host that ended first shows itself, where several end
STOP_SECONDS = 60.0  # in which processes that lost another one end by themselves
LOST_SECONDS = 10.0  # in which a kill reaches its host
_LINE = re.compile(r"(\S+)\s+slots=(\d{1,4})\s*(?:#.*)?")


@dataclasses.dataclass(frozen=True)
class Host:
    """One line of a host file."""

    name: str
    slots: int
    """Processes on it."""


def read_hosts(file: str) -> list[Host]:
    """The hosts of a file, in its order.

    Raises:
        UserError: no such file, a line that is none of a host, a host twice, or no host at all.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"HOSTFILE={file} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'}); name a "
            "file with a line `HOST slots=N` for each machine"
        ) from None
    found: dict[str, tuple[int, Host]] = {}
    for number, text in enumerate(lines, start=1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match or int(match[2]) == 0 or match[1].startswith("-"):
            raise UserError(f"{file}:{number}: {line[:60]!r} is no host: write `HOST slots=N`, N from 1 on")
        if match[1] in found:
            raise UserError(
                f"{file}:{number}: {match[1]} stands in line {found[match[1]][0]} already: give it one line "
                "with all its slots"
            )
        found[match[1]] = number, Host(match[1], int(match[2]))
    if not found:
        raise UserError(f"HOSTFILE={file} names no host: write a line `HOST slots=N` for each machine")
    return [host for _, host in found.values()]


class Hosts:
    """The machines of a host file.

    Args:
        file: the host file.
        environment: of this process; ``SSH`` is the command that reaches a host.

    Raises:
        UserError: as of :func:`read_hosts`.
    """

    def __init__(self, file: str, environment: Mapping[str, str]) -> None:
        self.file, self.hosts = file, read_hosts(file)
        self._ssh = shlex.split(environment.get("SSH", "")) or ["ssh"]
        self._environment = {k: v for k, v in environment.items() if PASSED_ON.fullmatch(k)}
        self.here = os.getcwd()

    def check(self) -> list[dict[str, Any]]:
        """See that every host can be reached, has the project, sees the runs of this one and has the devices.

        Returns:
            Each host's answer (:func:`rlhf.training.node.answer`).

        Raises:
            UserError: what is wrong with which hosts.
        """
        token = secrets.token_hex(16)
        shared = RUNS / f".shared-{token[:8]}"
        write_atomically(shared, token)
        try:
            with ThreadPoolExecutor(len(self.hosts)) as pool:
                answers = list(pool.map(functools.partial(self._ask, shared=shared), self.hosts))
        finally:
            shared.unlink(missing_ok=True)
        some_have_gpus = any(answer.get("gpus") for answer in answers)
        troubles = []
        for host, found in zip(self.hosts, answers, strict=True):
            trouble = found.get("trouble", "")
            if not trouble and found["token"] != token:
                trouble = (
                    f"does not see what this machine writes into {self.here}/{RUNS}: put the project on "
                    "storage that all hosts share"
                )
            elif not trouble and some_have_gpus and found["gpus"] < host.slots:
                trouble = (
                    f"has slots={host.slots} and {found['gpus']} visible GPUs: at most one process a GPU"
                )
            first = answers[0].get("versions", {})
            unlike = [f"{n} {v} and not {first[n]}" for n, v in found.get("versions", {}).items()
                      if v != first.get(n, v)]  # fmt: skip
            if unlike and not trouble:
                trouble = f"has {', '.join(unlike)}, as {self.hosts[0].name} has"
            if trouble:
                troubles.append(f"{host.name} {trouble}")
        if troubles:
            raise UserError(f"{self.file}: {'; '.join(troubles)}; mend it, or take the host out of the file")
        return answers

    def _ask(self, host: Host, shared: Path) -> dict[str, Any]:
        """A host's answer, or its ``trouble``."""
        request = json.dumps({"check": str(shared)}) + "\n"
        try:
            done = subprocess.run(
                self._command(host),
                input=request, capture_output=True, text=True, check=False, timeout=CHECK_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"trouble": f"did not answer for {CHECK_SECONDS:.0f} seconds: try `ssh {host.name} true`"}
        except OSError as error:
            raise UserError(f"SSH: {self._ssh[0]} cannot be started ({error.strerror}): install it") from None
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].strip()[:200]
        if done.returncode == CONNECTION_LOST:
            return {"trouble": f"cannot be reached by ssh ({reason}): try `ssh {host.name} true`"}
        with contextlib.suppress(
            ValueError, IndexError, TypeError
        ):  # what a login shell prints stands before it
            return dict(json.loads(done.stdout.splitlines()[-1]))
        return {
            "trouble": f"cannot run {sys.executable} in {self.here} ({reason}): the project and its "
            "environment must lie at the same place on every host"
        }

    def _command(self, host: Host) -> list[str]:
        """The local command whose other end is a node process on a host."""
        path = self._environment.get("PYTHONPATH")
        node = ["env", *([f"PYTHONPATH={path}"] if path else []), sys.executable, "-m", "rlhf.training.node"]
        remote = f"cd {shlex.quote(self.here)} && exec {shlex.join(node)}"
        return [*self._ssh, *SSH_OPTIONS, host.name, remote]

    def run(self, port: int | None, package: str, arguments: Sequence[str]) -> int:
        """Run a stage on all hosts; a request to stop goes to the processes that can save.

        Args:
            port: where the processes meet, on the first host; None = one that is free there.
            package: the stage's package.
            arguments: the recipe and its settings.

        Returns:
            0, or the exit status of a host that failed, which is named on stderr unless a stop was asked for.

        Raises:
            UserError: as of :meth:`check`.
        """
        answers = self.check()
        world = {host.name: found["devices"][: host.slots] or [str(i) for i in range(host.slots)]
                 for host, found in zip(self.hosts, answers, strict=True)}  # fmt: skip
        shared = {
            "world": world, "address": self._address(), "port": port or answers[0]["port"],
            "package": package, "arguments": list(arguments),
        }  # fmt: skip
        started = []
        for number, host in enumerate(self.hosts):
            # in a session of its own: a Ctrl-C must reach the processes, and not cut the connection
            node = subprocess.Popen(
                self._command(host), stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            request = {"run": {**shared, "node": number}, "environment": self._environment}
            _tell(node, json.dumps(request) + "\n")
            started.append(node)
        return self._wait(started)

    def _address(self) -> str:
        """Where the others find the first host: what ssh makes of its name, which may be an alias."""
        name = self.hosts[0].name
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [*self._ssh, "-G", name], capture_output=True, text=True, check=False, timeout=10
            )
            found = re.search(r"^hostname (\S+)$", done.stdout, re.MULTILINE)
            if found and done.returncode == 0:
                return found[1]
        return name.rpartition("@")[2]

    def _wait(self, nodes: Sequence[subprocess.Popen[str]]) -> int:
        """Until all have ended; one that fails stops the others."""
        asked = False

        def stop(number: int = 0, frame: FrameType | None = None) -> None:
            nonlocal asked
            asked = asked or number > 0
            for node in nodes:
                _tell(node, "s")

        before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
        deadline, failed = math.inf, dict[Host, int]()  # in the order in which they ended
        try:
            running = len(nodes)
            while running and time.monotonic() < deadline:
                time.sleep(0.1)
                ended = {host: node.poll() for host, node in zip(self.hosts, nodes, strict=True)}
                running = sum(status is None for status in ended.values())
                failed |= {host: status for host, status in ended.items() if status}
                if failed and deadline == math.inf:
                    deadline = time.monotonic() + GRACE_SECONDS
            if failed and not asked:
                self._name(failed, [host for host, status in ended.items() if status is None])
            stop()
            patience = math.inf if asked else time.monotonic() + STOP_SECONDS
            while any(node.poll() is None for node in nodes):
                time.sleep(0.1)
                for node in nodes if time.monotonic() > patience else ():
                    _tell(node, "k")
                    if time.monotonic() > patience + LOST_SECONDS:  # nobody is there to hear it
                        node.kill()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        own = [status for status in failed.values() if status != CONNECTION_LOST]
        return (own or [USER_ERROR_STATUS])[0] if failed else 0

    def _name(self, failed: Mapping[Host, int], running: Sequence[Host]) -> None:
        """Say on stderr which host failed; of several the ones that did not only lose another one."""
        hard = [host for host, status in failed.items() if status != USER_ERROR_STATUS]
        hanging = "" if hard or not running else f"{', '.join(map(self._ranks, running))} may hang; "
        for host in hard or [*failed][:1]:
            lost = failed[host] == CONNECTION_LOST
            what = "the connection to it was lost" if lost else f"it ended with status {failed[host]}"
            line = f"error: host {self._ranks(host)}: {what}; {hanging}the other hosts are stopped"
            print(line, file=sys.stderr, flush=True)

    def _ranks(self, host: Host) -> str:
        first = sum(other.slots for other in self.hosts[: self.hosts.index(host)])
        return f"{host.name} (rank{'' if host.slots == 1 else f's {first} to'} {first + host.slots - 1})"


def _tell(node: subprocess.Popen[str], text: str) -> None:
    """Write to a node; one that is gone is told nothing."""
    with contextlib.suppress(OSError, ValueError):
        if node.stdin:
            node.stdin.write(text)
            node.stdin.flush()
