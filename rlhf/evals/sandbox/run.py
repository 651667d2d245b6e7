"""Runs a piece of Python that nobody trusts, such as one that a model has written, and says how it ended.

A program gets an interpreter with the standard library, an empty folder, and nothing else: no network, no
file of this machine, no other process, no environment, no input, and little time and memory. Every program
has a sandbox of its own, which the kernel tears down whole. Where no sandbox can be built, nothing runs.

The ways, in the order in which they are tried (:data:`RUNGS`): bubblewrap where it is installed; namespaces
by the right of root, with a user of their own; user namespaces, for everybody else. A way counts only once a
program that tried to get out of it could not (:func:`isolation`). What is shut in how, and what is not:
docs/sandbox.md.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError
from rlhf.evals.sandbox.probe import escape
from rlhf.evals.sandbox.verdict import (
    FAILED,
    KILLED,
    LIMITS,
    OUT_OF_MEMORY,
    PASSED,
    TIMED_OUT,
    Limits,
    Verdict,
)

RUNGS = {
    "bubblewrap": "bubblewrap",
    "root": "namespaces by the right of root, with a user of their own",
    "users": "user namespaces",
}
_CHILD = Path(__file__).with_name("child.py")
_JAIL = Path(__file__).with_name("jail.py")
_GRACE = 60.0  # seconds that the sandbox may take beside the program's
_FIRST_USER = 0x70000000  # far from users that exist; each sandbox takes one of the next 2^24
# where the interpreter's libraries are; most of these are links to one folder
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
_FURTHER = ("/nix/store", "/gnu/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True)
class Isolation:
    """A way to shut a program in that was tried on this machine."""

    rung: str
    """Key of :data:`RUNGS`."""

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        return RUNGS[self.rung]


def run(source: str, limits: Limits = LIMITS) -> Verdict:
    """Run a program in a sandbox of its own.

    It passes when its last line has been run: an exception, ``sys.exit()`` and any earlier end are a failure,
    whatever the exit status. Safe to call from several threads.

    Args:
        source: Python, run as ``__main__`` in an empty folder, with fixed seeds of hashes and ``random``.
        limits: what it may use.

    Raises:
        UserError: there is no isolation on this machine, or the sandbox cannot be built any more.
    """
    return _run(require().rung, source, limits)


def require() -> Isolation:
    """The isolation of this machine.

    Raises:
        UserError: there is none.
    """
    found = isolation()
    if found is None:
        raise UserError(
            f"no program is run, because this machine cannot shut one in ({why_not()}): install bubblewrap "
            "or allow user namespaces as docs/sandbox.md says, or leave the task out"
        )
    return found


def isolation() -> Isolation | None:
    """The first way of :data:`RUNGS` that holds, found by trying and remembered; None where there is none.

    Two programs try to get out: one with the system call filter, one without it, so that namespaces and
    limits have to hold by themselves. They try to reach a listener of this process, to read and write a file
    of it, to see the home folder, to signal other processes, to become root, to fork, and to use more memory
    and disk than allowed (:mod:`rlhf.evals.sandbox.probe`).
    """
    return _search()[0]


def why_not() -> str:
    """What every way that does not hold here lacks, in one line."""
    return "; ".join(f"{RUNGS[rung]}: {reason}" for rung, reason in _search()[1].items())


@functools.cache
def _search() -> tuple[Isolation | None, dict[str, str]]:
    reasons: dict[str, str] = {}
    for rung in RUNGS:
        reason = _fault(rung)
        if reason is None:
            return Isolation(rung), reasons
        reasons[rung] = reason
    return None, reasons


# -------------------------------------------------------------------------------------------- one program


def _run(rung: str, source: str, limits: Limits, *, filtered: bool = True) -> Verdict:
    with subprocess.Popen(
        _command(rung, limits, filtered),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONHASHSEED": "0"},
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            text = source.encode("utf-8", errors="surrogatepass")
            told, complaint = process.communicate(text, timeout=limits.wall_seconds + _GRACE)
        except subprocess.TimeoutExpired:
            told, complaint = b"broken\nit does not answer\n0\n", b""
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    status, detail, seconds, output = [*told.split(b"\n", 3), b"", b"", b""][:4]
    if status.decode() in {PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, KILLED} and seconds:
        said = output.decode("utf-8", errors="replace")
        return Verdict(status.decode(), detail.decode("utf-8", errors="replace"), said, float(seconds))
    cause = detail or (complaint.strip().splitlines() or [b"it ended without a report"])[-1]
    raise _Unbuilt(rung, cause.decode(errors="replace")[:300])


def _command(rung: str, limits: Limits, filtered: bool) -> list[str]:
    script = str(_CHILD)
    prefix: list[str] = []
    if rung == "bubblewrap":
        script = f"/.sandbox/{_CHILD.name}"
        prefix = _bubblewrap(limits)
    words = {
        "rung": rung,
        "user": _FIRST_USER + secrets.randbelow(1 << 24),
        "filter": "on" if filtered else "off",
        "cpu": math.ceil(limits.cpu_seconds),
        "wall": limits.wall_seconds,
        "memory": limits.memory_bytes,
        "file": limits.file_bytes,
        "folder": limits.folder_bytes,
        "processes": limits.processes,
        "files": limits.open_files,
        "output": limits.output_bytes,
    }
    # no site-packages, nothing of the user's, no folder of a script on the path, no bytecode written
    python = [_interpreter(), "-S", "-s", "-P", "-B", "-X", "utf8", script]
    return [*prefix, *python, *(f"{key}={value}" for key, value in words.items()), "--", *_views()]


def _bubblewrap(limits: Limits) -> list[str]:
    words = [shutil.which("bwrap") or "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    words += ["--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"]
    if os.geteuid() != 0:  # root needs none, and becomes a user of its own inside
        words += ["--unshare-user"]
    words += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    words += ["--perms", "0700", "--size", str(limits.folder_bytes), "--tmpfs", "/tmp"]
    options = {"ro": "--ro-bind", "dev": "--dev-bind", "link": "--symlink"}
    shown = []  # (option, source, place)
    for view in _views():
        kind, path, *target = view.split(":")
        shown.append((options[kind], *(target or [path]), path))
    shown += [("--ro-bind", str(file), f"/.sandbox/{file.name}") for file in (_CHILD, _JAIL)]
    above = {str(folder) for _, _, path in shown for folder in Path(path).parents} - {"/", "/tmp"}
    for folder in sorted(above):  # or those would be private that are private outside
        words += ["--perms", "0755", "--dir", folder]
    words += [word for option in shown for word in option]
    return [*words, "--remount-ro", "/", "--chdir", "/tmp", "--"]


@functools.cache
def _interpreter() -> str:
    """The interpreter itself, not the one of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


