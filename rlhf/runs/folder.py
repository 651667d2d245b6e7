"""The folder of one stage within a run: its files, its clock, and where the other stages lie.

No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.runs import artifacts
from rlhf.runs.artifacts import Checkpoints
from rlhf.runs.cache import remember


@dataclasses.dataclass
class StageFolder:
    """Where a stage works. Who only reads a run, or works beside its stages, needs no more than this."""

    stage: str
    folder: Path
    is_main: bool = True
    started: float = dataclasses.field(default_factory=time.monotonic, kw_only=True)

    @property
    def checkpoints(self) -> Checkpoints:
        """Where the stage keeps its checkpoints."""
        return Checkpoints(self.folder / "checkpoints")

    def parent(self, stage: str) -> Path:
        """Folder of another stage of the same run."""
        return self.folder.parent / stage

    def say(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.is_main:
            print(line, flush=True)

    def clock(self) -> dict[str, float]:
        """Seconds and peak memory (bytes) of all sessions so far; also noted for the next session."""
        file = self.folder / "clock.json"
        before = {"seconds": 0.0, "peak_bytes": 0.0}
        with contextlib.suppress(OSError, ValueError, TypeError):  # work is not thrown away for a clock
            before |= json.loads(file.read_bytes())
        return {
            "seconds": before["seconds"] + time.monotonic() - self.started,
            "peak_bytes": max(before["peak_bytes"], peak_bytes()),
        }

    def note_clock(self) -> None:
        """Keep the time used so far, so that a resumed stage reports all of it."""
        if self.is_main:
            clock = self.clock()
            artifacts.write_json(self.folder / "clock.json", clock)
            self.started = time.monotonic()

    def remember(
        self,
        name: str,
        compute: Callable[[], Any],
        *,
        key: object = None,
        folder: Path | None = None,
        own: bool = False,
    ) -> Any:
        """A value that is computed once in all sessions (:func:`rlhf.runs.cache.remember`).

        Args:
            name: of the value and of its file.
            compute: gives the value, JSON-able; every process calls it, the main one writes.
            key: what the value depends on beyond the stage's fingerprint.
            folder: where it is kept, ``parts`` of the stage by default, which goes with the stage's end.
            own: this process alone computes it, and so writes it.
        """
        kept = folder or self.folder / "parts"
        return remember(kept, name, key, compute, is_main=self.is_main or own, on_new=self.note_clock)


def peak_bytes() -> float:
    """Peak resident memory of this process and of its finished children, in bytes."""
    kilobytes = max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return float(kilobytes * 1024)
