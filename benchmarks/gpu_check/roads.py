"""Stages of a tiny recipe as processes: started, limited in time, killed, and what their logs say."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhf.errors import USER_ERROR_STATUS
from rlhf.runs.artifacts import read_jsonl
from rlhf.runs.stage import RUNS

ASSISTANT = "recipes/tiny_assistant.yaml"
"""Its comparisons are a file, so that two devices train on the same."""
LAB = "recipes/tiny.yaml"
PREPARE = ("rlhf.models.prepare", "rlhf.collect")
LAUNCH = "rlhf.training.launch"
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
"""The environment in which there is no GPU."""


class Failure(Exception):
    """A part that did not do what it should; the text says what happened."""


class Missing(Exception):
    """What a part needs is not in place, so that it is left out; the text says what, and what to run."""


class Deadline:
    """The time that a part has.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then, at least 0."""
        return max(0.0, self.end - time.monotonic())


def call(
    command: Sequence[str],
    deadline: Deadline,
    environment: Mapping[str, str] | None = None,
    until: Callable[[], bool] | None = None,
) -> None:
    """Run a command to its end.

    Args:
        command: its words.
        deadline: at which it and its children are killed.
        environment: added to this process's own.
        until: kill it (SIGKILL) as soon as this is true; then an end before that is a failure.

    Raises:
        Failure: it ended with an error, too early, or too late.
    """
    told = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    process = subprocess.Popen(
        [*command],
        env={**os.environ, **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        errors="replace",
    )
    wanted = False
    try:
        while True:
            wanted = until is not None and until()
            if wanted:
                break
            step = 0.02 if until else deadline.left
            try:
                output, _ = process.communicate(timeout=min(step, deadline.left))
                break
            except subprocess.TimeoutExpired:
                if not deadline.left:
                    raise Failure(f"{_short(command)} did not end in time") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if wanted:
        return
    if process.returncode:
        raise Failure(f"{_short(command)}: {_reason(process.returncode, output)}")
    if until is not None:
        raise Failure(f"{_short(command)} ended before it could be killed")


def _short(command: Sequence[str]) -> str:
    """The package that a command runs, behind the launcher."""
    words = [word for word in command if word not in (sys.executable, "-m", LAUNCH)]
    return words[0] if words else command[0]


def _reason(status: int, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines or ["it printed nothing"]
    told = errors[-1] if status != USER_ERROR_STATUS else lines[-1]
    return f"status {status}: {told[-300:]}"


class Road:
    """A run of a tiny recipe, removed at its end.

    Args:
        name: of the run, behind ``gpu-check-``.
        deadline: of all of it.
        overrides: of the recipe.
        recipe: its file.
        environment: of its processes.
        processes: of the training stages.
    """

    def __init__(
        self,
        name: str,
        deadline: Deadline,
        overrides: Sequence[str] = (),
        *,
        recipe: str = LAB,
        environment: Mapping[str, str] | None = None,
        processes: int = 1,
    ) -> None:
        self.folder = RUNS / f"gpu-check-{name}"
        self.deadline, self.recipe = deadline, recipe
        self.words = [recipe, f"name={self.folder.name}", *overrides]
        self.environment = {"PROCS": str(processes), **(environment or {})}

    def __enter__(self) -> Road:
        shutil.rmtree(self.folder, ignore_errors=True)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *packages: str, until: Callable[[], bool] | None = None) -> None:
        """Run stages by their packages, in order.

        Raises:
            Failure: see :func:`call`.
        """
        for package in packages:
            module = [package] if package in PREPARE else [LAUNCH, package]
            call([sys.executable, "-m", *module, *self.words], self.deadline, self.environment, until)

    def column(self, stage: str, name: str) -> list[float]:
        """A column of a stage's log, a value a step.

        Raises:
            Failure: it is not there, or has a value that is not finite.
        """
        file = self.folder / stage / "metrics.jsonl"
        values = [float(row[name]) for row in read_jsonl(file) if name in row] if file.is_file() else []
        if not values:
            raise Failure(f"{stage}: its log has no {name}")
        if not all(map(math.isfinite, values)):
            raise Failure(f"{stage}: {name} is not finite in its log")
        return values

    def steps(self, stage: str) -> int:
        """Steps in a stage's log so far."""
        file = self.folder / stage / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two columns, in units of the first's largest value (at least 1).

    Raises:
        Failure: they have another length.
    """
    if len(a) != len(b):
        raise Failure(f"{len(a)} steps against {len(b)}")
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(1.0, *map(abs, a))


def weights(folder: Path) -> bytes:
    """The bytes of a policy's adapter."""
    return (folder / "policy" / "adapter_model.safetensors").read_bytes()
