"""A polite request to stop: SIGTERM of a scheduler, Ctrl-C, SIGHUP of a terminal that closes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rlhf.errors import STOP_SIGNALS


class StopRequest:
    """Remembers that somebody asked this process to end."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def asked(self) -> bool:
        """Whether this process got a signal."""
        return self.number is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note a signal instead of dying of it; afterwards it means again what it meant before.

        One that is ignored stays so: ``nohup`` keeps SIGHUP away from a run.
        """
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
            yield
            return
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    def leave(self, stage: str, kept: str, *, is_main: bool) -> NoReturn:
        """End a stage that was asked to stop; one line says what is kept of its work.

        Raises:
            SystemExit: 128 + the signal's number, as in a shell, so that no later stage starts; that of
                SIGTERM where another process of the run got the signal.
        """
        number = signal.Signals(self.number or signal.SIGTERM)
        if is_main:
            kept = f"{kept}, the same command goes on from there"
            print(f"{stage}: asked to stop ({number.name}); {kept}", flush=True)
        raise SystemExit(128 + number)
