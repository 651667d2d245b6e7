"""Programs that mean harm, by accident or not: each ends with a verdict, and none reaches what is outside."""

import functools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from rlhf.evals.sandbox import run as sandbox
from rlhf.evals.sandbox.run import Limits, Verdict

FAST = {"cpu_seconds": 1, "wall_seconds": 120}  # the clock must not judge on a busy machine


WORD = '"output_bytes": {}'  # in the command line of a sandbox

fault = functools.cache(sandbox._fault)


@pytest.fixture(params=sandbox.RUNGS)
def rung(request):
    """Each way of shutting a program in that this machine has."""
    if fault(request.param):
        pytest.skip(f"{sandbox.RUNGS[request.param]}: {fault(request.param)}")
    return request.param


def run(rung, source, **limits):
    return sandbox._run(rung, textwrap.dedent(source), Limits(**{**FAST, **limits}))


def processes_with(word):
    """Process ids of this machine with a word in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text(encoding="utf-8", errors="replace"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


# ---------------------------------------------------------------------------------- how programs end

SMALL = {"memory_bytes": 96 << 20, "file_bytes": 100_000, "folder_bytes": 300_000, "output_bytes": 60_000}
EARLY = "failed: exit with status {} before its end"
ENDS = {
    "assert 1 == 2": "failed: AssertionError",
    "def f(:": "failed: SyntaxError",
    "'\ud800'": "failed: SyntaxError",
    "def f(): return f()\nf()": "failed: RecursionError",
    "class Own(BaseException):\n    def __str__(self): raise self\nraise Own": "failed: Own",
    "input()": "failed: EOFError",
    "import torch": "failed: ModuleNotFoundError",
    "import sys; sys.exit(0)": "failed: SystemExit",
    "raise SystemExit": "failed: SystemExit",
    "import os; os._exit(0)": EARLY.format(0),
    "import os; os._exit(7)": EARLY.format(7),
    "import os; os.closerange(0, 64)": EARLY.format(0),
    "import os; os.write(3, b'passed 0'); os._exit(0)": "failed: a pass without its token",
    "import os; os.abort()": "killed: SIGABRT",
    "import ctypes; ctypes.string_at(0)": "killed: SIGSEGV",
    "import os; os.kill(0, 9)": "killed: SIGKILL",
    "import os; os.write(1, b'a' * 60_001)": "killed: printed more than 60000 bytes",
    # time, with the signal ignored and exceptions caught
    "while True: pass": "timed out: processor time",
    "from signal import *\nsignal(SIGXCPU, SIG_IGN)\nwhile True: pass": "timed out: processor time",
    "while 1:\n    try:\n        while 1: pass\n    except BaseException: pass": "timed out: processor time",
    # memory, once, and again and again
    "x = []\nwhile True: x.append(bytearray(1 << 20))": "out of memory: MemoryError",
    "x = 'a' * (1 << 40)": "out of memory: MemoryError",
    "def f():\n    x = {}\n    while 1: x[len(x)] = str(len(x)) * 9\nf()": "out of memory: MemoryError",
    "while 1:\n    try: x = [bytearray(1 << 20) for _ in iter(int, 1)]\n    except MemoryError: pass": (
        "timed out: processor time"
    ),
    # files: one too large, several, one that fits, too many open at once
    "with open('x', 'wb') as f: f.write(bytes(100_001))": "failed: OSError",
    "for i in range(4):\n    with open(str(i), 'wb') as f: f.write(bytes(100_000))": "failed: OSError",
    "with open('x', 'wb') as f: f.write(bytes(100_000))": "passed: ",
    "x = [open('/dev/null') for i in range(99)]": "failed: OSError",
    # processes, threads, sockets
    "import os\nwhile True: os.fork()": "failed: BlockingIOError",
    "import threading; threading.Thread(target=print).start()": "failed: RuntimeError",
    **{
        f"import socket; socket.socket(socket.AF_{family}, socket.SOCK_DGRAM)": "failed: PermissionError"
        for family in ("INET", "INET6", "UNIX", "VSOCK", "NETLINK", "PACKET")
    },
}


@pytest.mark.parametrize("source", ENDS)
def test_a_program_ends_as_it_should(rung, source):
    slow = {"cpu_seconds": 20} if ENDS[source].startswith("out of memory") else {}
    assert run(rung, source, **SMALL, **slow) == Verdict(*ENDS[source].split(": "))


def test_a_forked_copy_that_reaches_the_end_does_not_pass_for_the_program(rung):
    source = "import os, time\nif os.fork():\n    time.sleep(0.5)\n    os._exit(0)"
    assert run(rung, source, processes=4) == Verdict(*EARLY.format(0).split(": "))


def test_the_program_cannot_put_its_own_functions_in_the_place_of_ours(rung):
    source = """
        import os, sys
        os.write = os.getpid = os._exit = sys.exit = print = len = lambda *a: 0
        sys.stdout = None
        assert False
        """
    assert run(rung, source) == Verdict("failed", "AssertionError")


def test_a_program_passes_when_it_reaches_its_end(rung):
    verdict = run(rung, "import re, math, collections, hashlib\nprint(sum(range(5)))")
    assert verdict == Verdict("passed")
    assert verdict.passed
    assert verdict.output == "10\n"


def test_text_that_is_no_program_fails_and_many_empty_files_do_no_harm(rung):
    assert run(rung, "\0").status == "failed"  # by an exception that depends on the version of Python
    scraps = run(rung, "for i in range(5_000): open(str(i), 'w').close()", **SMALL)
    assert scraps in (Verdict("failed", "OSError"), Verdict("passed"))


def test_two_runs_are_equal(rung):
    source = """
        import random
        print(hash("a"), random.random(), list({"x", "y", "z"}), __name__)
        """
    first, second = run(rung, source), run(rung, source)
    assert first.passed
    assert first.output == second.output
    assert first.output.endswith("__main__\n")


def test_waiting_without_end_is_timed_out_by_the_clock(rung):
    start = time.monotonic()
    assert run(rung, "import time; time.sleep(600)", wall_seconds=0.5) == Verdict("timed out", "wall clock")
    assert time.monotonic() - start < 15


def test_printing_without_end_is_killed(rung):
    verdict = run(rung, "while True: print('a' * 100)", output_bytes=100_000, cpu_seconds=20)
    assert verdict == Verdict("killed", "printed more than 100000 bytes")
    assert len(verdict.output) <= 4096


# ---------------------------------------------------------------------------------- other processes


def test_a_fork_bomb_with_room_dies_with_its_sandbox(rung):
    source = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """
    verdict = run(rung, source, processes=6, output_bytes=777_001, wall_seconds=2)
    assert verdict.status == "timed out"
    assert processes_with(WORD.format(777001)) == []


