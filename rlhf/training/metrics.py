"""Metrics to JSONL and to trackers, and the few numbers that the progress bar shows."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.runs.artifacts import read_jsonl, write_atomically
from rlhf.runs.stage import recipe_of
from rlhf.training.progress import progress


class Metrics:
    """The log of one stage: ``metrics.jsonl`` (one object a step), and the recipe's trackers.

    Args:
        folder: the stage's directory.
        total: number of steps, for the progress bar.
        done: steps finished before; lines after them belong to a lost part of the run and are removed, so
            that a resumed log has each step once.
        shown: names that the progress bar shows, with their formats.
        description: left of the bar.
        active: False on all but one process.
        trackers: names of trackers; None = those of the recipe in the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        done: int,
        shown: dict[str, str],
        description: str,
        active: bool = True,
        trackers: Sequence[str] | None = None,
    ) -> None:
        self.active = active
        self.shown = shown
        self.file = folder / "metrics.jsonl"
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _keep_steps(self.file, done)
        if trackers is None:
            trackers = recipe_of(folder).get("trackers", ()) if (folder / "recipe.yaml").is_file() else ()
        self._trackers: list[Any] = []
        if trackers:
            from rlhf.training.trackers import start_trackers

            self._trackers = start_trackers(trackers, folder, done)
        self._bar = progress(description, total=total, initial=done, leave=True, delay=0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one step's values (step counts from 1) and move the bar on."""
        if not self.active:
            return
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in values.items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **clean}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint of this step: it would not be written again
        for tracker in self._trackers:
            tracker.log(values, step=step)
        text = " ".join(f"{name.rpartition('/')[2]} {values[name]:{form}}"
                        for name, form in self.shown.items() if name in values)  # fmt: skip
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Flush and release."""
        if self.active:
            self._bar.refresh()
            self._bar.close()
            for tracker in self._trackers:
                tracker.finish()


def _keep_steps(file: Path, done: int) -> None:
    """Drop lines after the last checkpoint, and a half-written last line."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    write_atomically(file, "".join(kept))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All logged steps of a stage."""
    file = folder / "metrics.jsonl"
    return read_jsonl(file) if file.is_file() else []
