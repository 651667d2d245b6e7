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
import itertools
import math
import multiprocessing
import os
import pkgutil
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
from rlhf.runs.artifacts import MANIFEST, read_json, sha256_of
from rlhf.training.metrics import read_metrics

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
    "dpo": "policy.dpo.__main__",
    "distill": "policy.distillation.__main__",
    "pmp": "reward.pretraining.__main__",
    "ppo": "policy.ppo.__main__",
    "card": "reward.card.__main__",
    "evaluate": "policy.evaluate.__main__",
    "tax": "policy.alignment_tax.__main__",
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
    "start": ("loading and restoring", "policy.ppo.run.assemble", "policy.ppo.trainer.PpoTrainer.__init__"),
    "rollout": ("sampling and the passes over the responses", "policy.ppo.trainer.collect"),
    "scoring": ("the score function", "policy.ppo.checks.GuardedScore.__call__"),
    "update": ("forward and backward passes", "policy.ppo.update.Updater.__call__"),
    "optimizer": ("the optimizer's step", "rlhf.training.runtime.Runtime.step"),
    "log": ("writing a line of metrics", "rlhf.training.metrics.Metrics.log"),
    "checkpoint": ("gathering and writing a checkpoint", "policy.ppo.trainer.PpoTrainer._checkpoint"),
    "sync": ("a file of a checkpoint is being synced", "os.fsync"),
    "rename": ("a file or a checkpoint gets its name", "pathlib.Path.rename", "pathlib.Path.replace"),
    "remove": ("an old checkpoint is being removed", "os.unlink", "os.rmdir"),
    "finish": ("the manifest of the finished run", "rlhf.runs.stage.StageRun.finish"),
    "tidy": ("its checkpoints are being removed", "rlhf.runs.stage._drop_work"),
}
"""What a process does in each phase, and the functions and methods that are it."""
IN_CHECKPOINT = ("sync", "rename", "remove")  # counted there only
LAST = ("finish", "tidy")
FULL_DISK = 0  # instead of a signal: the call fails with ENOSPC
BRIEF = ("optimizer", "log", "sync", "rename", "remove", "tidy")  # over before a timer could fire
BETWEEN = "between"
SERVER = multiprocessing.get_context("forkserver")
"""Forks processes that have imported everything; a program has one such server, with one list of imports."""
SERVER.set_forkserver_preload(
    [
        "policy.ppo.run",
        "policy.sft.run",
        "policy.distillation.run",
        "policy.evaluate.run",
        "policy.alignment_tax.run",
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
        self.inside: list[str] = []
        self.fired = False

    def _fire(self, plan: Plan) -> None:
        if self.fired:
            return
        self.fired = True
        if plan.signal == FULL_DISK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), plan.signal)

    def _note(self, sign: str, name: str) -> None:
        os.write(self.descriptor, f"{sign} {name} {time.monotonic()}\n".encode())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body of the ``with`` is one visit to a phase."""
        plan = self.plan if self.plan and self.plan[:2] == (name, self.visits[name]) else None
        self.visits[name] += 1
        self._note("+", name)
        timer = threading.Timer(plan.delay, self._fire, [plan]) if plan else None
        if plan and timer and plan.delay == 0:
            self._fire(plan)
        elif plan and timer and plan.delay < math.inf:
            timer.daemon = True
            timer.start()
        self.inside.append(name)
        try:
            yield
        finally:
            self.inside.pop()
            if plan and timer:
                timer.cancel()
                if timer.is_alive():
                    timer.join()
                self._fire(plan)
            self._note("-", name)

    def wrap(self, place: str, phase: str) -> None:
        """Make every call of a function or method a visit to a phase."""
        path, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(path)
        real = getattr(owner, name)

        @functools.wraps(real)
        def marked(*args: Any, **options: Any) -> Any:
            if phase in IN_CHECKPOINT and "checkpoint" not in self.inside:
                return real(*args, **options)
            with self.phase(phase):
                return real(*args, **options)

        setattr(owner, name, marked)


def run_stage(
    name: str,
    folder: Path,
    rank: int,
    overrides: Sequence[str],
    plan: Plan | None,
    environment: Mapping[str, str],
    before: Callable[[], None] | None,
) -> None:
    """Run one stage in one folder, as its command line does; arguments as of :class:`Start`."""
    output = os.open(folder / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    main: Callable[[], None] = importlib.import_module(MODULES[name]).main
    if name == "ppo":
        marks = Marks(folder / f"{name}-{rank}.marks", plan)
        for phase, (_, *places) in PHASES.items():
            for place in places:
                marks.wrap(place, phase)
    if before:
        before()
    sys.argv = ["stage", str(RECIPE), *DATA, *overrides]
    exit_on_user_error(main)


# ---------------------------------------------------------------- in the watching process


class Start:
    """One start of a stage of the tiny recipe, in its own process.

    Args:
        root: folder where its ``models`` and ``runs`` are.
        overrides: of the recipe.
        plan: when it gets a signal.
        name: of the stage.
        rank: its number among several processes; each has a log of its own.
        environment: added to its own.
        before: called in the process before the stage begins.
    """

    def __init__(
        self,
        root: Path,
        overrides: Sequence[str] = STATEFUL,
        plan: Plan | None = None,
        *,
        name: str = "ppo",
        rank: int = 0,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.root, self.folder = root, root / "runs" / "tiny" / name
        self.log = root / f"{name}-{rank}.log"
        self.log.unlink(missing_ok=True)
        self.marks = root / f"{name}-{rank}.marks"
        self.process: BaseProcess = SERVER.Process(
            target=run_stage, args=(name, root, rank, tuple(overrides), plan, environment or {}, before)
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

    def finish(self) -> str:
        """Wait for the end; what it printed.

        Raises:
            RuntimeError: it failed.
        """
        if self.wait() != 0:
            raise RuntimeError(self.output()[-2000:])
        return self.output()

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

    def phases(self) -> tuple[list[tuple[str, float]], list[str]]:
        """Every finished visit to a phase with its seconds; the phases not left, the innermost last."""
        done: list[tuple[str, float]] = []
        entered: list[tuple[str, float]] = []
        for line in self.marks.read_text(encoding="utf-8").splitlines() if self.marks.is_file() else []:
            sign, name, stamp = line.split()
            if sign == "+":
                entered.append((name, float(stamp)))
            else:
                done.append((name, float(stamp) - entered.pop()[1]))
        return done, [name for name, _ in entered]


# ---------------------------------------------------------------- folders


def prepare(folder: Path) -> None:
    """Run the stages before PPO; a RuntimeError shows what a stage printed that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "comparisons", "reward"):
        Start(folder, (), name=name).finish()


def link_stages(source: Path, to: Path, name: str = "ppo") -> Path:
    """Link the model and the stages before one of a folder into a new one."""
    (to / "runs" / "tiny").mkdir(parents=True)
    (to / "models").symlink_to(source / "models")
    for parent in itertools.takewhile(lambda stage: stage != name, ("comparisons", "reward", "ppo")):
        (to / "runs" / "tiny" / parent).symlink_to(source / "runs" / "tiny" / parent)
    return to


def outcome(root: Path, name: str = "ppo") -> dict[str, Any]:
    """Hashes, metrics and results of a finished stage, which must not depend on interruptions."""
    done = root / "runs" / "tiny" / name
    found = [p for pattern in ("*.jsonl", "*/*.safetensors", "*/*.json") for p in done.glob(pattern)]
    files = {p.relative_to(done).as_posix(): sha256_of(p) for p in found if p.name != "metrics.jsonl"}
    steps = [
        {key: value for key, value in line.items() if not key.startswith("time/")}
        for line in read_metrics(done)
    ]
    left = sorted(p.name for p in done.iterdir() if p.name in ("checkpoints", "parts") or "tmp" in p.name)
    return {"files": files, "steps": steps, "results": read_json(done / MANIFEST)["results"], "left": left}
