"""Trackers are off unless asked for, write what is logged, and are missed before anything starts."""

import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import yaml
from conftest import tiny_recipe

from rlhf.errors import UserError
from rlhf.training.metrics import Metrics


def log(folder, **options):
    metrics = Metrics(folder, total=2, done=0, shown={}, description="x", **options)
    for step in (1, 2):
        metrics.log(step, {"loss": 1.0 / step})
    metrics.close()
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_trackers_only_the_lines_are_written(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"trackers": []}))
    assert log(tmp_path) == [1.0, 0.5]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "recipe.yaml"}


def test_tensorboard_is_written_where_the_recipe_asks_for_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"trackers": ["tensorboard"]}))
    assert log(tmp_path) == [1.0, 0.5]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_others_get_the_run_and_every_step(name, tmp_path, monkeypatch):
    seen = []
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    run = types.SimpleNamespace(
        log=lambda values, step=None, **_: seen.append((step, values)), finish=lambda: seen.append("end")
    )
    module.init = lambda **options: (seen.append((options["project"], options["name"])), run)[1]
    monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "mine" / "ppo"
    folder.mkdir(parents=True)
    log(folder, trackers=[name])
    assert seen == [("pairwright", "mine-ppo"), (1, {"loss": 1.0}), (2, {"loss": 0.5}), "end"]


def test_a_tracker_that_is_not_installed_is_told_with_the_command(tmp_path):
    for name, message in (("trackio", "trackio is not installed; run"), ("weights", "'weights' is none of")):
        with pytest.raises(UserError, match=f"trackers: {message}"):
            log(tmp_path, trackers=[name])
    assert tiny_recipe().trackers == []
    assert tiny_recipe("trackers=[tensorboard]").trackers == ["tensorboard"]
    with pytest.raises(UserError, match=r"trackers: trackio is not installed; run `pip install trackio`"):
        tiny_recipe("trackers=[trackio]")
    with pytest.raises(UserError, match="trackers"):
        tiny_recipe("trackers=[weights]")
