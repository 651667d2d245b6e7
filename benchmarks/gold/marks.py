"""How far a training was after how many seconds: its adapter and the clock, every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures


class Marks:
    """Keeps the adapter of a training at marks; writing it does not count as time.

    Args:
        folder: for the adapters, each in a folder ``step-N``.
        every: steps from one mark to the next; the last step is one too.
        last: number of steps.
    """

    def __init__(self, folder: Path, every: int, last: int) -> None:
        self.folder, self.every, self.last = folder, every, last
        self.step, self.seconds, self.found = 0, 0.0, list[Figures]()
        self.start()

    def start(self) -> None:
        """Training begins, or goes on, now."""
        self._since = time.perf_counter()

    def end_step(self, save: Callable[[Path], Any]) -> None:
        """A step has ended; ``save`` writes the adapter to a folder where this is a mark."""
        self.seconds += time.perf_counter() - self._since
        self.step += 1
        if self.step % self.every == 0 or self.step == self.last:
            save(self.folder / f"step-{self.step}")
            self.found.append({"step": self.step, "seconds": self.seconds})
        self.start()

    def done(self) -> list[Figures]:
        """The marks, {step, seconds of training until then} each.

        Raises:
            RuntimeError: the training has ended at another step than the last one.
        """
        if self.step != self.last:
            raise RuntimeError(f"the training has ended after {self.step} steps, not {self.last}")
        return self.found
