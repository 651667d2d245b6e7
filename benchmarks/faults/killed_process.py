"""A stage of the tiny recipe in a process that gets a signal, or a full disk, at a chosen moment of a phase.

Every start is forked from a server that has imported torch but computed nothing, so it begins in a tenth of a
second. It writes to a file which phase it enters and leaves, so the phase of its death is known.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import exit_on_user_error
from rlhf.runs.artifacts import MANIFEST, sha256_of

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "tiny.yaml"
DATA = tuple(
    f"data.{name}={ROOT}/recipes/prompts/sentiment_{file}.jsonl"
    for name, file in (("prompts", "train"), ("held_out_prompts", "held_out"))
)
MODULES = {
    "model": "rlhf.models.prepare",
    "comparisons": "rlhf.collect.__main__",
    "reward": "reward.training.__main__",
    "sft": "policy.sft.__main__",
    "distill": "policy.distillation.__main__",
    "ppo": "policy.ppo.__main__",
}
STEPS = 6
# whatever a checkpoint has to carry besides weights and moments is in use
STATEFUL = (
    f"ppo.steps={STEPS}",
    "ppo.checkpoint_every=1",
    "ppo.epochs=1",  # a checkpoint falls between steps: a second pass only takes time
    "ppo.kl_controller=adaptive",
    "ppo.kl_controller_horizon=100",
    "ppo.score_normalization=running",
    "ppo.ema_decay=0.8",
    "ppo.schedule=cosine",
    "ppo.warmup_steps=2",
)
PHASES = {
    "start": "loading and restoring",
    "rollout": "sampling and the passes over the responses",
    "scoring": "the score function",
    "update": "forward and backward passes",
    "optimizer": "the optimizer's step",
    "log": "writing a line of metrics",
    "checkpoint": "gathering and writing a checkpoint",
    "sync": "a file of a checkpoint is being synced",
    "rename": "a file or a checkpoint gets its name",
    "remove": "an old checkpoint is being removed",
    "finish": "the manifest of the finished run",
    "tidy": "its checkpoints are being removed",
}
LAST = ("finish", "tidy")
FULL_DISK = 0  # instead of a signal: the call fails with ENOSPC
BRIEF = ("optimizer", "log", "sync", "rename", "remove", "tidy")  # over before a timer could fire
BETWEEN = "between"
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "policy.ppo.run",
        "policy.sft.run",
        "reward.training.run",
        "rlhf.collect.simulated",
        "trl",
        "deepspeed",
        "tensorboard",
    ]
)


class Plan(NamedTuple):
    """When a process gets its signal."""

    phase: str
    visit: int = 0
    """Which visit to the phase, counted from 0 in this process."""
    delay: float = 0.0
    """Seconds after the visit's beginning; at its end where it is over sooner."""
    signal: int = signal.SIGKILL
    """Or :data:`FULL_DISK`."""


# ---------------------------------------------------------------- in the killed process


class Marks:
    """Writes to a file which phase a process is in, and sends the signal at the moment of its plan."""

    def __init__(self, file: Path, plan: Plan | None) -> None:
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.plan = plan
        self.visits: collections.Counter[str] = collections.Counter()
        self.fired = False

    def _fire(self) -> None:
        assert self.plan is not None
        self.fired = True
        if self.plan.signal == FULL_DISK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), self.plan.signal)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body of the ``with`` is one visit to a phase."""
        visit = self.visits[name]
        self.visits[name] += 1
        os.write(self.descriptor, f"+{name} {time.monotonic()}\n".encode())
        timer = None
        if self.plan is not None and self.plan[:2] == (name, visit):
            timer = threading.Timer(min(self.plan.delay, threading.TIMEOUT_MAX), self._fire)
            timer.daemon = True
            if self.plan.delay == 0:
                self._fire()
            else:
                timer.start()
        try:
            yield
        finally:
            if timer is not None and not self.fired:
                timer.cancel()
                timer.join()
                if not self.fired:
                    self._fire()
            os.write(self.descriptor, f"-{name} {time.monotonic()}\n".encode())

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Make every call of a function or method a visit to a phase."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def marked(*args: Any, **options: Any) -> Any:
            with self.phase(phase):
                return real(*args, **options)

        setattr(owner, name, marked)


def _mark_everything(marks: Marks) -> None:
    import policy.ppo.run as ppo_run
    import policy.ppo.trainer as loop
    from policy.ppo.checks import GuardedScore
    from policy.ppo.update import Updater
    from rlhf.runs import stage
    from rlhf.runs.stage import StageRun
    from rlhf.training.metrics import Metrics
    from rlhf.training.runtime import Runtime

    marks.wrap(ppo_run, "assemble", "start")
    marks.wrap(loop.PpoTrainer, "__init__", "start")
    marks.wrap(loop, "collect", "rollout")
    marks.wrap(GuardedScore, "__call__", "scoring")
    marks.wrap(Updater, "__call__", "update")
    marks.wrap(Runtime, "step", "optimizer")
    marks.wrap(Metrics, "log", "log")
    marks.wrap(StageRun, "finish", "finish")
    marks.wrap(stage, "_drop_work", "tidy")
    real = loop.PpoTrainer._checkpoint

    def checkpoint(self: loop.PpoTrainer) -> None:
        with marks.phase("checkpoint"), contextlib.ExitStack() as files:
            for owner, name, phase in ((os, "fsync", "sync"), (Path, "rename", "rename"),
                                       (Path, "replace", "rename"), (os, "unlink", "remove"),
                                       (os, "rmdir", "remove")):  # fmt: skip
                files.callback(setattr, owner, name, getattr(owner, name))
                marks.wrap(owner, name, phase)
            real(self)

    loop.PpoTrainer._checkpoint = checkpoint  # type: ignore[method-assign]


def run_stage(
    name: str,
    folder: str,
    log: str,
    overrides: Sequence[str],
    plan: Plan | None = None,
    marks: str | None = None,
    environment: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> None:
    """Run one stage in one folder, as its command line does."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment or {})
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    main: Callable[[], None] = importlib.import_module(MODULES[name]).main
    if marks:
        _mark_everything(Marks(Path(marks), plan))
    if before:
        before()
    sys.argv = ["stage", str(RECIPE), *DATA, *overrides]
    exit_on_user_error(main)


