"""Run folders of earlier versions: finished stages stay valid, unfinished ones are refused in one line."""

import json
from pathlib import Path

import pytest
from conftest import tiny_recipe

from rlhf.errors import UserError
from rlhf.recipe import stored
from rlhf.recipe.stored import modernized
from rlhf.runs import artifacts
from rlhf.runs.stage import open_stage

FOLDER = Path("runs/tiny/ppo")


@pytest.fixture(autouse=True)
def renamed(monkeypatch):
    """Keys that this version is known to have, under names that no version had."""
    monkeypatch.setattr(stored, "RENAMED", {"ppo.was_steps": "ppo.steps", "tax.lm_loss.was": "tax.lm_loss.x"})
    monkeypatch.setattr(stored, "REMOVED", {"ppo.gone": "remove it"})


def old_folder(*overrides, finished=True):
    """The folder of a stage as an earlier version left it: former keys, and none of a later one's."""
    run = open_stage(tiny_recipe(*overrides), "ppo", section="ppo")
    run.lock.close()
    ppo = run.fingerprint["recipe"]["ppo"]
    ppo["was_steps"] = ppo.pop("steps")
    ppo["gone"] = True
    del ppo["lam"], run.fingerprint["recipe"]["data"]["limit"]
    artifacts.write_json(run.folder / "fingerprint.json", run.fingerprint)
    artifacts.write_json(run.folder / "policy.json", {"weights": 1})
    if finished:
        run.finish({})
    return json.loads((FOLDER / "fingerprint.json").read_text())["recipe"]


def opened(*overrides):
    run = open_stage(tiny_recipe(*overrides), "ppo", section="ppo")
    if run is not None:
        run.lock.close()
    return run


def test_an_old_finished_stage_stays_valid_where_nothing_else_changed(inside, capsys):
    assert "steps" not in old_folder()["ppo"]
    assert opened() is None
    assert "ppo: done already" in capsys.readouterr().out
    open_stage(tiny_recipe(), "evaluate", parents=("ppo",)).lock.close()


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("ppo.steps=5", "ppo.steps: 6 -> 5"),
        ("ppo.lam=0.9", "ppo.lam: 0.95 -> 0.9"),
        ("data.limit=9", "limit"),
    ],
)
def test_what_did_change_is_refused_under_the_present_key(inside, override, difference):
    old_folder()
    with pytest.raises(UserError, match=difference):
        opened(override)


def test_an_old_unfinished_stage_is_refused_with_what_to_do(inside):
    old_folder(finished=False)
    with pytest.raises(UserError) as caught:
        opened()
    message = str(caught.value)
    assert message.startswith("runs/tiny/ppo was begun by an earlier version")
    assert 'SET="name=..."' in message
    assert message.endswith("or remove runs/tiny/ppo to start again")


def test_an_old_folder_without_work_is_begun_anew(inside):
    old_folder(finished=False)
    (FOLDER / "policy.json").unlink()
    assert opened().folder == FOLDER


def test_a_section_that_is_not_valid_any_more_is_renamed_only():
    section = {"was_steps": 3, "gone": 1, "nobody_knows": 2}
    assert modernized({"ppo": section, "tax": None}) == {"ppo": {"steps": 3, "nobody_knows": 2}, "tax": None}
    assert modernized({"tax": {"lm_loss": {"was": 2}}}) == {"tax": {"lm_loss": {"x": 2}}}
    assert section["was_steps"] == 3
