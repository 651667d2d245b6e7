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
import json
import math
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from rlhf.errors import STOP_SIGNALS, UserError
from rlhf.evals.sandbox.probe import escape
from rlhf.evals.sandbox.verdict import LIMITS, STATUSES, Limits, Verdict

RUNGS = {
    "bubblewrap": "bubblewrap",
    "root": "namespaces by the right of root, with a user of their own",
    "users": "user namespaces",
}
_CHILD = Path(__file__).with_name("child.py")
_JAIL = Path(__file__).with_name("jail.py")
_FROM_OUTSIDE = {number.name for number in (*STOP_SIGNALS, signal.SIGKILL)}
"""Ends that a program can come to through a stop of the whole job, or a machine without memory: run again."""
_SECOND_THOUGHT = 1.0  # seconds until then, in which the same stop ends this process
_GRACE = 60.0  # seconds that the sandbox may take beside the program's
_FIRST_USER = 0x70000000  # far from users that exist; each sandbox takes one of the next 2^24
# where the interpreter's libraries are; most of these are links to one folder
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
_FURTHER = ("/nix/store", "/gnu/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class View(NamedTuple):
    """Something of this machine that the sandbox sees."""

    kind: str
    """``ro`` a folder or file, ``dev`` a device, ``link`` a symbolic link."""
    path: str
    """Its place, inside as outside."""
    target: str = ""
    """Where a link leads."""


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
    rung = require()
    with contextlib.suppress(_Silent):
        verdict = _run(rung, source, limits)
        if verdict.status != "killed" or verdict.detail not in _FROM_OUTSIDE:
            return verdict
    time.sleep(_SECOND_THOUGHT)
    return _run(rung, source, limits)


def require() -> str:
    """The way of :data:`RUNGS` that holds on this machine.

    Raises:
        UserError: there is none.
    """
    rung, why_not = isolation()
    if rung is None:
        raise UserError(
            f"no program is run, because this machine cannot shut one in ({why_not}): install bubblewrap "
            "or allow user namespaces as docs/sandbox.md says, or leave the task out"
        )
    return rung


@functools.cache
def isolation() -> tuple[str | None, str]:
    """The first way of :data:`RUNGS` that holds, and what those before it lack, in one line.

    It is found by trying, and remembered; None where none holds. Two programs try to get out: one with the
    system call filter, one without it, so that namespaces and limits have to hold by themselves. They try to
    reach a listener of this process, to read and write a file of it, to see the home folder, to signal other
    processes, to become root, to fork, and to use more memory and disk than allowed
    (:mod:`rlhf.evals.sandbox.probe`).
    """
    reasons: list[str] = []
    for rung, name in RUNGS.items():
        reason = _fault(rung)
        if reason is None:
            return rung, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


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
    status, detail, seconds, output = [*told.decode(errors="replace").split("\n", 3), "", "", ""][:4]
    if status in STATUSES and seconds:
        return Verdict(status, detail, output, float(seconds))
    last = (complaint.decode(errors="replace").strip().splitlines() or ["it ended without a report"])[-1]
    raise (_Unbuilt if told else _Silent)(rung, (detail or last)[:300])


def _command(rung: str, limits: Limits, filtered: bool) -> list[str]:
    orders = {
        **asdict(limits),
        "cpu_seconds": math.ceil(limits.cpu_seconds),
        "rung": rung,
        "user": _FIRST_USER + secrets.randbelow(1 << 24),
        "filtered": filtered,
        "views": _views(),
    }
    prefix, script = [], str(_CHILD)
    if rung == "bubblewrap":
        prefix, script = _bubblewrap(limits), f"/.sandbox/{_CHILD.name}"
    # no site-packages, nothing of the user's, no folder of a script on the path, no bytecode written
    return [*prefix, _interpreter(), "-S", "-s", "-P", "-B", "-X", "utf8", script, json.dumps(orders)]


def _bubblewrap(limits: Limits) -> list[str]:
    words = [shutil.which("bwrap") or "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    words += ["--unshare-uts", "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1"]
    if os.geteuid() != 0:  # root needs none, and becomes a user of its own inside
        words += ["--unshare-user"]
    words += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    words += ["--perms", "0700", "--size", str(limits.folder_bytes), "--tmpfs", "/tmp"]
    options = {"ro": "--ro-bind", "dev": "--dev-bind", "link": "--symlink"}
    shown = [(options[view.kind], view.target or view.path, view.path) for view in _views()]
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
def _views() -> tuple[View, ...]:
    """What the sandbox sees of this machine."""
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
    views = [View("ro", path) for path in sorted(folders)]
    views += [View("link", path, target) for path, target in sorted(links.items()) if path not in inside]
    return (*views, *(View("dev", path) for path in _DEVICES))


# -------------------------------------------------------------------------------------------- does it hold?


def _fault(rung: str) -> str | None:
    """Why a way is not to be had or does not hold; None where it does."""
    lacking = _lacking(rung)
    if lacking:
        return lacking
    limits = Limits(
        cpu_seconds=5, memory_bytes=192 << 20, file_bytes=64 << 10, folder_bytes=256 << 10, open_files=32
    )
    shown = [view.path for view in _views()]
    try:
        for filtered in (False, True):
            start = functools.partial(_run, rung, limits=limits, filtered=filtered)
            reason = escape(start, shown, limits, filtered=filtered)
            if reason is not None:
                return reason
    except _Unbuilt as error:
        return error.cause
    except OSError as error:
        return f"it cannot be tried ({error.strerror})"
    return None


def _lacking(rung: str) -> str | None:
    """What a way lacks as far as it can be known before a program is let in."""
    if sys.platform != "linux":
        return "needs Linux"
    if rung == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    if rung == "root" and os.geteuid() != 0:
        return "not root"
    if rung == "users" and os.geteuid() == 0:  # root becomes another user before it asks
        closed = _closed(view.path for view in _views() if view.kind == "ro")
        if closed:
            return (
                f"its user cannot read the interpreter {_interpreter()}, because others may not enter "
                f"{closed}: use a Python that all users may read, as the system's, or chmod o+rx {closed}"
            )
    return None


def _closed(paths: Iterable[str]) -> Path | None:
    """The first place that others may not read, or not enter on the way to one of the paths."""
    for path in map(Path, paths):
        for place in (*reversed(path.parents), path):
            mode = place.stat().st_mode
            wanted = stat.S_IROTH if place == path else 0
            wanted |= stat.S_IXOTH if stat.S_ISDIR(mode) else 0
            if mode & wanted != wanted:
                return place
    return None


class _Unbuilt(UserError):
    """The sandbox could not be built."""

    def __init__(self, rung: str, cause: str) -> None:
        self.cause = cause
        super().__init__(
            f"the sandbox ({RUNGS[rung]}) cannot be built: {cause}; run again, and look at docs/sandbox.md "
            "if it says the same"
        )


class _Silent(_Unbuilt):
    """The sandbox was ended before it could report."""
