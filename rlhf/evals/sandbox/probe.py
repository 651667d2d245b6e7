"""Tries to get out of a sandbox: a program inside, and a look from outside at what it reached."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf.evals.sandbox.verdict import Limits, Verdict

# Runs inside, behind a line ``facts = {...}``. It stops at the first thing that it could do, with a sentence.
PROBE = r"""
import ctypes, os, resource, socket, sys

def must_fail(what, call, *arguments, error=OSError):
    try:
        call(*arguments)
    except error:
        return
    raise AssertionError(what)

def reach(family, kind, address):
    with socket.socket(family, kind) as s:
        s.settimeout(1)
        s.connect(address)
        s.send(b"x")

# no network, and no socket of this machine
must_fail("it reached a TCP port", reach, socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", facts["tcp"]))
must_fail("it sent a datagram", reach, socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.1", 9))
must_fail("it reached a local socket", reach, socket.AF_UNIX, socket.SOCK_STREAM, "\0" + facts["local"])
try:
    reach(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", facts["udp"]))
except OSError:
    pass  # where it has a loopback of its own this works, and arrives nowhere: seen from outside
if facts["filtered"]:
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_VSOCK):
        must_fail("it made a socket", socket.socket, family, error=PermissionError)

# no file of this machine, and no place to write but the folder
must_fail("it read a file outside", open, facts["folder"] + "/secret")
must_fail("it wrote outside", open, facts["folder"] + "/new", "w")
for folder in ("/", "/dev", "/dev/shm", "/etc", "/usr", "/root", "/home", "/var/tmp", *facts["shown"]):
    must_fail("it wrote to " + folder, open, folder + "/new", "w")
for path in facts["hidden"]:
    assert not os.path.lexists(path), "it saw " + path
more = set(os.listdir("/")) - {path.split("/")[1] for path in facts["shown"]} - {"tmp", ".sandbox"}
assert not more, "it saw " + ", ".join(sorted(more))
assert os.getcwd() == "/tmp"
with open("mine", "w") as file:
    file.write("x")

# no process but this one
assert (os.getpid(), os.getppid()) == (2, 1), "it is not alone"
must_fail("it saw another process", os.kill, -1, 0, error=ProcessLookupError)
must_fail("it could start a process", os.fork)

# no rights, and no way to any
assert 0 not in (os.getuid(), os.geteuid(), os.getgid(), os.getegid()), "it is root"
must_fail("it became root", os.setuid, 0)
must_fail("it changed its root", os.chroot, "/tmp")
libc = ctypes.CDLL(None)
assert libc.prctl(39, 0, 0, 0, 0) == 1, "it may gain rights"  # PR_GET_NO_NEW_PRIVS
assert libc.mount(b"x", b"/tmp", b"tmpfs", 0, None) == -1, "it could mount"
if facts["filtered"]:
    assert libc.unshare(0x10000000) == -1, "it made a user namespace"  # CLONE_NEWUSER
    assert libc.ptrace(16, 1, 0, 0) == -1, "it traced process 1"  # PTRACE_ATTACH

# no more memory and disk than allowed, nothing to read
def write(name, size):
    with open(name, "wb") as file:
        file.write(bytes(size))
def fill():
    for number in range(facts["folder_bytes"] // facts["file_bytes"] + 1):
        write(str(number), facts["file_bytes"])
must_fail("it took more memory than allowed", bytearray, facts["memory_bytes"], error=MemoryError)
must_fail("it wrote a file larger than allowed", write, "large", facts["file_bytes"] + 1)
must_fail("it wrote more than allowed", fill)
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0), "it may dump core"
assert 0 < resource.getrlimit(resource.RLIMIT_CPU)[1] < 60, "its time has no limit"
assert not os.environ, "it saw the environment"
assert sys.stdin.read() == "", "it read something"
"""

_FOREIGN = ("/etc/passwd", "/etc/shadow", "/proc/self", "/proc/1", "/sys/kernel", "/run", "/var", "/boot")


def escape(
    start: Callable[[str], Verdict], shown: Sequence[str], limits: Limits, *, filtered: bool
) -> str | None:
    """What a program got out of the sandbox, in one sentence; None for nothing.

    Args:
        start: runs a program inside.
        shown: folders and files of this machine that the sandbox may see.
        limits: of the program.
        filtered: whether its system calls are.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-probe-") as name, _listeners() as (reached, addresses):
        folder, secret = Path(name), Path(name, "secret")
        secret.write_text("as it was", encoding="utf-8")
        folder.chmod(0o777)  # nothing but the sandbox is in the way
        secret.chmod(0o666)
        facts = {**asdict(limits), **addresses, "filtered": filtered, "folder": name}
        facts |= {"shown": list(shown), "hidden": hidden(shown)}
        ended = start(f"facts = {facts!r}\n{PROBE}")
        if not ended.passed:
            last = (ended.output.strip().splitlines() or [""])[-1]
            return f"a program was let in and {ended.status} ({last or ended.detail})"
        if reached() or os.listdir(folder) != ["secret"] or secret.read_text(encoding="utf-8") != "as it was":
            return "a program reached what is outside"
    return None


def hidden(shown: Sequence[str]) -> list[str]:
    """Paths that must not be seen inside: in the home folder, and others, that lead to nothing shown."""
    own: list[str] = []
    with contextlib.suppress(OSError, RuntimeError):
        own = [os.path.join(Path.home(), name) for name in os.listdir(Path.home())]
    ways = [f"{path}/" for path in shown]
    return [
        path
        for path in (*own, *_FOREIGN)
        if not any(way.startswith(f"{path}/") or f"{path}/".startswith(way) for way in ways)
    ]


@contextlib.contextmanager
def _listeners() -> Iterator[tuple[Callable[[], bool], dict[str, object]]]:
    """Sockets that the sandbox must not reach: (whether one was reached, their addresses)."""
    name = f"sandbox-probe-{secrets.token_hex(8)}"
    with (
        socket.socket(socket.AF_INET) as tcp,
        socket.socket(socket.AF_UNIX) as local,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        tcp.bind(("127.0.0.1", 0))
        local.bind(f"\0{name}")
        udp.bind(("127.0.0.1", 0))
        for server in (tcp, local):
            server.listen()
        addresses = {"tcp": tcp.getsockname()[1], "local": name, "udp": udp.getsockname()[1]}
        yield lambda: any(_heard(each) for each in (tcp, local, udp)), addresses


def _heard(server: socket.socket) -> bool:
    server.setblocking(False)
    try:
        if server.type == socket.SOCK_DGRAM:
            server.recv(1)
        else:
            server.accept()[0].close()
    except BlockingIOError:
        return False
    return True