def test_what_a_program_leaves_behind_dies_with_it(rung):
    source = """
        import os, signal, time
        for number in range(1, 32):
            if number not in (9, 17, 19):
                signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        """
    start = time.monotonic()
    assert run(rung, source, processes=6, output_bytes=777_002, wall_seconds=60).passed
    assert time.monotonic() - start < 30
    assert processes_with(WORD.format(777002)) == []


def test_the_sandbox_dies_with_the_process_that_waits_for_it(rung):
    source = f"""
        from rlhf.evals.sandbox import run as sandbox
        limits = sandbox.Limits(wall_seconds=300, output_bytes=777003)
        sandbox._run({rung!r}, "import time; time.sleep(300)", limits)
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], cwd=ROOT) as waiting:
        try:
            assert wait_until(lambda: len(processes_with(WORD.format(777003))) >= 3)
        finally:
            waiting.kill()
    assert wait_until(lambda: processes_with(WORD.format(777003)) == [])


def wait_until(holds, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("place", [0, -1])
def test_a_stop_from_outside_does_not_count_against_a_program(place, number, monkeypatch):
    """As a scheduler stops all processes of a job; place: the outer process, or the program itself."""
    if sandbox.isolation()[0] is None:
        pytest.skip(sandbox.isolation()[1])
    monkeypatch.setattr(sandbox, "_SECOND_THOUGHT", 0.0)
    word, hit = WORD.format(777004), []

    def stop():
        wait_until(lambda: len(processes_with(word)) == 3)
        time.sleep(0.2)
        hit.extend(sorted(processes_with(word)))
        os.kill(hit[place], number)

    stopping = threading.Thread(target=stop)
    stopping.start()
    verdict = sandbox.run("import time; time.sleep(0.8)", Limits(wall_seconds=60, output_bytes=777004))
    stopping.join()
    assert (verdict.status, len(hit)) == ("passed", 3)


def test_a_program_that_kills_itself_has_failed_for_good(monkeypatch):
    if sandbox.isolation()[0] is None:
        pytest.skip(sandbox.isolation()[1])
    monkeypatch.setattr(sandbox, "_SECOND_THOUGHT", 0.0)
    verdict = sandbox.run("import os; os.kill(os.getpid(), 15)")
    assert (verdict.status, verdict.detail) == ("killed", "SIGTERM")


def test_no_other_process_can_be_seen_or_killed(rung):
    source = f"""
        import os, signal
        for number in range(1, 65):
            try:
                os.kill(os.getppid(), number)  # process 1, which watches this one
            except OSError:
                pass
        for process in (-1, {os.getpid()}):
            try:
                os.kill(process, signal.SIGTERM)
            except ProcessLookupError:
                continue
            assert process == os.getpid()
        assert not os.path.exists("/proc/self")
        """
    assert run(rung, source) == Verdict("passed")


# ---------------------------------------------------------------------------------- network, files, rights


@pytest.mark.parametrize("filtered", [True, False])
def test_nothing_arrives_at_a_listener(rung, filtered):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).send(b'x')"
        verdict = sandbox._run(rung, connect, Limits(**FAST), filtered=filtered)
        assert verdict.status == "failed"
        if filtered:
            assert verdict.detail == "PermissionError"
        with pytest.raises(TimeoutError):
            server.accept()
        with socket.create_connection(("127.0.0.1", port), 2):  # the listener listens
            server.accept()[0].close()


def test_files_of_the_machine_are_not_there(rung, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tmp_path.chmod(0o777)
    for path in (secret, "/etc/shadow", "/etc/passwd", Path.home() / ".bashrc", __file__, ROOT / "Makefile"):
        assert run(rung, f"open({str(path)!r})") == Verdict("failed", "FileNotFoundError")
    source = f"""
        import os
        try:
            assert set(os.listdir({str(Path.home())!r})) <= {ways_to_the_interpreter()!r}
        except FileNotFoundError:
            pass
        """
    assert run(rung, source) == Verdict("passed")


def ways_to_the_interpreter():
    """Entries of the home folder without which there would be no interpreter."""
    home = Path.home()
    seen = [Path(view.path) for view in sandbox._views()]
    return {"", *(path.relative_to(home).parts[0] for path in seen if home in path.parents)}


def test_nothing_can_be_written_but_its_own_folder(rung, tmp_path):
    tmp_path.chmod(0o777)
    source = f"""
        import os, sys
        places = ["/", "/dev", "/dev/shm", "/etc", "/usr", "/usr/lib", "/home", "/root", "/var/tmp", "/run"]
        places += [{str(tmp_path)!r}, {str(ROOT)!r}, os.path.dirname(os.__file__), sys.prefix]
        for place in places:
            try:
                open(os.path.join(place, "new"), "w")
            except OSError:
                continue
            raise AssertionError(place)
        assert os.getcwd() == "/tmp"
        with open("new", "w") as file:
            file.write("x")
        """
    assert run(rung, source) == Verdict("passed")
    assert list(tmp_path.iterdir()) == []
    assert not Path("/tmp/new").exists()


def test_a_program_finds_nothing_of_the_one_before(rung):
    assert run(rung, "open('left', 'w').close()").passed
    assert run(rung, "import os; print(os.listdir())").output == "[]\n"


def test_the_environment_is_empty(rung, monkeypatch):
    monkeypatch.setenv("A_SECRET", "secret")
    source = """
        import ctypes, os
        assert dict(os.environ) == {}
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_char_p
        assert libc.getenv(b"A_SECRET") is None
        """
    assert run(rung, source) == Verdict("passed")


def test_a_program_has_no_rights_and_gets_none(rung):
    source = """
        import ctypes, os
        assert 0 not in os.getresuid() + os.getresgid()
        libc = ctypes.CDLL(None)
        assert libc.unshare(0x10000000) == -1  # CLONE_NEWUSER
        assert libc.mount(b"x", b"/tmp", b"tmpfs", 0, None) == -1
        assert libc.syscall(319, b"x", 0) == -1 or os.uname().machine != "x86_64"  # memfd_create
        assert libc.ptrace(16, 1, 0, 0) == -1
        for call in (lambda: os.setuid(0), lambda: os.chroot("/tmp"), lambda: os.mknod("x", 0o20666, 259)):
            try:
                call()
            except OSError:  # of several kinds
                continue
            raise AssertionError
        """
    assert run(rung, source) == Verdict("passed")
