"""`make rank` from the command line: what is refused in a line, and that one address survives a restart."""

import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import PROMPTS, ROOT, TINY

ROW = '{"prompt": "q", "responses": ["a", "b"]}\n'


def rank(folder, *overrides, **environment):
    (folder / "rows.jsonl").write_text(ROW)
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf.rank", str(TINY), "rank.files=rows.jsonl", *PROMPTS, *overrides],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def refused(folder, *overrides, **environment):
    process = rank(folder, *overrides, **environment)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.count("\n") == 1, error
    return error


def address(process):
    for line in process.stdout:
        if line.startswith("rank at"):
            return line.split()[-1]
    raise AssertionError(process.stderr.read())


@pytest.fixture
def running(tmp_path):
    process = rank(tmp_path)
    try:
        yield process, address(process)
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_a_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"error: port {port} of 127.0.0.1 is in use: give another one (PORT=" in refused(
            tmp_path, PORT=str(port)
        )


def test_a_second_server_of_a_session_is_refused(tmp_path, running):
    assert "another process is running this stage" in refused(tmp_path)


def test_the_address_is_the_same_after_a_kill(tmp_path, running):
    process, former = running
    process.kill()
    process.communicate()
    assert (tmp_path / "runs/tiny/rank/.address.json").stat().st_mode & 0o077 == 0
    again = rank(tmp_path)
    try:
        assert address(again) == former
    finally:
        again.kill()
        again.communicate()
    (tmp_path / "runs/tiny/rank/.address.json").write_text("[1]")
    third = rank(tmp_path)
    try:
        assert address(third) != former
    finally:
        third.kill()
        third.communicate()


def test_mistakes_are_told_and_a_wrong_key_within_a_second_or_so(tmp_path):
    before = time.monotonic()
    assert "rank.promts" in refused(tmp_path, "rank.promts=3")
    assert time.monotonic() - before < 5  # on a busy machine; the import of torch alone takes that
    assert "TO=doccano: name label-studio or argilla" in refused(tmp_path, TO="doccano")
    assert "PORT=x: a port is a number" in refused(tmp_path, PORT="x")
    assert "rank.files: no file matches no.jsonl" in refused(tmp_path, "rank.files=no.jsonl")
    assert "rank.policies: runs/no is not a folder" in refused(tmp_path, "rank.policies=[base, runs/no]")
    assert "rank.responses" in refused(tmp_path, "rank.responses=10")
    assert not (tmp_path / "runs/tiny/rank/candidates.json").exists()


@pytest.mark.parametrize("tool", ["label-studio", "argilla"])
def test_tasks_of_other_tools_are_written_beside_the_answers(tmp_path, tool):
    process = rank(tmp_path, TO=tool)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert f"wrote runs/tiny/rank/{tool}.json" in out
    assert (tmp_path / f"runs/tiny/rank/{tool}.json").is_file()
