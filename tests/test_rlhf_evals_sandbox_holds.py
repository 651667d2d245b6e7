"""Isolation is found out by trying, a hole in it is noticed, and where nothing holds nothing runs."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.evals.sandbox import run as sandbox
from rlhf.evals.sandbox.run import Limits

# What is left out of the sandbox -> (text of our own code, what stands there instead). What the program of
# the probe then does harms nothing, and the guard refuses to work where its signals would reach others.
HOLES = {
    "network namespace": ("NEW_PID | NEW_NET | NEW_IPC", "NEW_PID | NEW_IPC"),
    "process namespace": ("NEW_MOUNT | NEW_PID |", "NEW_MOUNT |"),
    "old root": ('    os.rmdir("/.old")\n', ""),
    "size of the folder": ("size={scratch_bytes},", ""),
    "user": ("        jail.become(orders.user)", "        pass"),
    "capabilities": ('called("capset", LIBC.capset(', "repr(("),
    "no new privileges": ("prctl(PR_SET_NO_NEW_PRIVS, 1)", ""),
    "filter": ("            jail.filter_system_calls()", "            pass"),
    "one filtered call": ('"unshare": (272, 97), ', ""),
    "sockets": ('"socket": (41, 198),', ""),
    "memory": ("resource.RLIMIT_AS: limits.memory_bytes,", ""),
    "file size": ("resource.RLIMIT_FSIZE: limits.file_bytes,", ""),
    "processes": ("resource.RLIMIT_NPROC: limits.processes + 1,", ""),
    "processor time": ("resource.RLIMIT_CPU: cpu + 1,", ""),
    "core": ("resource.RLIMIT_CORE: 0,", "resource.RLIMIT_CORE: 1,"),
    "environment": ("        os.environ.clear()\n", ""),
}
# becoming another user drops root's capabilities too, and whoever is no root does not become another user
NO_HOLE = {("capabilities", "root"), ("user", "users")}


@pytest.mark.parametrize("left_out", HOLES)
def test_a_sandbox_with_a_hole_is_not_used(left_out, tmp_path, monkeypatch):
    rung = next((rung for rung in ("root", "users") if sandbox._fault(rung) is None), None)
    if rung is None:
        pytest.skip(f"no namespaces on this machine: {sandbox.isolation()[1]}")
    if (left_out, rung) in NO_HOLE:
        pytest.skip("another protection does the same here")
    before, after = HOLES[left_out]
    texts = {file.name: file.read_text(encoding="utf-8") for file in (sandbox._CHILD, sandbox._JAIL)}
    assert sum(text.count(before) for text in texts.values()) == 1
    if left_out == "old root":
        before = '    called("umount /.old", LIBC.umount2(b"/.old", MNT_DETACH))\n' + before
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(before, after), encoding="utf-8")
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "child.py")
    assert sandbox._fault(rung) is not None


@pytest.fixture
def untried():
    """What was found out about this machine is forgotten before and after."""
    sandbox.isolation.cache_clear()
    yield
    sandbox.isolation.cache_clear()


@pytest.mark.usefixtures("untried")
def test_without_isolation_nothing_runs_and_every_way_says_why(monkeypatch):
    monkeypatch.setattr(sandbox, "_fault", lambda rung: f"{rung} is broken")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("something was started"))
    found, why_not = sandbox.isolation()
    assert found is None
    assert why_not.count("is broken") == len(sandbox.RUNGS)
    with pytest.raises(UserError, match=r"no program is run.*bubblewrap is broken.*docs/sandbox\.md"):
        sandbox.run("print(1)")


def test_root_is_told_of_an_interpreter_that_no_other_user_can_read(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("something was started"))
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        python = Path(name, "versions", "3.11")
        python.mkdir(parents=True)
        monkeypatch.setattr(sandbox, "_views", lambda: (sandbox.View("ro", str(python)),))
        assert f"others may not enter {name}: use a Python" in str(sandbox._fault("users"))
        for closed, mode in ((Path(name), 0o755), (python, 0o751)):
            closed.chmod(mode)
        assert sandbox._closed([str(python)]) == python  # which has to be read too
        python.chmod(0o755)
        assert sandbox._closed([str(python)]) is None


@pytest.mark.parametrize("rung", sandbox.RUNGS)
def test_a_sandbox_that_cannot_start_is_an_error_and_no_verdict(rung, monkeypatch):
    if sandbox._fault(rung):
        pytest.skip(f"{sandbox.RUNGS[rung]}: {sandbox._fault(rung)}")
    monkeypatch.setattr(sandbox, "_CHILD", Path("/not/there/child.py"))
    with pytest.raises(UserError, match="cannot be built"):
        sandbox._run(rung, "x = 1", Limits())


def test_isolation_is_found_by_trying_once(monkeypatch):
    found, why_not = sandbox.isolation()
    monkeypatch.setattr(sandbox, "_fault", lambda rung: pytest.fail("tried again"))
    assert sandbox.isolation() == (found, why_not)
    if found is None:
        pytest.skip(f"no isolation on this machine: {why_not}")
    assert sandbox.run("x = 1").passed