# ---------------------------------------------------------------- in the watching process


class Start:
    """One start of a stage of the tiny recipe, in its own process.

    Args:
        folder: where its ``models`` and ``runs`` are.
        overrides: of the recipe.
        plan: when it gets a signal.
        name: of the stage.
        rank: its number among several processes; each has a log of its own.
        environment: added to its own.
        before: called in the process before the stage begins.
    """

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str] = STATEFUL,
        plan: Plan | None = None,
        *,
        name: str = "ppo",
        rank: int = 0,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.folder = folder / "runs" / "tiny" / name
        self.log = folder / f"{name}-{rank}.log"
        self.log.unlink(missing_ok=True)
        self.marks = folder / f"{name}-{rank}.marks"
        marks = str(self.marks) if name == "ppo" else None
        self.process: BaseProcess = _SERVER.Process(
            target=run_stage,
            args=(name, str(folder), str(self.log), tuple(overrides), plan, marks, environment, before),
        )
        self.process.start()

    def wait(self, seconds: float = 600.0) -> int | None:
        """The exit status; a process that takes longer is killed, and None is returned."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            return None
        return self.process.exitcode

    def kill_when(self, due: Callable[[], object]) -> bool:
        """SIGKILL as soon as ``due()`` holds; whether that was before the end."""
        while self.process.is_alive() and not due():
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()
        return self.process.exitcode == -signal.SIGKILL

    def output(self) -> str:
        """Everything that it printed."""
        return self.log.read_text(encoding="utf-8") if self.log.is_file() else ""

    def errors(self) -> list[str]:
        """Error lines and tracebacks that it printed."""
        return re.findall(r"(?:error: |Traceback).*", self.output())

    def visits(self) -> list[tuple[str, float]]:
        """Every finished visit to a phase, with its seconds."""
        return [(name, after - before) for name, before, after in _visits(self.marks) if after is not None]

    def killed_in(self) -> list[str]:
        """The phases that were not left, the innermost last."""
        return [name for name, _, after in _visits(self.marks) if after is None]


def _visits(marks: Path) -> list[tuple[str, float, float | None]]:
    found: list[tuple[str, float, float | None]] = []
    for line in marks.read_text(encoding="utf-8").splitlines() if marks.is_file() else []:
        name, _, stamp = line[1:].partition(" ")
        if line[0] == "+":
            found.append((name, float(stamp), None))
            continue
        place = max(i for i, visit in enumerate(found) if visit[0] == name and visit[2] is None)
        found[place] = (name, found[place][1], float(stamp))
    return found


def prepare(folder: Path) -> None:
    """Run the stages before PPO.

    Raises:
        RuntimeError: a stage failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "comparisons", "reward"):
        start = Start(folder, (), name=name)
        if start.wait() != 0:
            raise RuntimeError(f"{name}: {start.output()[-2000:]}")


def link_stages(source: Path, to: Path) -> Path:
    """Link the stages before PPO of one folder into a new one."""
    (to / "runs" / "tiny").mkdir(parents=True)
    (to / "models").symlink_to(source / "models")
    for name in ("comparisons", "reward"):
        (to / "runs" / "tiny" / name).symlink_to(source / "runs" / "tiny" / name)
    return to


def outcome(folder: Path) -> dict[str, Any]:
    """Hashes, metrics and results of a finished run, which must not depend on interruptions."""
    done = folder / "runs" / "tiny" / "ppo"
    manifest = json.loads((done / MANIFEST).read_text(encoding="utf-8"))
    files = {
        file.relative_to(done).as_posix(): sha256_of(file)
        for pattern in ("*/*.safetensors", "*/*.json")
        for file in done.glob(pattern)
    }
    steps = [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in (done / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    left = sorted(p.name for p in done.iterdir() if p.name in ("checkpoints", "parts") or "tmp" in p.name)
    return {"files": files, "steps": steps, "results": manifest["results"], "left": left}
