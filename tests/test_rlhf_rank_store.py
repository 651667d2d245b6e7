"""The file of answers: appended whole, mended after a kill, shared by processes, never a lost line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from rlhf.data.comparisons import Comparison, Message
from rlhf.errors import UserError
from rlhf.rank.store import Store, answer

ROW = answer(
    Comparison((Message("user", "Q\u2028?"),), ("a", "b"), (0, 1), "rank"),
    "ann",
    reason="clear",
    seconds=None,
)


def test_an_answer_is_a_native_row_with_who_and_why(tmp_path):
    assert ROW["annotator"] == "ann"
    assert ROW["reason"] == "clear"
    assert "seconds" not in ROW
    store = Store(tmp_path / "deep" / "answers.jsonl")
    assert store.rows() == []
    store.append(ROW)
    store.append({**ROW, "annotator": "bob"})
    assert [row["annotator"] for row in Store(store.path).rows()] == ["ann", "bob"]


def test_the_last_answer_of_one_person_is_taken_back(tmp_path):
    store = Store(tmp_path / "answers.jsonl")
    for name, ranks in (("ann", [0, 1]), ("ann", [1, 0]), ("bob", [0, 1])):
        store.append({**ROW, "annotator": name, "ranks": ranks})
    taken = store.take_back(lambda row: row["annotator"] == "ann")
    assert taken is not None
    assert taken["ranks"] == [1, 0]
    assert [(row["annotator"], row["ranks"]) for row in store.rows()] == [("ann", [0, 1]), ("bob", [0, 1])]
    assert store.take_back(lambda row: row["annotator"] == "eve") is None


def test_a_half_written_last_line_is_cut_off_and_a_whole_one_ended(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    whole = json.dumps(ROW).encode()
    path.write_bytes(whole + b"\n" + whole[:20])
    store = Store(path)
    assert "cut off" in capsys.readouterr().out
    store.append(ROW)
    assert len(store.rows()) == 2
    with path.open("ab") as file:
        file.write(whole[:20])  # another process was killed while this one is at it
    assert store.take_back(lambda row: row["annotator"] == "ann") is not None
    assert len(store.rows()) == 1
    path.write_bytes(whole)  # as an editor leaves it
    store.append(ROW)
    assert len(store.rows()) == 2


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a":\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl:2: not a JSON object"):
        Store(path).rows()


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    store = Store(tmp_path / "answers.jsonl")
    store.append(ROW)
    before = store.path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.append(ROW)
    assert store.path.read_bytes() == before


WRITER = """
import sys
from pathlib import Path
from rlhf.rank.store import Store
store = Store(Path(sys.argv[1]))
for n in range(int(sys.argv[3])):
    store.append({"who": sys.argv[2], "n": n, "text": "x" * 5000})
    print(n, flush=True)
"""


def writer(path, who, number):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), who, str(number)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_share_a_file_and_kill_minus_9_loses_nothing_confirmed(tmp_path):
    path = tmp_path / "answers.jsonl"
    killed, steady = writer(path, "killed", 100_000), writer(path, "steady", 40)
    time.sleep(1.0)
    while killed.stdout.readline() != "20\n":
        pass
    killed.send_signal(signal.SIGKILL)
    confirmed = {20, *map(int, killed.communicate()[0].split())}
    assert len(steady.communicate(timeout=60)[0].split()) == 40
    rows = Store(path).rows()
    assert {row["n"] for row in rows if row["who"] == "steady"} == set(range(40))
    assert confirmed <= {row["n"] for row in rows if row["who"] == "killed"}
