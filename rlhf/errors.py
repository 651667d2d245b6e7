"""The one error that a user is meant to see, and the one place that turns it into an exit status."""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import errno
import io
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FIRST_SPEAKS = 4.0  # seconds that the other processes wait before they say what is wrong
USER_ERROR_STATUS = 2  # exit status of every mistake that the user can mend
_TORCH_WRITER = ("file write failed", "unexpected pos", "failed writing")  # of a checkpoint, without errno

_ADVICE = {  # what to do about what the system refuses; other errors may be bugs and keep a traceback
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or choose a file system without one",
    errno.EROFS: "it lies on a read-only file system: run in a folder that can be written",
    errno.EACCES: "change its owner or mode (ls -l), or run as a user who may",
    errno.EPERM: "change its owner, mode or attributes (lsattr), or run as a user who may",
    errno.EMFILE: "raise the limit on open files (ulimit -n 4096)",
    errno.ENFILE: "the machine has too many open files: stop other programs",
    errno.ENAMETOOLONG: "use a shorter name or path",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "it is a folder; name a file",
    errno.EIO: "the disk fails: look at the system's log (dmesg)",
    errno.ESTALE: "the network file system lost it: mount it anew",
    errno.ENXIO: "it is a pipe or device; name a plain file",
}

_LOST_PROCESS = (  # gloo, NCCL, torch's store
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "pair closure",
    "connection refused",
    "remote process exit",
    "socket timeout",
    "timed out",
    "wait timeout",
)


_NO_MEMORY = ("CUDA error: out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")  # besides torch's own class
LESS_MEMORY: contextvars.ContextVar[str] = contextvars.ContextVar("LESS_MEMORY", default="free some memory")
"""What to do where the memory of a device is not enough, in the stage that this process is in."""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class CommandLine(argparse.ArgumentParser):
    """Options of a command, whose mistakes are one line too, without a usage."""

    def error(self, message: str) -> NoReturn:
        """A mistake that argparse has found.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; --help lists the options")


def first_line(error: BaseException, limit: int | None = None) -> str:
    """The first line of an error's message, of at most ``limit`` characters; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def errno_of(error: BaseException) -> int | None:
    """The operating system's number of an error, read out of safetensors' and torch's words where need be."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error) if isinstance(error, Exception) else ""
    number = re.search(r"\(os error (\d+)\)", text)
    if number:
        return int(number[1])
    torchs = "inline_container" in text and any(sign in text for sign in _TORCH_WRITER)
    if torchs or "basic_ios::clear" in text:  # the writer's last bytes did not get to the disk
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        return errno.EFBIG if limited else errno.ENOSPC
    return errno.ENOSPC if "No space left" in text or "StorageFull" in text else None


def refused_by_system(error: BaseException) -> str | None:
    """One line about what the operating system refuses: a full disk, a file too large, no right to it, ...

    None for other errors.
    """
    number = errno_of(error)
    if number not in _ADVICE:
        return None
    names = [getattr(error, name, None) for name in ("filename", "filename2")]
    where = " -> ".join(repr(os.fsdecode(n))[1:-1] for n in names if isinstance(n, str | bytes | os.PathLike))
    what = "the disk is full" if number == errno.ENOSPC else os.strerror(number).lower()
    advice = f"{_ADVICE[number]} and run the same command again; the last complete checkpoint is untouched"
    return f"{what}{f': {where}' if where else ''}: {advice}"


def out_of_memory(error: BaseException) -> str | None:
    """One line about a device whose memory is not enough: what was asked for, and :data:`LESS_MEMORY`.

    None for other errors. No torch here, so its class goes by its name.
    """
    text = " ".join(str(error).split())
    kinds = {kind.__name__ for kind in type(error).__mro__}
    torchs = isinstance(error, RuntimeError) and any(sign in text for sign in _NO_MEMORY)
    if not (torchs or kinds & {"OutOfMemoryError", "MemoryError"}):
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)|Unable to allocate ([\d.]+ \w+)", text)
    gpu = re.search(r"(GPU \d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    what = f" for {asked[1] or asked[2]}" if asked else ""
    where = f" on {gpu[1]} ({gpu[2]}, {gpu[3]} free)" if gpu else ""
    return f"out of memory: no room{what}{where}; {LESS_MEMORY.get()}"


def lost_process(error: BaseException) -> str | None:
    """What a collective call says when another process of the run ended or hangs; None for other errors."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return None
    text = " ".join(str(error).split())
    # gloo raises a plain RuntimeError with its source file; no torch here, so the class goes by its name
    if "/gloo/" not in text and "DistError" not in {kind.__name__ for kind in type(error).__mro__}:
        return None
    if not any(sign in text.lower() for sign in _LOST_PROCESS):
        return None
    return re.sub(r"^\[[^]]*\] ?", "", text).partition(". ")[0][:120]


class LostProcessError(UserError):
    """A process that cannot go on without another one."""


def lost_process_error(
    reason: str, stage: str = "", goes_on: str = "from its last checkpoint"
) -> LostProcessError:
    """The error of a process that cannot go on without another one.

    Args:
        reason: of :func:`lost_process`.
        stage: where it was.
        goes_on: where the same command will go on.
    """
    return LostProcessError(
        f"{stage + ': ' if stage else ''}another process of this run ended or hangs ({reason}); look at its "
        f"last lines, then run the same command again: it goes on {goes_on}"
    )


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a stage's ``main``; a :class:`UserError` becomes one line on stderr and exit status 2.

    What the operating system refuses, a device without room and the loss of another process are reported in
    the same way: the commonest faults that are nobody's bug. A stop by Ctrl-C, SIGTERM or SIGHUP is one line
    too, with the status that a shell gives it. What all processes of a run find wrong the first one says, and
    its launcher ends the others.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):  # an emoji in a response must not end a run in an ASCII terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except Exception as error:
        line = _message_of(error)
        if os.environ.get("RANK", "0") != "0" and type(error) is UserError:
            time.sleep(FIRST_SPEAKS)
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once, as SIGKILL would: what lies on the disk is whole at every moment.

    An exception would not do: one raised in a destructor or in a callback of a library is swallowed, one in
    an import becomes another error, and one in a computation can leave a result that is not whole.
    """
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        line = f"stopped by {name}; run the same command again: it goes on from what is on the disk\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
    with contextlib.suppress(Exception):  # it may be what was interrupted
        sys.stdout.flush()
    os._exit(128 + number)


def _message_of(error: Exception) -> str:
    """The line for the user; raises the error again where it is nobody's but ours."""
    if isinstance(error, UserError):
        return str(error)
    if (lost := lost_process(error)) is not None:
        return str(lost_process_error(lost))
    line = out_of_memory(error) or refused_by_system(error)
    if line is None:
        raise error
    return line
