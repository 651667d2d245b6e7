"""The page of runs in progress, made when something has changed and somebody looks."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.report.gather import gather
from rlhf.report.page import page_of
from rlhf.watch.state import now_of, version_of
from rlhf.web.server import Reply, Request, Routes, json_reply

_SHARE = 0.1  # of the time of one core that pages may take; the run has the rest


class Live:
    """What is served of some runs.

    Args:
        folders: of the runs; one that is not there yet is waited for.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self._lock = threading.Lock()  # matplotlib draws one figure at a time
        self._version = ""
        self._page = Reply("")
        self._rests_until = 0.0

    def routes(self) -> Routes:
        """What the server serves."""
        return {"GET /": self.page, "GET /state": self.state}

    def page(self, _: Request = Request()) -> Reply:  # noqa: B008 - never changed
        """The report, as the files have it now, or a moment ago where it takes long to make."""
        with self._lock:
            if self.version() != self._version:
                began = time.monotonic()
                self._version = version_of(self.folders)  # first: what changes meanwhile is news
                content, policy = page_of(
                    [gather(folder) for folder in self.folders], Path("page"), live=True
                )
                self._page = Reply(content, policy=f"{policy}; frame-ancestors 'none'")
                self._rests_until = time.monotonic() + (time.monotonic() - began) / _SHARE
            return self._page

    def state(self, _: Request = Request()) -> Reply:  # noqa: B008
        """What changes with every look: the version of the page, and a line about every run."""
        lines = [now_of(folder) for folder in self.folders]
        return json_reply({"version": self.version(), "now": "\n".join(lines)})

    def version(self) -> str:
        """That of the files, or of the page where it has been made so lately that the run deserves a rest."""
        return self._version if time.monotonic() < self._rests_until else version_of(self.folders)
