"""What people said, kept as native rows of comparisons, one JSON line an answer.

A row is on the disk before the one who gave it is thanked. Several processes may add to one file (`make rank`
and `make chat` do): each writes whole lines under a lock of the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.data.comparisons import Comparison, native_row
from rlhf.errors import UserError
from rlhf.runs.artifacts import sync, write_jsonl

ANSWERS = "comparisons.jsonl"
"""The file of answers in a session's folder."""
Answer = dict[str, Any]
"""A native row with ``annotator``, and what else was said (``reason``, ``skipped``, ``all_bad``, ...)."""


def answer(comparison: Comparison, annotator: str, **more: Any) -> Answer:
    """The row of a comparison that a person made; of ``more`` what is None or empty is left out."""
    return {**native_row(comparison), "annotator": annotator, **{k: v for k, v in more.items() if v}}


class Store:
    """A file of answers; it and its folder are made with the first one.

    What a killed process left half-written at its end is cut off when the file is opened: it was not yet
    confirmed to anybody.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        if path.exists():
            with self._locked():
                self._mend()

    def append(self, row: Answer) -> None:
        """Add an answer; when this returns it is on the disk.

        Raises:
            OSError: the disk is full or not writable; the file is as it was.
        """
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._locked():
            fresh = not self.path.exists()
            if not fresh:
                self._mend()
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(line) != len(line):
                        raise OSError(28, os.strerror(28), str(self.path))  # as of a disk that filled up
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(size)
                    raise
            if fresh:
                sync(self.path.parent)

    def rows(self) -> list[Answer]:
        """All answers, in the order in which they were given.

        Raises:
            UserError: a line is damaged.
        """
        return [row for row, _ in self._lines()] if self.path.exists() else []

    def take_back(self, chosen: Callable[[Answer], bool]) -> Answer | None:
        """Remove the last answer for which ``chosen`` says so, and return it; None where there is none."""
        with self._locked():
            if self.path.exists():
                self._mend()
            rows = self.rows()
            last = next((i for i in reversed(range(len(rows))) if chosen(rows[i])), None)
            if last is None:
                return None
            row = rows.pop(last)
            write_jsonl(self.path, rows)
            return row

    def _lines(self) -> Iterator[tuple[Answer, int]]:
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), 1):
            if line.strip():
                row = _object(line)
                if row is None:
                    raise UserError(f"{self.path}:{number}: not a JSON object; mend or remove this line")
                yield row, number

    def _mend(self) -> None:
        """Give the last line its end, or cut it off where it is none."""
        with self.path.open("r+b") as file:
            content = file.read()
            start = content.rfind(b"\n") + 1
            if start == len(content):
                return
            if _object(content[start:]) is None:
                print(f"{self.path}: a half-written last line is cut off", flush=True)
                file.truncate(start)
            else:
                file.write(b"\n")
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Between threads, and between processes."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_name(f".{self.path.name}.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield


def _object(line: bytes) -> Answer | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
