"""Runs one program inside the sandbox; started by ``run.py`` as a script of its own, never imported.

Up to three processes. The *outer* one asks the kernel for namespaces and forks the *guard*, process 1 of the
new process namespace; bubblewrap does the same in its place. The guard builds the file system (bubblewrap has
done that too), gives up every right, forks the *program*, watches time and output, judges, and reports. When
process 1 ends, the kernel ends all others of the namespace: nothing that a program starts outlives it.

In: ``key=value`` arguments (:func:`main`) and the program's text on stdin, until its end. Out, on stdout: a
status, a detail and processor seconds, a line each, then what the program printed.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import sys
import time
import types

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import jail

del sys.path[0]

KEPT = 4096  # bytes of the program's output that the report carries


def program(source: bytes, args: dict[str, str], output: int, verdict: int, token: bytes) -> None:
    """Run the text as ``__main__`` and write to ``verdict`` how it ended.

    The token is written when the last line of the text is done, and by this process alone: an early exit says
    nothing, and neither does a process that the text forked.

    Args:
        source: the program's text.
        args: of :func:`main`.
        output: where stdout and stderr go.
        verdict: where the word on the end goes.
        token: what a program must say that passed.
    """
    write, process, me = os.write, os.getpid, os.getpid()  # the text may put others in their place
    module = types.ModuleType("__main__")
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
        limits = {key: int(args[key]) for key in ("cpu", "memory", "file", "processes", "files")}
        jail.limit_resources(**limits)
        if args["filter"] == "on":
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

    Args:
        status: what ``wait`` said.
        seconds: processor time that it used.
        said: what it wrote to the verdict pipe.
        token: what it had to write in order to pass.
        cpu: its limit of processor time in seconds.
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


def guard(source: bytes, args: dict[str, str], views: list[str]) -> None:
    """Process 1 of the namespace: lock the door, run the program, watch it, report.

    Args:
        source: the program's text.
        args: of :func:`main`.
        views: of :func:`jail.build_root`.
    """
    if os.getpid() != 1:  # the signal to everybody, below, would go to everybody
        raise OSError("there is no process namespace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no handler: process 1 then ignores what comes from inside
    os.umask(0o022)
    if args["rung"] != "bubblewrap":
        jail.build_root(views, int(args["folder"]))
    if os.geteuid() == 0:
        user = int(args["user"])
        os.chown("/tmp", user, user)
        jail.become(user)
    os.chdir("/tmp")
    jail.give_up_rights()
    token = os.urandom(16).hex().encode()
    (printed, output), (told, verdict) = os.pipe(), os.pipe()
    leave, child = os._exit, os.fork()
    if child == 0:
        try:
            program(source, args, output, verdict, token)
        finally:
            leave(0)
    os.close(output)
    os.close(verdict)
    kept, limit = bytearray(), int(args["output"])
    late = watch(child, printed, kept, limit, float(args["wall"]))
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
        found = judge(status, seconds, _available(told, KEPT), token, int(args["cpu"]))
    report(*found, seconds, bytes(kept[:KEPT]))


def watch(child: int, printed: int, kept: bytearray, limit: int, wall: float) -> bool:
    """Read what the program prints until it ends, prints too much, or its time is over.

    Ends this process, and with it the namespace, where nobody waits for the report any more.

    Args:
        child: process id of the program.
        printed: the pipe of its output.
        kept: where the output is put.
        limit: bytes that are too much.
        wall: seconds until it is too late.

    Returns:
        Whether it is too late.
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


def main(arguments: list[str]) -> int:
    """Run what stands on stdin; the exit status is 0 when there is a verdict.

    Args:
        arguments: ``rung`` (bubblewrap, root, users), ``user`` (id that root becomes), ``filter`` (on, off),
            the limits ``cpu wall memory file folder processes files output``; ``--``; views.
    """
    cut = arguments.index("--")
    args = dict(word.split("=", 1) for word in arguments[:cut])
    try:
        source = b""
        while block := os.read(0, 1 << 20):
            source += block
        if args["rung"] != "bubblewrap":
            jail.enter_namespaces(as_root=args["rung"] == "root", user=int(args["user"]))
            child = os.fork()
            if child:
                return int(os.waitpid(child, 0)[1] != 0)
        guard(source, args, arguments[cut + 1 :])
    except Exception as error:
        report("broken", getattr(error, "strerror", None) or f"{type(error).__name__} {error}")
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
