"""Units of work, each kept as one small JSON under the hash of its configuration.

A unit whose file is there is done; a study is therefore resumable by construction, and a changed
configuration is another unit. A unit may leave weights beside its JSON for the units that need it; the JSON
is written last, so that it stands for both.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.runs.artifacts import hash_of, write_atomically

# Part of every key. To be raised when the meaning of a unit changes but its settings do not: a change of
# the grammar, of a loss, of what is measured.
REVISION = 1
_NAMED = ("model", "layers", "seed", "data", "arm", "target", "pairs", "labels", "epochs")

Settings = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """One piece of work: what to do, with which settings, after which other units.

    settings: JSON values, all that decides the result. cost: expected seconds on an idle core; decides the
    order and the remaining time, not the result.
    """

    kind: str
    settings: Settings
    needs: tuple[Unit, ...] = ()
    cost: float = 1.0

    @property
    def key(self) -> str:
        """Hash of everything that decides the result, that of the units needed included."""
        what = {
            "revision": REVISION,
            "kind": self.kind,
            "settings": self.settings,
            "needs": [n.key for n in self.needs],
        }
        return hash_of(what)[:24]

    @property
    def name(self) -> str:
        """The unit in words: kind and those settings that tell it from its neighbors."""
        return " ".join([self.kind, *(f"{k}={self.settings[k]}" for k in _NAMED if k in self.settings)])


Compute = Callable[[Unit, Path], dict[str, Any]]
"""What a unit does: gives its result, for JSON; weights go to :func:`weights_path` by :func:`keep`."""


def result_path(unit: Unit, folder: Path) -> Path:
    """Where the result of a unit stands once it is done."""
    return folder / f"{unit.kind}-{unit.key}.json"


def weights_path(unit: Unit, folder: Path) -> Path:
    """Where the weights that a unit leaves for others stand."""
    return folder / f"{unit.kind}-{unit.key}.safetensors"


def keep(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, then move it there."""
    unfinished = path.with_name(f"{path.name}.unfinished.{os.getpid()}")
    write(unfinished)
    unfinished.replace(path)


def read_result(unit: Unit, folder: Path) -> dict[str, Any] | None:
    """The finished result of a unit, None if there is none (or none that can be read)."""
    try:
        found = json.loads(result_path(unit, folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_done(unit: Unit, folder: Path) -> bool:
    """Whether a unit need not be done: its result is there, and the weights it says it left."""
    found = read_result(unit, folder)
    return found is not None and (not found["weights"] or weights_path(unit, folder).exists())


def execute(compute: Compute, unit: Unit, folder: Path) -> None:
    """Do a unit and keep its result with the settings it came from; the file appears only when complete."""
    wall, cpu = time.monotonic(), time.process_time()
    result = compute(unit, folder)
    content = {
        "unit": unit.name,
        "settings": unit.settings,
        "result": result,
        "weights": weights_path(unit, folder).exists(),
        "seconds": round(time.monotonic() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }
    write_atomically(result_path(unit, folder), json.dumps(content, indent=1, sort_keys=True) + "\n")


def with_needs(units: Iterable[Unit]) -> list[Unit]:
    """All the units and what they need, each once, a unit never before what it needs."""
    ordered: dict[str, Unit] = {}

    def visit(unit: Unit) -> None:
        for need in unit.needs:
            visit(need)
        ordered.setdefault(unit.key, unit)

    for unit in units:
        visit(unit)
    return list(ordered.values())


class _Here(Executor):
    """Does at once, in this process, what is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **options))
        return future


def run(
    units: Iterable[Unit],
    folder: Path,
    compute: Compute,
    *,
    say: Callable[[str], None],
    pool: Executor | None = None,
    jobs: int = 1,
) -> None:
    """Do every unit that is not done, with one line a unit and the remaining time at the pace so far.

    pool: where to, ``jobs`` units at a time, each when those it needs are done and the most expensive first;
    None = here, one after the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = with_needs(units)
    done = {u.key for u in everything if is_done(u, folder)}
    todo = [u for u in everything if u.key not in done]
    say(f"{len(everything)} units, {len(done)} of them done before")
    cost, paid, start = sum(u.cost for u in todo), 0.0, time.monotonic()
    running: dict[Future[None], Unit] = {}
    while todo or running:
        ready = [u for u in todo if all(n.key in done for n in u.needs)]
        for unit in sorted(ready, key=lambda u: -u.cost)[: jobs - len(running)]:
            todo.remove(unit)
            running[(pool or _Here()).submit(execute, compute, unit, folder)] = unit
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            unit = running.pop(future)
            future.result()
            done.add(unit.key)
            paid += unit.cost
            left = (time.monotonic() - start) * (cost - paid) / paid / 60
            took = (read_result(unit, folder) or {}).get("seconds", 0.0)
            say(f"[{len(done)}/{len(everything)}] {unit.name}: {took:.0f} s, {left:.0f} min left")
