"""Runs one program inside the sandbox; started by ``run.py`` as a script of its own, never imported.

Up to three processes. The *outer* one asks the kernel for namespaces and forks the *guard*, process 1 of the
new process namespace; bubblewrap does the same in its place. The guard builds the file system (bubblewrap has
done that too), gives up every right, forks the *program*, watches time and output, judges, and reports. When
process 1 ends, the kernel ends all others of the namespace: nothing that a program starts outlives it.

In: orders, a JSON object as the only argument (the limits of ``verdict.Limits``; ``rung``; ``user``, the id
that root becomes; ``filtered``; ``views``, which ``jail.build_root`` knows), and the program's text on stdin,
until its end. Out, on stdout: a status, a detail and processor seconds, a line each, then what the program
printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
from types import ModuleType, SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import jail

del sys.path[0]

KEPT = 4096  # bytes of the program's output that the report carries


def program(source: bytes, orders: SimpleNamespace, output: int, verdict: int, token: bytes) -> None:
    """Run the text as ``__main__`` and write to ``verdict`` how it ended.

    The token is written when the last line of the text is done, and by this process alone: an early exit says
    nothing, and neither does a process that the text forked. output: where stdout and stderr go.
    """
    write, process, me = os.write, os.getpid, os.getpid()  # the text may put others in their place
    module = ModuleType("__main__")
    said = b"broken "
    try:
        for number, descriptor in ((1, output), (2, output), (3, verdict)):
            os.dup2(descriptor, number, inheritable=number < 3)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.closerange(4, 1024)
        os.setsid()
        os.environ.clear()
        random.seed(0)
        sys.argv, sys.modules["__main__"] = ["program.py"], module
        jail.limit_resources(orders)
        if orders.filtered:
            jail.filter_system_calls()
        said = b"failed "
        exec(compile(source, "program.py", "exec"), module.__dict__)
        said = b"passed " + token
    except MemoryError:
        module.__dict__.clear()
        said = b"memory"
    except BaseException as error:
        said += _named(error) if said == b"failed " else f"{error}".encode()
    if process() == me:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        write(3, said)


def _named(error: BaseException) -> bytes:
    """The name of an exception; its text, which may hold anything, is printed to stderr."""
    name = type(error).__name__[:80].encode(errors="replace")
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        os.write(2, name + b": " + str(error)[:500].encode(errors="replace") + b"\n")
    return name


def judge(status: int, seconds: float, said: bytes, token: bytes, cpu: int) -> tuple[str, str]:
    """(status, detail) of a program that ended by itself or by a signal.

    status: of ``wait``. seconds: processor time that it used, of at most ``cpu``. said: what it wrote to the
    verdict pipe; it passed if that has the token.
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and seconds >= cpu):
            return "timed out", "processor time"
        known = {member.value: member.name for member in signal.Signals}
        return "killed", known.get(number, f"signal {number}")
    code = os.WEXITSTATUS(status)
    word, _, rest = said.partition(b" ")
    if code != 0 or word not in {b"broken", b"failed", b"memory", b"passed"}:
        return "failed", f"exit with status {code} before its end"
    if word == b"passed":
        return ("passed", "") if rest == token else ("failed", "a pass without its token")
    if word == b"memory":
        return "out of memory", "MemoryError"
    return word.decode(), rest.decode(errors="replace")


def guard(source: bytes, orders: SimpleNamespace) -> None:
    """Process 1 of the namespace: lock the door, run the program, watch it, report."""
    if os.getpid() != 1:  # the signal to everybody, below, would go to everybody
        raise OSError("there is no process namespace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no handler: process 1 then ignores what comes from inside
    os.umask(0o022)
    if orders.rung != "bubblewrap":
        jail.build_root(orders.views, orders.folder_bytes)
    if os.geteuid() == 0:
        os.chown("/tmp", orders.user, orders.user)
        jail.become(orders.user)
    os.chdir("/tmp")
    jail.give_up_rights()
    token = os.urandom(16).hex().encode()
    (printed, output), (told, verdict) = os.pipe(), os.pipe()
    leave, child = os._exit, os.fork()
    if child == 0:
        try:
            program(source, orders, output, verdict, token)
        finally:
            leave(0)
    os.close(output)
    os.close(verdict)
    kept, limit = bytearray(), orders.output_bytes
    late = watch(child, printed, kept, limit, orders.wall_seconds)
    with contextlib.suppress(ProcessLookupError):
        if late or len(kept) > limit:
            os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # whoever is left: what comes now is the last of the output
    kept += _available(printed, limit)
    seconds = usage.ru_utime + usage.ru_stime
    if len(kept) > limit:
        found = "killed", f"printed more than {limit} bytes"
    elif late:
        found = "timed out", "wall clock"
    else:
        found = judge(status, seconds, _available(told, KEPT), token, orders.cpu_seconds)
    report(*found, seconds, bytes(kept[:KEPT]))


def watch(child: int, printed: int, kept: bytearray, limit: int, wall: float) -> bool:
    """Read what the program prints into ``kept`` until it ends, prints more than ``limit`` bytes, or ``wall``
    seconds are over; returns whether they are.

    Ends this process, and with it the namespace, where nobody waits for the report any more.
    """
    deadline = time.monotonic() + wall
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(1, 0)  # tells of an error when the reader is gone
    poll.register(ended, select.POLLIN)
    poll.register(printed, select.POLLIN)
    while len(kept) <= limit:
        left = deadline - time.monotonic()
        if left <= 0:
            return True
        ready = dict(poll.poll(left * 1000))
        if 1 in ready:
            os._exit(1)
        if ended in ready:
            return False
        if printed in ready:
            block = os.read(printed, 65536)
            kept += block
            if not block:
                poll.unregister(printed)
    return False


def _available(descriptor: int, most: int) -> bytes:
    """What can be read from a pipe without waiting; stops when that is more than ``most`` bytes."""
    os.set_blocking(descriptor, False)
    blocks = b""
    with contextlib.suppress(BlockingIOError):
        while len(blocks) <= most and (block := os.read(descriptor, 65536)):
            blocks += block
    return blocks


def report(status: str, detail: str, seconds: float = 0.0, output: bytes = b"") -> None:
    """Tell the parent what came out."""
    text = f"{status}\n{' '.join(detail.split())}\n{seconds:.3f}\n".encode() + output
    while text:
        text = text[os.write(1, text) :]


def main(orders: SimpleNamespace) -> int:
    """Run what stands on stdin; the exit status is 0 when there is a verdict."""
    try:
        source = b""
        while block := os.read(0, 1 << 20):
            source += block
        if orders.rung != "bubblewrap":
            jail.enter_namespaces(as_root=orders.rung == "root", user=orders.user)
            child = os.fork()
            if child:
                return int(os.waitpid(child, 0)[1] != 0)
        guard(source, orders)
    except Exception as error:
        report("broken", getattr(error, "strerror", None) or f"{type(error).__name__} {error}")
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(SimpleNamespace(**json.loads(sys.argv[1]))))
