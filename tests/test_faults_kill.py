"""Killed at random points of every phase, or asked to stop, PPO ends bit for bit where a run left alone does.

The machinery is that of ``python -m benchmarks.faults``, which runs longer campaigns. What the runs carry
over a restart is more than weights and moments: an adaptive price of the KL, the moments of the scores, a
moving average, a schedule.
"""

import signal

import pytest
from conftest import slow_but

from benchmarks.faults.__main__ import Campaign, campaign
from benchmarks.faults.killed_process import LAST, PHASES, STATEFUL, STEPS, Plan, Start, link_stages, outcome

RARELY = (*STATEFUL, "ppo.checkpoint_every=100")


def assert_same(folder, alone):
    found, wanted = outcome(folder), outcome(alone.root)
    for key, value in wanted.items():
        assert found[key] == value, key
    assert [row["step"] for row in found["steps"]] == list(range(1, STEPS + 1))
    adapters = {f"{name}/adapter_model.safetensors" for name in ("policy", "policy_last", "value")}
    assert adapters <= set(found["files"])
    assert found["left"] == []


@pytest.mark.slow
def test_more_than_20_kills_at_random_points_change_nothing(road, tmp_path):
    found = campaign(road, tmp_path, kills=22, seed=1)
    assert found.faults == []
    assert found.kills.total() >= 22
    assert found.reached >= set(PHASES) - set(LAST)
    assert f"| {found.kills['update']} |" in found.table()


@pytest.mark.slow
def test_a_campaign_reports_what_differs(road, alone, tmp_path):
    found = Campaign(alone, seed=0)
    found.wanted["steps"][-1]["objective/score"] += 1e-12
    found.run(link_stages(road, tmp_path / "run"), kills=1)
    assert found.faults == ["run 1: steps differ"]


@pytest.mark.parametrize(
    ("phase", "visit"), slow_but([("update", 1)], [("rollout", 2), ("update", 1), ("log", 1)])
)
def test_a_polite_stop_saves_and_ends_well(phase, visit, road, alone, tmp_path):
    here = link_stages(road, tmp_path / "here")
    delay = 0.0 if phase == "log" else Campaign(alone, 0).known[phase][1] / 2
    asked = Start(here, RARELY, Plan(phase, visit, delay, signal.SIGTERM))
    assert asked.wait() == 128 + signal.SIGTERM, asked.output()
    assert "ppo: asked to stop (SIGTERM); saved after step 2 of 6, the same command goes on" in asked.output()
    assert [p.name for p in asked.folder.glob("checkpoints/*")] == ["step-0000002"]
    assert not (asked.folder / "manifest.json").exists()
    again = Start(here, RARELY)
    assert "ppo: going on after step 2 of 6" in again.finish()
    assert_same(here, alone)


def test_a_stop_before_the_first_step_says_that_there_is_nothing_to_save(road, tmp_path):
    here = link_stages(road, tmp_path / "here")
    asked = Start(here, RARELY, Plan("rollout", 0, 0.0, signal.SIGTERM))
    assert asked.wait() == 128 + signal.SIGTERM, asked.output()
    assert "ppo: asked to stop (SIGTERM); no step was done" in asked.output()
    assert not (asked.folder / "checkpoints").exists()


def test_a_kill_behind_the_manifest_leaves_no_checkpoints_for_ever(road, alone, tmp_path):
    here = link_stages(road, tmp_path / "here")
    hit = Start(here, STATEFUL, Plan("tidy"))
    assert hit.wait() == -signal.SIGKILL
    assert (hit.folder / "manifest.json").exists()
    assert (hit.folder / "checkpoints").exists()
    again = Start(here)
    assert "ppo: done already" in again.finish()
    assert_same(here, alone)
