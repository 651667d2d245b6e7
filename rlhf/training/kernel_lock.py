"""A guard against the lock that a killed build of DeepSpeed's CPU kernel leaves behind.

At its first start DeepSpeed compiles a small kernel into torch's extension folder. While it does, a file
``lock`` lies there, and other processes wait for it to go (``torch.utils.file_baton``). A build that is
killed never removes it: every later start would wait for ever, without a word.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf.errors import UserError
from rlhf.runs.stage import rank

QUIET_SECONDS = (
    600.0  # a build that has written nothing for so long is dead; DeepSpeed's takes about one minute
)
_KERNELS = "deepspeed_*"


def _print(line: str) -> None:
    print(line, flush=True)


def extension_folders() -> list[Path]:
    """Where torch builds DeepSpeed's kernels for this user: one folder a kernel."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return sorted(Path(named).glob(_KERNELS))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return sorted((cache / "torch_extensions").glob(f"py*_*/{_KERNELS}"))


def settle_locks(
    say: Callable[[str], None] = _print,
    *,
    quiet_seconds: float = QUIET_SECONDS,
    poll_seconds: float = 0.5,
) -> None:
    """Return when no kernel is locked: a dead build's lock is removed, a living build is waited for.

    Every process calls it before it touches DeepSpeed; any number may do so at once. Otherwise one that waits
    inside torch would go on with a half-built kernel as soon as another removes the lock.

    Args:
        say: gets a line for a lock that is removed, and, in the first process, for one that is waited for.
        quiet_seconds: a lock is dead where neither it nor any file beside it is younger.
        poll_seconds: how often a living build is looked at.

    Raises:
        UserError: a dead lock cannot be removed.
    """
    for folder in extension_folders():
        lock = folder / "lock"
        told = rank() != 0
        while lock.exists():
            with _alone(folder):  # nobody may remove the lock that a new build has made meanwhile
                age = _quiet_for(folder)
                if lock.exists() and age > quiet_seconds:
                    _remove(lock)
                    say(
                        f"deepspeed: removed {lock}, left by a build that was killed ({age / 60:.0f} min ago)"
                    )
                    break
            if not told:
                say(
                    f"deepspeed: waiting for the build in {folder}; if none is running, remove {lock} "
                    f"(done by itself {quiet_seconds / 60:.0f} min after the build's last sign of life)"
                )
                told = True
            time.sleep(poll_seconds)


def _quiet_for(folder: Path) -> float:
    """Seconds since a file of a folder was last written; 0 while they come and go."""
    try:
        return time.time() - max(file.stat().st_mtime for file in folder.iterdir())
    except (FileNotFoundError, ValueError):
        return 0.0


def _remove(lock: Path) -> None:
    try:
        lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{lock} was left by a killed build and cannot be removed ({error.strerror}); remove it by hand"
        ) from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system can tell; the lock goes with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
