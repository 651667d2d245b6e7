"""Two processes, one of which dies or hangs: the other ends in time, with one line and without a traceback.

They are plain processes that find each other through the environment, with no launcher that would end the
survivor. Nothing is killed before its first rollout, and the clock of a test starts there.
"""

import os
import signal
import time

import pytest
import torch
from ranks import pair

from benchmarks.faults.killed_process import Plan, Start, link_stages
from rlhf.errors import exit_on_user_error, lost_process

COMPILING = 600.0  # seconds until the first rollout at most
TIMEOUT = 15.0  # seconds, as the recipe of these tests says
SHORT = ("ppo.steps=3", "ppo.checkpoint_every=1", f"distributed.timeout_minutes={TIMEOUT / 60}")


def launch(folder, overrides, plans):
    starts = pair(folder, "ppo", overrides, plans)
    deadline = time.monotonic() + COMPILING
    while not all(any(name == "rollout" for name, _ in start.phases()[0]) for start in starts):
        ended = [start.output()[-3000:] for start in starts if not start.process.is_alive()]
        assert not ended, ended
        assert time.monotonic() < deadline, "no rollout"
        time.sleep(0.05)
    return starts


def assert_ends_with_one_line(survivor, within, reason):
    began = time.monotonic()
    status = survivor.wait(within + 60)
    assert status == 2, survivor.output()[-3000:]
    assert time.monotonic() - began < within, "it waited too long"
    said = survivor.output()
    (line,) = survivor.errors()
    assert line.startswith("error: ppo: another process of this run ended or hangs (")
    assert reason in line
    assert line.endswith("look at its last lines, then run the same command again: it goes on after step 1")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("zero", "plans"),
    [
        (2, {1: Plan("update", 1, 0.01)}),
        pytest.param(0, {0: Plan("rollout", 1, 0.01)}, marks=pytest.mark.slow),
        pytest.param(
            3, {1: Plan("scoring", 2)}, marks=pytest.mark.slow
        ),  # 8 responses of a process in two calls: the first of the second step
    ],
)
def test_a_process_whose_partner_is_killed_ends_with_one_line(zero, plans, road, tmp_path):
    here = link_stages(road, tmp_path / "here")
    starts = launch(here, (*SHORT, f"distributed.zero_stage={zero}"), plans)
    (dead,) = plans
    assert starts[dead].wait() == -signal.SIGKILL
    assert_ends_with_one_line(starts[1 - dead], within=10, reason="by peer")
    alone = Start(here, SHORT)
    assert "ppo: going on after step 1 of 3" in alone.finish()


@pytest.mark.slow
def test_a_process_whose_partner_hangs_ends_after_the_time_limit(road, tmp_path):
    here = link_stages(road, tmp_path / "here")
    starts = launch(here, SHORT, {1: Plan("update", 1, 0.0, signal.SIGSTOP)})
    try:
        assert_ends_with_one_line(starts[0], within=TIMEOUT + 20, reason="Timed out waiting")
    finally:
        os.kill(starts[1].process.pid, signal.SIGKILL)


def test_one_process_asked_to_stop_stops_both(road, tmp_path):
    here = link_stages(road, tmp_path / "here")
    starts = launch(here, SHORT, {1: Plan("rollout", 1, 0.0, signal.SIGTERM)})
    for start in starts:
        assert start.wait() == 128 + signal.SIGTERM, start.output()[-3000:]
    assert "ppo: asked to stop (SIGTERM); saved after step 1 of 3" in starts[0].output()
    assert "asked to stop" not in starts[1].output()
    assert [p.name for p in starts[0].folder.glob("checkpoints/*")] == ["step-0000001"]


# ---- what counts as a lost process

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
LOST = [
    (RuntimeError(f"{GLOO}pair.cc:553] Connection closed by peer [::1]:1. This is typically"),
     "Connection closed by peer [::1]:1"),
    (RuntimeError(f"{GLOO}unbound_buffer.cc:129] Timed out waiting 24000ms for send"),
     "Timed out waiting 24000ms for send"),
    (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
     "NCCL error: remote process exited or there was a network error"),
    (torch.distributed.DistStoreError("wait timeout after 15000ms, keys: /default_pg/0"),
     "wait timeout after 15000ms, keys: /default_pg/0"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "reason"), LOST)
def test_the_libraries_ways_of_saying_that_a_process_is_gone(error, reason, monkeypatch, capsys):
    def main():
        raise error

    assert lost_process(error) is None, "one process has no others"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_process(error) == reason
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: another process of this run ended or hangs ({reason}); look at its last lines, then run "
        "the same command again: it goes on from its last checkpoint\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the judge at [::1]:80 timed out"),
        RuntimeError(f"{GLOO}device.cc:12] no such interface"),
        torch.distributed.DistBackendError("NCCL error: out of memory"),
        ConnectionResetError("Connection reset by peer"),
    ],
)
def test_other_errors_are_not_taken_for_a_lost_process(error, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_process(error) is None
