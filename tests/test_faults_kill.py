"""Killed at random points of every phase, or asked to stop, PPO ends bit for bit where a run left alone does.

The machinery is that of ``python -m benchmarks.faults``, which runs longer campaigns. What the runs carry
over a restart is more than weights and moments: an adaptive price of the KL, the moments of the scores, a
moving average, a schedule.
"""

import random
import signal

import pytest

from benchmarks.faults import campaign
from benchmarks.faults.killed_process import LAST, PHASES, STATEFUL, STEPS, Plan, Start, link_stages, outcome

RARELY = (*STATEFUL, "ppo.checkpoint_every=100")


@pytest.fixture(scope="module")
def alone(road, tmp_path_factory):
    """A run left alone."""
    folder = link_stages(road, tmp_path_factory.mktemp("alone") / "run")
    start = Start(folder)
    assert start.wait() == 0, start.output()
    return start


def assert_same(folder, alone):
    found, wanted = outcome(folder), outcome(alone.folder.parents[2])
    for key, value in wanted.items():
        assert found[key] == value, key
    assert [row["step"] for row in found["steps"]] == list(range(1, STEPS + 1))
    adapters = {f"{name}/adapter_model.safetensors" for name in ("policy", "policy_last", "value")}
    assert adapters <= set(found["files"])
    assert found["left"] == []


def test_more_than_20_kills_at_random_points_change_nothing(road, tmp_path):
    report = campaign.campaign(road, tmp_path, kills=22, seed=1)
    assert report.faults == []
    assert report.killed >= 22
    assert report.reached >= set(PHASES) - set(LAST)


def test_a_campaign_tells_what_differs(road, alone, tmp_path):
    report, known = campaign.Report(), campaign.phase_times(alone)
    wanted = outcome(alone.folder.parents[2])
    wanted["steps"][-1]["objective/score"] += 1e-12
    folder = link_stages(road, tmp_path / "run")
    campaign.kill_repeatedly(folder, wanted, iter(["update"]), known, random.Random(0), report, kills=1)
    assert report.faults == ["run 1: steps differ"]


@pytest.mark.parametrize(("phase", "visit"), [("rollout", 2), ("update", 1), ("log", 1)])
def test_a_polite_stop_saves_and_ends_well(phase, visit, road, alone, tmp_path):
    here = link_stages(road, tmp_path / "here")
    delay = 0.0 if phase == "log" else campaign.phase_times(alone)[phase][1] / 2
    asked = Start(here, RARELY, Plan(phase, visit, delay, signal.SIGTERM))
    assert asked.wait() == 0, asked.output()
    assert "ppo: asked to stop (SIGTERM); saved after step 2 of 6, the same command goes on" in asked.output()
    assert [p.name for p in asked.folder.glob("checkpoints/*")] == ["step-0000002"]
    assert not (asked.folder / "manifest.json").exists()
    again = Start(here, RARELY)
    assert again.wait() == 0, again.output()
    assert "ppo: going on after step 2 of 6" in again.output()
    assert_same(here, alone)


def test_a_stop_before_the_first_step_says_that_there_is_nothing_to_save(road, tmp_path):
    here = link_stages(road, tmp_path / "here")
    asked = Start(here, RARELY, Plan("rollout", 0, 0.0, signal.SIGTERM))
    assert asked.wait() == 0, asked.output()
    assert "ppo: asked to stop (SIGTERM); no step was done" in asked.output()
    assert not (asked.folder / "checkpoints").exists()


def test_a_kill_behind_the_manifest_leaves_no_checkpoints_for_ever(road, alone, tmp_path):
    here = link_stages(road, tmp_path / "here")
    hit = Start(here, STATEFUL, Plan("tidy"))
    assert hit.wait() == -signal.SIGKILL
    assert (hit.folder / "manifest.json").exists()
    assert (hit.folder / "checkpoints").exists()
    again = Start(here)
    assert again.wait() == 0, again.output()
    assert "ppo: done already" in again.output()
    assert_same(here, alone)
