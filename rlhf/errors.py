"""The one error that a user is meant to see, and the one place that turns it into an exit status."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2  # exit status of every mistake that the user can mend
_FULL_DISK = ("No space left", "StorageFull", "os error 28", "file write failed")  # safetensors, torch

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


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def is_full_disk(error: BaseException) -> bool:
    """Whether an error is some library's way of saying "no space left"."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, Exception) and any(sign in str(error) for sign in _FULL_DISK)


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


def lost_process_error(reason: str, stage: str = "", goes_on: str = "from its last checkpoint") -> UserError:
    """The error of a process that cannot go on without another one.

    Args:
        reason: of :func:`lost_process`.
        stage: where it was.
        goes_on: where the same command will go on.
    """
    return UserError(
        f"{stage + ': ' if stage else ''}another process of this run ended or hangs ({reason}); look at its "
        f"last lines, then run the same command again: it goes on {goes_on}"
    )


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a stage's ``main``; a :class:`UserError` becomes one line on stderr and exit status 2.

    A full disk and the loss of another process are reported in the same way: the commonest faults that are
    nobody's bug.
    """
    try:
        main()
    except Exception as error:
        print(f"error: {_message_of(error)}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)


def _message_of(error: Exception) -> str:
    """The line for the user; raises the error again where it is nobody's but ours."""
    if isinstance(error, UserError):
        return str(error)
    if (lost := lost_process(error)) is not None:
        return str(lost_process_error(lost))
    if not is_full_disk(error):
        raise error
    file = getattr(error, "filename", None)
    where = f" while writing {file}" if file else ""
    return (
        f"the disk is full{where}: free some space and run the same command again; "
        "the last complete checkpoint is untouched"
    )
