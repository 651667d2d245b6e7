"""A polite request to stop: SIGTERM, as schedulers send it before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class StopRequest:
    """Remembers that somebody asked this process to end."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM instead of dying of it; afterwards it means again what it meant before."""
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def leave(stage: str, kept: str, *, is_main: bool) -> NoReturn:
    """End a stage that was asked to stop; one line says what is kept of its work."""
    if is_main:
        print(f"{stage}: asked to stop (SIGTERM); {kept}, the same command goes on from there", flush=True)
    raise SystemExit(0)
