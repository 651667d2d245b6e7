"""`kill -9` at any moment loses nothing: an interrupted run ends bit for bit where an uninterrupted one does.

Every start is a process of its own, forked from a server that has imported torch but computed nothing, so
that it begins in a tenth of a second and can be killed like any other.
"""

import contextlib
import random
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.faults import killed_process
from benchmarks.faults.killed_process import link_stages, outcome
from rlhf.runs.artifacts import MANIFEST, write_manifest

BATCHES = ("collect.prompts_per_batch=4",)
REWARD = (*BATCHES, "reward.epochs=2", "reward.checkpoint_every=1")
LONGER = {"comparisons": BATCHES, "reward": REWARD, "ppo": (*REWARD, "ppo.steps=4", "ppo.checkpoint_every=1")}
ENSEMBLE = (*BATCHES, "reward.checkpoint_every=1", "reward.members=2", "reward.lm_coef=0.5")


class Start(killed_process.Start):
    """One start of a stage, in its own process."""

    def __init__(self, name, folder, overrides=()):
        super().__init__(folder, overrides or LONGER[name], name=name)

    def progress(self):
        """Finished batches or saved steps, of all members together."""
        saved = {}
        for path in self.saved("step-*"):
            saved[path.parent] = max(saved.get(path.parent, 0), int(path.name[5:]))
        return sum(saved.values()) or len(list(self.folder.glob("parts/*.json")))

    def is_saving(self):
        return bool(self.saved(".staging-*/*"))

    def saved(self, pattern):
        """What the one training, or each member's, has among its checkpoints."""
        with contextlib.suppress(FileNotFoundError):  # renamed while it is looked for
            return [
                p
                for at in ("checkpoints", "checkpoints/member-*")
                for p in self.folder.glob(f"{at}/{pattern}")
            ]
        return []


