"""The one error that a user is meant to see, and the one place that turns it into an exit status."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2  # exit status of every mistake that the user can mend
_FULL_DISK = ("No space left", "StorageFull", "os error 28", "file write failed")  # safetensors, torch


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def is_full_disk(error: BaseException) -> bool:
    """Whether an error is some library's way of saying "no space left"."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, Exception) and any(sign in str(error) for sign in _FULL_DISK)


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a stage's ``main``; a :class:`UserError` becomes one line on stderr and exit status 2.

    A full disk is reported in the same way, because it is the commonest fault that is nobody's bug.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR_STATUS)
    except Exception as error:
        if not is_full_disk(error):
            raise
        file = getattr(error, "filename", None)
        where = f" while writing {file}" if file else ""
        print(
            f"error: the disk is full{where}: free some space and run the same command again; "
            "the last complete checkpoint is untouched",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(USER_ERROR_STATUS)
