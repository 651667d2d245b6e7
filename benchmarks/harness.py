"""Child processes that do the work of a benchmark one at a time, their seconds and their peak memory.

Nothing heavy is imported here: the parent stays small while its children are measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import USER_ERROR_STATUS, UserError
from rlhf.runs.artifacts import read_json, write_json

Figures = dict[str, Any]
"""What a child measured: JSON."""
SIDES = ("ours", "theirs")
MEMORY = "peak_bytes"
PEER = ("trl", "1.12.0")
"""The last release that has a PPO trainer."""


class Turn(NamedTuple):
    """One child process of a benchmark."""

    round: int
    """From 0."""
    case: str
    side: str


def turns(cases: Iterable[str], rounds: int) -> list[Turn]:
    """The order of the children: every case once a round, its two sides one after the other.

    The order of the sides is swapped every second round, so that whatever one leaves behind (a warm cache, a
    hot processor) helps or hurts both alike.
    """
    cases = list(cases)
    return [
        Turn(number, case, side)
        for number in range(rounds)
        for case in cases
        for side in (SIDES if number % 2 == 0 else SIDES[::-1])
    ]


def run_child(command: Sequence[str], result: Path, environment: Mapping[str, str]) -> Figures:
    """Run a command that writes its figures to a JSON file.

    Args:
        command: its words.
        result: the file; what stood there before is removed.
        environment: added to this process's own.

    Returns:
        The figures, with ``process_s``: seconds from start to end of the process.

    Raises:
        UserError: the child ended with a mistake that the user can correct; its line is passed on.
        RuntimeError: it failed otherwise, or wrote nothing; the end of its output is in the message.
    """
    result.unlink(missing_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        [*command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode == USER_ERROR_STATUS and done.stderr.strip():
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode or not result.is_file():
        end = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{end}")
    return {**json.loads(result.read_text(encoding="utf-8")), "process_s": seconds}


def usable_cores() -> int:
    """Cores that this process may use: those of ``taskset`` or a container, not all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peer_path(peer: Path) -> str:
    """This process's ``PYTHONPATH`` with a peer's folder first."""
    return os.pathsep.join([str(peer), *filter(None, [os.environ.get("PYTHONPATH")])])


def environment(threads: int, peer: Path | None = None) -> dict[str, str]:
    """Variables of a child: threads, no GPU, no network, no telemetry; a peer's folder first on its path."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({"PYTHONPATH": peer_path(peer)} if peer else {}),
    }


def peer_folder(root: Path = Path(".stamps"), seconds: float | None = None) -> Path:
    """The folder of the peer's release, installed without its dependencies if it is not there yet.

    Args:
        root: where such folders are kept.
        seconds: that the installation may take; 0 = there is none.

    Returns:
        Its absolute path, to stand first on the ``PYTHONPATH`` of the peer's process alone.

    Raises:
        UserError: it cannot be installed, as without a network, or not in that time.
    """
    package, version = PEER
    folder = root.absolute() / f"{package}-{version}"
    if (folder / f"{package}-{version}.dist-info").is_dir():
        return folder
    if seconds == 0:
        raise UserError(f"{package}=={version}: run `make bench-ppo BENCH=--quick` once with a network")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        words = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", scratch]
        command = [sys.executable, "-m", "pip", *words, f"{package}=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
            said = (
                "" if not done.returncode else (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            )
        except subprocess.TimeoutExpired:
            said = f"pip took more than {seconds:.0f} s"
        if said:
            raise UserError(
                f"{package}=={version}, which this benchmark compares with, cannot be installed ({said}); "
                "run it once with a network, later runs need none"
            )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(scratch, folder)
    return folder


def check_release() -> None:
    """Theirs must run the release that is meant.

    Raises:
        RuntimeError: it is another one.
    """
    package, version = PEER
    if (found := importlib.metadata.version(package)) != version:
        raise RuntimeError(f"theirs runs {package} {found}, not {version}")


class Children:
    """The processes that do the work of a benchmark, one at a time.

    Args:
        command: a child's; the kind of work, the file of its task and that of its result follow.
        scratch: folder for these files.
        threads: of every child.
        peer: folder of the peer's release, for the children of theirs.
    """

    def __init__(self, command: Sequence[str], scratch: Path, threads: int, peer: Path | None = None) -> None:
        self.command, self.scratch, self.threads, self.peer = command, scratch, threads, peer

    def ask(self, kind: str, values: Mapping[str, Any]) -> Figures:
        """The figures of a child that has done one kind of work."""
        task, result = self.scratch / "task.json", self.scratch / "result.json"
        write_json(task, values)
        told = environment(self.threads, self.peer if kind == "theirs" else None)
        return run_child([*self.command, kind, str(task), str(result)], result, told)

    def base(self, arguments: argparse.Namespace, recipe: str) -> tuple[Path, int]:
        """Folder of the base, made tiny with ``--quick``, and its number of layers.

        Raises:
            UserError: it is not there; ``recipe`` is one that brings it.
        """
        base = self.scratch / "tiny" if arguments.quick else Path(arguments.base)
        if arguments.quick:
            self.ask("tiny", {"base": str(base)})
        if not (base / "config.json").is_file():
            raise UserError(f"--base: no model at {base}; run `make model RECIPE={recipe}` first")
        return base, int(read_json(base / "config.json")["num_hidden_layers"])

    def run(
        self,
        order: Sequence[Turn],
        task_of: Callable[[Turn], Mapping[str, Any]],
        speed: Callable[[Figures], str],
    ) -> list[Figures]:
        """Run sides in an order; each one's figures carry round, case, side and their place in time."""
        runs: list[Figures] = []
        for turn in order:
            figures = self.ask(turn.side, task_of(turn))
            print(
                f"round {turn.round + 1}, {turn.case}, {turn.side}: {speed(figures)}, {gigabytes(figures)}, "
                f"{figures['process_s']:.0f} s",
                flush=True,
            )
            runs.append({"place": len(runs), **turn._asdict(), **figures})
        return runs


def serve(kinds: Mapping[str, Callable[..., Figures]]) -> None:
    """Be a child: do the work that the command line names (``KIND TASK RESULT``, the latter JSON files).

    Args:
        kinds: what does each kind of work, called with the task's values; ``tiny`` writes a tiny base.
    """
    from rlhf.models.tiny import write_tiny_model

    def tiny(base: str) -> Figures:
        write_tiny_model(Path(base))
        return {}

    kind, task, result = sys.argv[1:]
    write_json(Path(result), {"tiny": tiny, **kinds}[kind](**read_json(Path(task))))


def weights_dtype(dtype: str) -> str:
    """The type of the weights of a base: ``autocast`` keeps them in float32."""
    return "float32" if dtype == "autocast" else dtype


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes.

    Linux hands down the peak of the parent in ``ru_maxrss``; VmHWM begins anew with every program.
    """
    found = _proc("/proc/self/status", r"^VmHWM:\s+(\d+) kB")
    if found is not None:
        return 1024 * int(found)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def gigabytes(figures: Figures) -> str:
    """The peak memory of a run, or the median peak of a side."""
    return f"{figures[MEMORY] / 1e9:.2f} GB"


def machine(packages: Iterable[str], *, peer: bool = False) -> Figures:
    """What figures depend on: processor, memory, load, versions; ``peer``: with theirs."""
    model = _proc("/proc/cpuinfo", r"^model name\s*:\s*(.+)$") or platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: importlib.metadata.version(name) for name in packages}
    if peer:
        versions[PEER[0]] = f"{PEER[1]} (theirs)"
    return {
        "cpu": model,
        "cores": usable_cores(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }


def _proc(file: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(file).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None
