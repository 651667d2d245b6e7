"""One start at a time in a stage's folder, which all its processes must see.

The first process holds a lock and writes into its file which start it is of; the others wait
for that, so that a machine with a folder of its own is told before it works.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from pathlib import Path
from typing import TextIO

from rlhf.errors import UserError
from rlhf.runs.processes import processes, rank

FILE = ".lock"
SEEN_WITHIN = 120.0  # seconds from one process to the next, for what they read before


def locked(folder: Path) -> TextIO:
    """The lock of a stage's folder, which is made; it is held until the file is closed.

    Raises:
        UserError: another start has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / FILE).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{folder}: another process is running this stage; wait for it, or stop it and run again"
        ) from None
    file.write(_start())
    file.flush()
    os.fsync(file.fileno())  # to be read on other machines while it is open here
    return file


def wait_for_first(folder: Path) -> None:
    """Wait until the first process of this start has the lock.

    Raises:
        UserError: what it writes is not seen here.
    """
    deadline = time.monotonic() + SEEN_WITHIN
    while processes() > 1:
        with contextlib.suppress(OSError):
            if (folder / FILE).read_text(encoding="utf-8") == _start():
                return
        if time.monotonic() > deadline:
            raise unshared(folder)
        time.sleep(0.05)


def unshared(folder: Path) -> UserError:
    """The error of a process that does not see a folder of the first one."""
    return UserError(
        f"process {rank()} on {platform.node()} does not see what the first process writes into "
        f"{folder.absolute()}: run in a folder that all machines share"
    )


def _start() -> str:
    """What tells this start of several processes from others; empty for one process alone."""
    return f"{processes()}@{os.environ.get('MASTER_PORT', '')}" if processes() > 1 else ""
