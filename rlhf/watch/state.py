"""How far a run in progress is: read from its folder, without a word to its processes. No torch here."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.report.gather import stages_of
from rlhf.runs.artifacts import MANIFEST, hash_of
from rlhf.runs.lock import FILE as LOCK
from rlhf.runs.stage import PROGRESS, ROAD

_LOCKS = Path("/proc/locks")
_SHOWN = ("manifest.json", "metrics.jsonl", "recipe.yaml", "fingerprint.json", "card.json", "summary.json",
          "tax.json", "responses.jsonl")  # fmt: skip
"""The files of a stage that its part of the page is made of."""


def version_of(folders: Sequence[Path]) -> str:
    """What changes when the page of these runs would: a hash of sizes and times of their files."""
    found = []
    for folder in folders:
        for file in sorted(file for name in _SHOWN for file in folder.glob(f"*/{name}")):
            with contextlib.suppress(OSError):
                status = file.stat()
                found.append([str(file), status.st_mtime_ns, status.st_size])
    return hash_of(found)[:16]


def now_of(folder: Path) -> str:
    """One line about a run: what runs, how far it is, how long it still takes, when it was last heard of."""
    if not folder.is_dir():
        return f"{folder.name}: not begun ({folder} is not there); this page fills itself once it is"
    begun = [file.parent for file in folder.glob("*/fingerprint.json")]
    open_ones = [stage for stage in begun if not (stage / MANIFEST).exists()]
    running = [stage for stage in open_ones if _is_locked(stage / LOCK)]
    if running:
        newest = max(running, key=lambda stage: _changed(stage / "fingerprint.json"))
        return f"{folder.name}: {_running(newest)}"
    last = max((_changed(file) for stage in begun for file in stage.glob("*.json*")), default=0.0)
    heard = f"; last change {_ago(last)}" if last else ""
    if open_ones:
        stopped = max(open_ones, key=lambda stage: _changed(stage / "fingerprint.json"))
        return f"{folder.name}: {stopped.name} has stopped before its end: the same command goes on{heard}"
    its = stages_of(folder)
    left = [name for name in ROAD if name in its and not (folder / name / MANIFEST).exists()]
    return (
        f"{folder.name}: "
        + (f"no stage runs just now; still to do: {', '.join(left)}" if left else "finished")
        + heard
    )


def _running(stage: Path) -> str:
    """What a stage that runs says of itself."""
    parts, progress = [f"{stage.name} runs"], _progress(stage / PROGRESS)
    if progress is not None:
        done, total = progress["done"], progress["total"]
        what = "" if progress["what"] == stage.name else f"{progress['what']}: "
        parts.append(f"{what}{done:,.0f} of {total:,.0f} ({done / total:.0%})")
        if done >= total:
            parts.append("its last part, saving and measuring")
        elif (left := _seconds_left(progress)) is not None:
            parts.append(f"about {_duration(left)} left in it")
    metric = _changed(stage / "metrics.jsonl")
    parts.append(
        f"last metric {_ago(metric)}" if metric else f"begun {_ago(_changed(stage / 'fingerprint.json'))}"
    )
    return ", ".join(parts)


def _progress(file: Path) -> dict[str, Any] | None:
    """The note of a bar; None where there is none, or one that is no note."""
    try:
        found = json.loads(file.read_bytes())
        numbers = {key: float(found[key]) for key in ("done", "total", "first", "began", "at")}
        usable = all(map(math.isfinite, numbers.values())) and numbers["total"] > 0
        return {"what": str(found["what"]), **numbers} if usable else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _seconds_left(progress: dict[str, Any]) -> float | None:
    """By the pace since the stage was started or resumed."""
    done = progress["done"] - progress["first"]
    spent = progress["at"] - progress["began"]
    if done <= 0 or spent <= 0:
        return None
    return max(0.0, (progress["total"] - progress["done"]) * spent / done - (time.time() - progress["at"]))


def _is_locked(file: Path) -> bool:
    """Whether a process of this machine holds the lock of a stage; nothing is locked to find out."""
    try:
        status = file.stat()
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        return any(device in line.split() for line in _LOCKS.read_text(encoding="ascii").splitlines())
    except OSError:
        return False


def _changed(file: Path) -> float:
    with contextlib.suppress(OSError):
        return file.stat().st_mtime
    return 0.0


def _ago(moment: float) -> str:
    return f"{_duration(max(0.0, time.time() - moment))} ago"


def _duration(seconds: float) -> str:
    minutes = round(seconds) // 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
