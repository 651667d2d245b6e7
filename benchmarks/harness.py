"""Two programs side by side: child processes in turn, medians, what the machine is, result files.

Nothing heavy is imported here: the parent stays small while its children are measured.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import USER_ERROR_STATUS, UserError
from rlhf.runs.artifacts import write_atomically, write_json

Figures = dict[str, Any]
"""What a child measured: JSON."""


class Turn(NamedTuple):
    """One child process of a benchmark."""

    round: int
    """From 0."""
    case: str
    side: str


def turns(cases: Sequence[str], sides: tuple[str, str], rounds: int) -> list[Turn]:
    """The order of the children: every case once a round, its two sides one after the other.

    The order of the sides is swapped every second round, so that whatever one leaves behind (a warm cache, a
    hot processor) helps or hurts both alike.
    """
    return [
        Turn(number, case, side)
        for number in range(rounds)
        for case in cases
        for side in (sides if number % 2 == 0 else sides[::-1])
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
        UserError: the child ended with a mistake that the user can mend; its line is passed on.
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


def run_all(order: Iterable[Turn], run: Callable[[Turn], Figures]) -> list[Figures]:
    """Run the children one at a time; each one's figures carry round, case, side and their place in time."""
    runs: list[Figures] = []
    for turn in order:
        runs.append({"place": len(runs), **turn._asdict(), **run(turn)})
    return runs


def raw(runs: Iterable[Figures], case: str, side: str, name: str) -> list[float]:
    """One figure of all runs of a side, in the order of the rounds."""
    chosen = [r for r in runs if (r["case"], r["side"]) == (case, side)]
    return [float(r[name]) for r in sorted(chosen, key=lambda r: r["round"])]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Figures:
    """Their median over our median; over 1 is to our favour where the figure is a cost.

    Args:
        theirs: a cost (seconds, bytes) of every run, by round.
        ours: the same of ours.

    Returns:
        ``value``, ``by_round``: the quotient of each round, and ``low`` and ``high``, their ends.

    Raises:
        ValueError: another number of rounds on each side, none, or a cost that is not positive.
    """
    if len(theirs) != len(ours) or not ours:
        raise ValueError(f"{len(theirs)} runs of theirs against {len(ours)} of ours")
    if min(*theirs, *ours) <= 0:
        raise ValueError("a cost is positive")
    each = [t / o for t, o in zip(theirs, ours, strict=True)]
    return {
        "value": statistics.median(theirs) / statistics.median(ours),
        "by_round": each,
        "low": min(each),
        "high": max(each),
    }


def medians(
    runs: Sequence[Figures], cases: Iterable[str], sides: Iterable[str]
) -> dict[str, dict[str, Figures]]:
    """The median of every figure that is one number, by case and side, of those that were run."""
    found: dict[str, dict[str, Figures]] = {}
    for case, side in itertools.product(cases, sides):
        some = [r for r in runs if (r["case"], r["side"]) == (case, side)]
        if not some:
            continue
        names = [n for n, v in some[0].items() if type(v) in (int, float) and n not in ("place", "round")]
        found.setdefault(case, {})[side] = {n: statistics.median(r[n] for r in some) for n in names}
    return found


def environment(threads: int) -> dict[str, str]:
    """What a child is told: so many threads, no GPU, no network, no telemetry."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes.

    Linux hands down the peak of the parent in ``ru_maxrss``; VmHWM begins anew with every program.
    """
    found = _proc("/proc/self/status", r"^VmHWM:\s+(\d+) kB")
    if found is not None:
        return 1024 * int(found)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> int | None:
    """Resident memory of this process just now, in bytes; None where the system does not say."""
    found = _proc("/proc/self/status", r"^VmRSS:\s+(\d+) kB")
    return None if found is None else 1024 * int(found)


def machine(packages: Iterable[str]) -> Figures:
    """What the figures depend on: processor, memory, versions, and how busy the machine is just now."""
    model = _proc("/proc/cpuinfo", r"^model name\s*:\s*(.+)$") or platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _proc(file: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(file).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def command_line(module: str, words: Sequence[str]) -> str:
    """How a benchmark was called, with files of other places by their names alone."""
    return " ".join(["python -m", module, *map(relative_name, words)])


def relative_name(word: str) -> str:
    """A path below the current folder as it is, any other by its last part."""
    option, equals, value = word.rpartition("=")
    path = Path(value).expanduser()
    elsewhere = path.is_absolute() or ".." in path.parts
    return f"{option}{equals}{path.name if elsewhere else value}"


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_results(folder: Path, name: str, report: Figures, text: str) -> None:
    """Write ``name.json`` and ``name.md``."""
    write_json(folder / f"{name}.json", report)
    write_atomically(folder / f"{name}.md", text)