@pytest.fixture(scope="module")
def whole(road, tmp_path_factory):
    """The uninterrupted runs."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(road / "models", folder / "models")
    for name in LONGER:
        Start(name, folder).finish()
    return folder


def assert_same(folder, whole, name):
    mine, expected = outcome(folder, name), outcome(whole, name)
    assert [row["step"] for row in mine["steps"]] == [row["step"] for row in expected["steps"]]
    assert mine == expected
    assert expected["files"]
    assert expected["steps"] or name == "comparisons"
    assert mine["left"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["comparisons", "reward"])  # PPO: test_faults_kill.py
def test_a_stage_killed_at_random_moments_ends_as_if_it_had_never_been_killed(name, whole, tmp_path):
    here = link_stages(whole, tmp_path / "here", name)
    units = 12 if name == "comparisons" else len(outcome(whole, name)["steps"])
    rng = random.Random(f"seed 7, {name}")
    kills = 0
    for goal in sorted(rng.sample(range(units - 2), 4)):  # so much is done, then a moment more
        start, more = Start(name, here), rng.uniform(0, 0.08)

        def due(start=start, goal=goal, more=more):
            return start.progress() >= goal and (time.sleep(more) or True)

        kills += start.kill_when(due)
    Start(name, here).finish()
    assert kills >= 3, "the kills came too late to mean anything"
    assert_same(here, whole, name)


@pytest.mark.slow
def test_an_ensemble_killed_in_every_member_ends_as_if_it_had_never_been_killed(whole, tmp_path):
    """With a language-model term: the second member begins anew where the first has not been finished."""
    alone = link_stages(whole, tmp_path / "alone", "reward")
    Start("reward", alone, ENSEMBLE).finish()
    here = link_stages(whole, tmp_path / "here", "reward")
    kills, said = [], ""
    for goal in (3, 5, 8):  # a member has 5 steps
        start = Start("reward", here, ENSEMBLE)
        if start.kill_when(lambda start=start, goal=goal: start.progress() >= goal):
            kills.append((start.folder / "parts" / "member-0.json").exists())
        said += start.output()
    said += Start("reward", here, ENSEMBLE).finish()
    assert kills[0] is False, "the first kill came too late"
    assert kills[-1] is True, "the last kill did not meet the second member"
    assert said.count("reward: going on after step") >= 2
    assert_same(here, alone, "reward")
    found = outcome(alone, "reward")
    assert [row["step"] for row in found["steps"]] == list(range(1, 11))
    assert all("reward/language" in row for row in found["steps"])
    assert {"model/adapter_model.safetensors", "model-1/adapter_model.safetensors"} <= set(found["files"])


@pytest.mark.slow
def test_a_stage_killed_while_it_writes_checkpoints_ends_the_same(whole, tmp_path):
    name = "reward"  # PPO: test_faults_kill.py
    here = link_stages(whole, tmp_path / "here", name)
    torn = 0
    for more in (1, 2, 1):
        start = Start(name, here)
        goal = start.progress() + more

        def due(start=start, goal=goal):
            return start.progress() >= goal and start.is_saving()

        assert start.kill_when(due)
        torn += start.is_saving()
    said = Start(name, here).finish()
    assert torn, "no kill came while a checkpoint was being written"
    assert "going on after step" in said
    assert_same(here, whole, name)


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """The reward and PPO stages, each killed after its last checkpoint and before its manifest."""
    parent = tmp_path_factory.mktemp("stopped")
    for name in ("reward", "ppo"):
        here = link_stages(whole, parent / name, name)
        last = f"checkpoints/step-{len(outcome(whole, name)['steps']):07d}"
        start = Start(name, here)
        assert start.kill_when((start.folder / last).exists)
        assert not (start.folder / MANIFEST).exists()
    return parent


def steps_in(said, name):
    """Where a resumed stage said that it went on."""
    line = next(line for line in said.splitlines() if line.startswith(f"{name}: going on after step"))
    return int(line.split()[5])


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_a_stage_killed_after_its_last_checkpoint_only_finishes(name, stopped, whole, tmp_path):
    here = Path(shutil.copytree(stopped / name, tmp_path / "here", symlinks=True))
    said = Start(name, here).finish()
    assert steps_in(said, name) == len(outcome(whole, name)["steps"])
    assert_same(here, whole, name)


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(name, stopped, whole, tmp_path):
    here = Path(shutil.copytree(stopped / name, tmp_path / "here", symlinks=True))
    newest = max((here / "runs" / "tiny" / name / "checkpoints").glob("step-*"))
    weights = max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = Start(name, here).finish()
    assert f"warning: {weights.relative_to(here)} is damaged" in said
    assert steps_in(said, name) == len(outcome(whole, name)["steps"]) - 1
    assert_same(here, whole, name)


@pytest.mark.parametrize(
    ("name", "file"),
    [("reward", "optimizer.pt"), ("reward", "scheduler.pt"), ("ppo", "optimizer.safetensors")],
)
def test_a_checkpoint_without_optimizer_state_is_an_error_and_never_a_fresh_adam(
    name, file, stopped, tmp_path
):
    here = Path(shutil.copytree(stopped / name, tmp_path / "here", symlinks=True))
    newest = max((here / "runs" / "tiny" / name / "checkpoints").glob("step-*"))
    next(newest.rglob(file)).unlink()
    write_manifest(newest, {})  # as if it had been written so
    start = Start(name, here)
    assert start.wait() == 2, start.output()
    said = start.output()
    assert "error:" in said
    assert "optimizer state is incomplete" in said
    assert "Traceback" not in said


def test_one_missing_moment_is_an_error_too(stopped, tmp_path):
    here = Path(shutil.copytree(stopped / "ppo", tmp_path / "here", symlinks=True))
    newest = max((here / "runs" / "tiny" / "ppo" / "checkpoints").glob("step-*"))
    file = newest / "optimizer.safetensors"
    moments = load_file(file)
    del moments[min(name for name in moments if name.startswith("exp_avg_sq:"))]
    save_file(moments, file)
    write_manifest(newest, {})
    start = Start("ppo", here)
    assert start.wait() == 2, start.output()
    assert "optimizer state is incomplete" in start.output()