@functools.cache
def _views() -> tuple[str, ...]:
    """What the sandbox sees of this machine, in the words of ``jail.build_root``."""
    wanted = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix, _interpreter())}
    links = {}
    for path in (*_LIBRARIES, *_FURTHER):
        if os.path.islink(path):
            links[path] = os.readlink(path)
        if os.path.exists(path):
            wanted.add(os.path.realpath(path))
    # a folder brings what is below it
    folders = [path for path in wanted if not any(str(above) in wanted for above in Path(path).parents)]
    inside = [path for path in links if any(str(above) in folders for above in Path(path).parents)]
    views = [f"ro:{path}" for path in sorted(folders)]
    views += [f"link:{path}:{target}" for path, target in sorted(links.items()) if path not in inside]
    return (*views, *(f"dev:{path}" for path in _DEVICES))


# -------------------------------------------------------------------------------------------- does it hold?


def _fault(rung: str) -> str | None:
    """Why a way is not to be had or does not hold; None where it does."""
    missing = {
        "needs Linux": sys.platform != "linux",
        "not installed": rung == "bubblewrap" and shutil.which("bwrap") is None,
        "not root": rung == "root" and os.geteuid() != 0,
    }
    if any(missing.values()):
        return next(reason for reason, holds in missing.items() if holds)
    limits = Limits(
        cpu_seconds=5, memory_bytes=192 << 20, file_bytes=64 << 10, folder_bytes=256 << 10, open_files=32
    )
    shown = [view.split(":")[1] for view in _views()]
    try:
        for filtered in (False, True):
            start = functools.partial(_run, rung, limits=limits, filtered=filtered)
            sizes = {"memory": limits.memory_bytes, "file": limits.file_bytes, "whole": limits.folder_bytes}
            reason = escape(start, shown, {**sizes, "filtered": filtered})
            if reason is not None:
                return reason
    except _Unbuilt as error:
        return error.cause
    except OSError as error:
        return f"it cannot be tried ({error.strerror})"
    return None


class _Unbuilt(UserError):
    """The sandbox could not be built."""

    def __init__(self, rung: str, cause: str) -> None:
        self.cause = cause
        super().__init__(
            f"the sandbox ({RUNGS[rung]}) cannot be built: {cause}; run again, and look at docs/sandbox.md "
            "if it says the same"
        )
