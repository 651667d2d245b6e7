"""Nothing half-written is ever taken for whole: files, checkpoints and finished folders."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from rlhf.errors import UserError, errno_of, exit_on_user_error
from rlhf.runs import artifacts
from rlhf.runs.artifacts import Checkpoints, fault_of, step_of, write_atomically, write_manifest


def full_disk(monkeypatch, after=0):
    """Let os.fsync fail as on a full disk, from the call number ``after`` on."""
    calls, real = [], os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return calls


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def save(checkpoints, step, text=None):
    with checkpoints.writing(step) as folder:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights.bin").write_bytes((text or f"weights {step}").encode() * 50)
        (folder / "state.json").write_text(json.dumps({"step": step}))


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["näu", b"n\xc3\xa4u"])
def test_a_write_replaces_the_whole_file(tmp_path, content):
    file = tmp_path / "a" / "file.json"
    write_atomically(file, "something longer that was there before")
    write_atomically(file, content)
    assert file.read_bytes() == b"n\xc3\xa4u"
    assert names(tmp_path) == ["a/file.json"]


def test_a_full_disk_leaves_the_old_content_and_no_scrap(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    write_atomically(file, "old")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


def test_an_interruption_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    write_atomically(file, "old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file.json"]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    file = tmp_path / "file.json"
    write_atomically(file, "old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(file.read_text()))
    write_atomically(file, "new")
    assert seen == ["old", "new"]  # first the temporary file, then, after the rename, its folder


def test_json_that_is_damaged_is_the_users_to_mend(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": \xff')
    with pytest.raises(UserError, match=r"a\.json: not readable as JSON"):
        artifacts.read_json(tmp_path / "a.json")


# --- the manifest ----------------------------------------------------------------------------------------


def folder_with(path, **files):
    for name, text in files.items():
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def test_a_manifest_holds_the_hash_of_every_file_but_the_skipped(tmp_path):
    folder = folder_with(tmp_path / "x", a="1", b="2", log="3")
    folder_with(folder / "parts", c="4")
    files = write_manifest(folder, {"stage": "s"}, skip=["log", "parts"])["files"]
    assert files == {name: hashlib.sha256(text).hexdigest() for name, text in (("a", b"1"), ("b", b"2"))}
    assert json.loads((folder / "manifest.json").read_text())["stage"] == "s"
    assert fault_of(folder) is None


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "x", a="1", b="2")
    full_disk(monkeypatch, after=2)  # both files are synced, the manifest is not
    with pytest.raises(OSError, match="No space left"):
        write_manifest(folder, {})
    assert names(folder) == ["a", "b"]


def test_the_identity_is_that_of_the_contents_not_of_time_or_machine(tmp_path):
    def identity(name, when, fingerprint="f", **files):
        folder = folder_with(tmp_path / name, **files)
        for file in folder.iterdir():
            os.utime(file, (when, when))
        extra = {"fingerprint": fingerprint, "seconds": when, "machine": {"cpus": when}}
        return write_manifest(folder, extra)["identity"]

    first = identity("one", 1, a="1", b="2")
    assert identity("two", 10**9, b="2", a="1") == first
    others = [
        identity("content", 1, a="1", b="3"),
        identity("name", 1, a="1", c="2"),
        identity("more", 1, a="1", b="2", c=""),
        identity("fingerprint", 1, fingerprint="g", a="1", b="2"),
    ]
    assert len({first, *others}) == 5


# --- checkpoints -----------------------------------------------------------------------------------------


def test_there_is_no_checkpoint_at_first(checkpoints):
    assert checkpoints.newest() is None
    assert step_of(checkpoints.newest()) == 0


def test_the_newest_checkpoint_is_found_by_number_and_two_are_kept(checkpoints):
    for step in (9, 10, 100):
        save(checkpoints, step)
    assert step_of(checkpoints.newest()) == 100
    assert (checkpoints.newest() / "policy" / "weights.bin").read_text() == "weights 100" * 50
    assert [p.name for p in sorted(checkpoints.folder.iterdir())] == ["step-0000010", "step-0000100"]


def test_a_failure_while_writing_leaves_nothing_new(checkpoints):
    save(checkpoints, 1)
    before = names(checkpoints.folder)

    def failing_save():
        with checkpoints.writing(2) as folder:
            (folder / "half").write_text("x")
            raise KeyError("anything")

    with pytest.raises(KeyError):
        failing_save()
    assert names(checkpoints.folder) == before
    assert step_of(checkpoints.newest()) == 1


@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_at_any_moment_leaves_the_old_checkpoints(checkpoints, monkeypatch, after):
    save(checkpoints, 1)
    save(checkpoints, 2)
    before = names(checkpoints.folder)
    with monkeypatch.context() as patch:
        calls = full_disk(patch, after=after)
        with pytest.raises(OSError, match="No space left") as caught:
            save(checkpoints, 3)
        assert len(calls) == after + 1  # two files, the manifest, its folder
    assert caught.value.errno == errno.ENOSPC
    assert names(checkpoints.folder) == before
    assert step_of(checkpoints.newest()) == 2
    save(checkpoints, 3)
    assert step_of(checkpoints.newest()) == 3


def test_the_old_checkpoint_goes_only_when_the_new_one_is_whole(checkpoints, monkeypatch):
    save(checkpoints, 1)
    save(checkpoints, 2)
    seen, real = [], shutil.rmtree

    def rmtree(path, **options):
        if path.name.startswith("step-"):
            seen.append((path.name, fault_of(checkpoints.folder / "step-0000003")))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(checkpoints, 3)
    assert seen == [("step-0000001", None)]


def test_every_file_of_a_checkpoint_is_synced_before_the_rename(checkpoints, monkeypatch):
    synced, real = set(), os.fsync

    def fsync(descriptor):
        assert not (checkpoints.folder / "step-0000001").exists() or len(synced) >= 4
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save(checkpoints, 1)
    written = checkpoints.folder / "step-0000001"
    assert {p.stat().st_ino for p in written.rglob("*") if p.is_file()} <= synced
    assert checkpoints.folder.stat().st_ino in synced


def test_what_a_killed_save_left_behind_is_never_used_and_can_be_removed(checkpoints):
    scrap = checkpoints.folder / ".staging-0000007" / "policy"
    scrap.mkdir(parents=True)
    (scrap / "weights.bin").write_text("half")
    assert checkpoints.newest() is None
    save(checkpoints, 6)
    assert checkpoints.newest().name == "step-0000006"
    checkpoints.clean()  # the savers of both stages call it, before any process writes
    save(checkpoints, 7)
    assert {p.name for p in checkpoints.folder.iterdir()} == {"step-0000006", "step-0000007"}
    assert (checkpoints.newest() / "policy" / "weights.bin").read_text() == "weights 7" * 50


def test_only_the_main_process_commits(checkpoints):
    with checkpoints.writing(1, commits=False) as folder:
        (folder / "shard").write_text("x")
    assert checkpoints.newest() is None
    assert (folder / "shard").read_text() == "x"


def flip(folder):
    file = folder / "policy" / "weights.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def shorten(folder):
    file = folder / "policy" / "weights.bin"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "bit flip": (flip, "weights.bin is damaged"),
    "truncated": (shorten, "weights.bin is damaged"),
    "missing file": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json is damaged"),
    "other manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), "is damaged"),
    "no file list": (lambda folder: (folder / "manifest.json").write_text('{"files": []}'), "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(checkpoints, capsys, kind):
    damage, reason = DAMAGES[kind]
    save(checkpoints, 1)
    save(checkpoints, 2)
    damage(checkpoints.folder / "step-0000002")
    assert checkpoints.newest().name == "step-0000001"
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: ")
    assert reason in warning
    assert "step-0000002" in warning
    assert warning.endswith("using step-0000001 instead")


def test_a_whole_checkpoint_is_used_without_a_word(checkpoints, capsys):
    save(checkpoints, 1)
    flip(checkpoints.folder / "step-0000001")
    save(checkpoints, 2)
    assert checkpoints.newest().name == "step-0000002"
    assert capsys.readouterr().out == ""


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(checkpoints):
    save(checkpoints, 1)
    save(checkpoints, 2)
    flip(checkpoints.folder / "step-0000002")
    save(checkpoints, 2)
    assert fault_of(checkpoints.folder / "step-0000002") is None


def test_starting_over_is_never_silent(checkpoints):
    for step in (1, 2):
        save(checkpoints, step)
        flip(checkpoints.folder / f"step-000000{step}")
    with pytest.raises(UserError) as caught:
        checkpoints.newest()
    assert str(caught.value).startswith("no checkpoint can be used: ")
    assert "step-0000002" in str(caught.value)
    assert str(caught.value).endswith(f"remove {checkpoints.folder} to start again")


# --- a full disk, as libraries say it --------------------------------------------------------------------


def test_every_librarys_full_disk_becomes_one_error(checkpoints):
    for message in (
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed: file write failed",
    ):
        with pytest.raises(OSError, match="No space left") as caught, checkpoints.writing(1):
            raise RuntimeError(message)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(checkpoints.folder))
    with pytest.raises(RuntimeError, match="a bug"), checkpoints.writing(1):
        raise RuntimeError("a bug")
    with pytest.raises(PermissionError), checkpoints.writing(1):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EFBIG, "x"), errno.EFBIG),
        (OSError(errno.EACCES, "No space left"), errno.EACCES),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("I/O error: File too large (os error 27)"), errno.EFBIG),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), errno.ENOSPC),
        (RuntimeError("basic_ios::clear: iostream error"), errno.ENOSPC),
        (RuntimeError("unexpected pos"), None),
        (RuntimeError("anything else"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_the_systems_number_is_read_out_of_any_librarys_words(error, number):
    assert errno_of(error) == number


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("two\n lines"), "error: two lines"),
        (OSError(errno.ENOSPC, "full", "a/b"), "error: the disk is full: a/b: free some space"),
        (RuntimeError("(os error 28)"), "error: the disk is full: free some space"),
        (OSError(errno.EFBIG, "x", "a"), "error: file too large: a: raise the limit on the size of a file"),
        (OSError(errno.EROFS, "x", "a"), "error: read-only file system: a: it lies on"),
        (
            OSError(errno.EPERM, "x", "a", None, "b"),
            "error: operation not permitted: a -> b: change its owner",
        ),
        (OSError(errno.EMFILE, "x", b"a\xff"), "error: too many open files: a\\udcff: raise the limit"),
        (OSError(errno.ENAMETOOLONG, "x", "n\n" * 9), "error: file name too long: n\\nn"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(capsys, error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(main)
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    assert written.err.startswith(line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_is_one_line_and_the_status_of_a_shell(number):
    script = (
        "import os, time; from rlhf.errors import exit_on_user_error\n"
        f"def main():\n    os.kill(os.getpid(), {int(number)}); time.sleep(9)\n"
        "exit_on_user_error(main)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number
    assert done.stderr == (
        f"stopped by {number.name}; run the same command again: it goes on from what is on the disk\n"
    )


def test_an_emoji_does_not_end_a_run_in_an_ascii_terminal():
    script = "from rlhf.errors import exit_on_user_error; exit_on_user_error(lambda: print('a \U0001f600'))"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=ascii_only, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "a \\U0001f600\n")


def test_a_bug_is_not_dressed_up_as_the_users_mistake():
    def main():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        exit_on_user_error(main)
