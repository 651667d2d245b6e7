"""Isolation is found out by trying, a hole in it is noticed, and where nothing holds nothing runs."""

import subprocess
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
    "user": ("        jail.become(user)", "        pass"),
    "capabilities": ('called("capset", LIBC.capset(', "repr(("),
    "no new privileges": ("prctl(PR_SET_NO_NEW_PRIVS, 1)", ""),
    "filter": ("            jail.filter_system_calls()", "            pass"),
    "one filtered call": ('"unshare": (272, 97), ', ""),
    "sockets": ('"socket": (41, 198),', ""),
    "memory": ("resource.RLIMIT_AS: memory,", ""),
    "file size": ("resource.RLIMIT_FSIZE: file,", ""),
    "processes": ("resource.RLIMIT_NPROC: processes + 1,", ""),
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
        pytest.skip(f"no namespaces on this machine: {sandbox.why_not()}")
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


def test_without_isolation_nothing_runs(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("something was started")

    monkeypatch.setattr(sandbox, "_search", lambda: (None, {"bubblewrap": "not installed"}))
    monkeypatch.setattr(subprocess, "Popen", never)
    assert sandbox.isolation() is None
    with pytest.raises(UserError, match=r"no program is run.*bubblewrap: not installed.*docs/sandbox\.md"):
        sandbox.run("print(1)")


def test_a_machine_without_any_way_is_told_why(monkeypatch):
    monkeypatch.setattr(sandbox, "_fault", lambda rung: f"{rung} is broken")
    sandbox._search.cache_clear()
    try:
        assert sandbox.isolation() is None
        assert sandbox.why_not().count("is broken") == len(sandbox.RUNGS)
    finally:
        sandbox._search.cache_clear()


@pytest.mark.parametrize("rung", sandbox.RUNGS)
def test_a_sandbox_that_cannot_start_is_an_error_and_no_verdict(rung, monkeypatch):
    if sandbox._fault(rung):
        pytest.skip(f"{sandbox.RUNGS[rung]}: {sandbox._fault(rung)}")
    monkeypatch.setattr(sandbox, "_CHILD", Path("/not/there/child.py"))
    with pytest.raises(UserError, match="cannot be built"):
        sandbox._run(rung, "x = 1", Limits())


def test_isolation_is_found_by_trying_once(monkeypatch):
    found = sandbox.isolation()
    monkeypatch.setattr(sandbox, "_fault", lambda rung: pytest.fail("tried again"))
    assert sandbox.isolation() is found
    if found is None:
        pytest.skip(f"no isolation on this machine: {sandbox.why_not()}")
    assert found.name in sandbox.RUNGS.values()
    assert sandbox.run("x = 1").passed
