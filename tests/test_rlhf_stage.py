"""A stage finds its parents, refuses what would mix two experiments, skips what is done, and is alone."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, one_of, tiny_recipe

from rlhf import NAME, __version__
from rlhf.errors import UserError
from rlhf.runs import artifacts, lock
from rlhf.runs import folder as stage_folder
from rlhf.runs.stage import differences, input_hashes, open_stage, recipe_of

FOLDER = Path("runs/tiny/comparisons")


def begin(*overrides, name="comparisons", **options):
    """Open a stage as a process of its own would, which gives the lock back when it ends."""
    run = open_stage(tiny_recipe(*overrides), name, **options)
    if run is not None and run.lock is not None:
        run.lock.close()
    return run


def begin_and_work(*overrides, name="comparisons", **options):
    """Open a stage and leave some work in it, unfinished."""
    run = begin(*overrides, name=name, **options)
    artifacts.write_atomically(run.folder / "parts" / "00000.json", "[]")
    return run


def finished(*overrides, name="comparisons", **options):
    run = begin(*overrides, name=name, **options)
    (run.folder / "train.jsonl").write_text("{}\n")
    run.finish({"train": 1})
    return json.loads((run.folder / "manifest.json").read_text())


def refusal(*overrides, **options):
    with pytest.raises(UserError) as caught:
        begin(*overrides, **options)
    return str(caught.value)


# --- parents ---------------------------------------------------------------------------------------------


def test_a_missing_parent_names_the_target_that_makes_it_and_writes_nothing(inside):
    message = refusal(name="reward", parents=("comparisons",))
    assert message.startswith("reward needs the comparisons stage, and runs/tiny/comparisons is not complete")
    assert "`make comparisons RECIPE=...`" in message
    assert list(inside.iterdir()) == []


def test_an_unfinished_parent_is_a_missing_parent(inside):
    begin_and_work()
    assert "`make comparisons RECIPE=...`" in refusal(name="reward", parents=("comparisons",))


def test_a_parent_made_with_another_shared_contract_is_refused(inside):
    finished()
    message = refusal("seed=1", name="reward", parents=("comparisons",))
    assert message.startswith("reward needs the comparisons stage of the same recipe")
    assert "(seed: 0 -> 1)" in message
    assert not (inside / "runs" / "tiny" / "reward").exists()
    assert begin("ppo.steps=9", name="reward", parents=("comparisons",)) is not None


def test_a_stage_notes_which_parent_it_was_made_from(inside):
    parent = finished()
    child = finished(name="reward", section="reward", parents=("comparisons",))
    assert child["parents"] == {"comparisons": parent["identity"]}


def test_a_parent_that_was_made_anew_is_noticed(inside):
    finished()
    finished(name="reward", parents=("comparisons",))
    (FOLDER / "train.jsonl").write_text("other\n")
    artifacts.write_manifest(FOLDER, json.loads((FOLDER / "manifest.json").read_text()))
    assert "the comparisons stage was run anew" in refusal(name="reward", parents=("comparisons",))


# --- done, and to be resumed -----------------------------------------------------------------------------


def test_a_finished_stage_is_skipped_and_left_as_it_is(inside, capsys):
    finished()
    assert capsys.readouterr().out == f"{NAME} {__version__}: comparisons: {FOLDER}\n"
    before = {p: p.stat().st_mtime_ns for p in FOLDER.iterdir() if p.name != ".lock"}
    assert begin() is None
    assert capsys.readouterr().out == f"{NAME} {__version__}: comparisons: done already ({FOLDER})\n"
    assert {p: p.stat().st_mtime_ns for p in FOLDER.iterdir() if p.name != ".lock"} == before


def test_the_resolved_recipe_is_in_the_folder_from_the_start(inside):
    begin("ppo.steps=3")
    assert recipe_of(FOLDER) == tiny_recipe("ppo.steps=3").model_dump(mode="json")
    assert yaml.safe_load((FOLDER / "recipe.yaml").read_text())["ppo"]["lam"] == 0.95


def test_an_unfinished_stage_is_opened_again_with_its_work(inside):
    begin_and_work()
    assert (begin().folder / "parts" / "00000.json").read_text() == "[]"


def test_finishing_drops_checkpoints_and_leaves_working_files_out_of_the_result(inside):
    run = begin_and_work()
    with run.checkpoints.writing(1) as folder:
        (folder / "x").write_text("x")
    (run.folder / "metrics.jsonl").write_text("{}\n")
    (run.folder / "clock.json").write_text('{"seconds": 1, "peak_bytes": 1}')
    run.finish({"figure": 3})
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert manifest["results"] == {"figure": 3}
    assert sorted(manifest["files"]) == ["fingerprint.json", "recipe.yaml"]
    assert not (run.folder / "checkpoints").exists()
    assert not (run.folder / "parts").exists()
    assert (run.folder / "metrics.jsonl").exists()


def test_the_same_stage_run_twice_has_the_same_identity(inside):
    first = finished()
    (inside / "runs").rename("elsewhere")
    time.sleep(0.01)
    second = finished()
    assert second["identity"] == first["identity"]
    assert second["seconds"] != first["seconds"]


def test_only_the_main_process_writes(inside, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = begin()
    run.note_clock()
    run.finish({})
    assert (run.is_main, run.lock) == (False, None)
    assert list(inside.iterdir()) == []


# --- changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [begin_and_work, finished])
@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("lora.rank=8", "lora.rank: 4 -> 8"),
        ("data.held_out=0.5", "data.held_out: 0.2 -> 0.5"),
        ("collect.noise=0.2", "collect.noise: 0.1 -> 0.2"),
    ],
)
def test_a_changed_recipe_is_refused_with_the_difference(inside, start, override, difference):
    start(section="collect")
    message = refusal(override, section="collect")
    assert message.startswith(f"{FOLDER} was {'begun' if start is begin_and_work else 'finished'} with ano")
    assert f"({difference})" in message
    assert 'SET="name=..."' in message


def test_many_differences_are_not_all_listed(inside):
    begin_and_work(section="collect")
    changed = ["seed=1", "lora.rank=8", "lora.alpha=9", "data.held_out=0.5", "collect.noise=0.2"]
    assert refusal(*changed, section="collect").count("->") == 4


def test_another_stages_section_may_change(inside):
    finished(section="collect")
    assert begin("ppo.steps=7", "reward.learning_rate=1e-5", section="collect") is None


@pytest.mark.parametrize("start", [begin_and_work, finished])
@pytest.mark.parametrize(
    ("section", "override"),
    [
        ("ppo", "ppo.micro_batch_size=2"),
        ("ppo", "ppo.checkpoint_every=1"),
        ("reward", "reward.checkpoint_every=1"),
        ("reward", "reward.tokens_per_micro_batch=200"),
        ("ppo", "model.gradient_checkpointing=true"),
    ],
)
def test_what_does_not_change_the_result_may_change(inside, start, section, override):
    start(name=section, section=section)
    run = begin(override, name=section, section=section)
    assert (run is None) is (start is finished)


@pytest.mark.parametrize("name", ["ppo", "evaluate"])
def test_offloading_with_one_process_is_no_offloading(inside, capsys, name):
    begin("distributed.offload_optimizer=cpu", name=name)
    assert ("warning: distributed: one process offloads nothing" in capsys.readouterr().out) is (
        name == "ppo"
    )
    begin(name=name)
    assert "warning" not in capsys.readouterr().out


def test_what_changes_the_result_by_rounding_and_saves_no_memory_may_not_change(inside):
    begin_and_work(name="reward", section="reward")
    message = refusal("reward.share_prompts=false", name="reward", section="reward")
    assert "reward.share_prompts: True -> False" in message


@pytest.mark.parametrize("start", [begin_and_work, finished])
def test_changed_data_is_refused_by_its_content_not_its_time(inside, start):
    data = inside / "c.jsonl"
    data.write_text("one\n")
    start(inputs=[str(data)])
    os.utime(data, (1, 1))
    begin(inputs=[str(data)])
    data.write_text("two\n")
    message = refusal(inputs=[str(data)])
    assert "data file c.jsonl: " in message


def test_a_mistake_is_mended_without_removing_a_folder_that_holds_no_work(inside):
    run = begin("seed=1")
    (run.folder / "metrics.jsonl").write_text("")
    assert begin("seed=2").folder == FOLDER
    assert recipe_of(FOLDER)["seed"] == 2
    assert artifacts.read_json(FOLDER / "fingerprint.json")["recipe"]["seed"] == 2


def test_every_input_file_counts_those_of_one_name_too(inside):
    for folder, text in (("a", "1"), ("b", "2"), ("b/c", "3")):
        (inside / folder).mkdir()
        (inside / folder / "train.jsonl").write_text(text)
    assert len(input_hashes(["a/train.jsonl", "b/train.jsonl", "hub:org/name"])) == 3
    assert len(input_hashes(["b/**/*.jsonl"])) == 2
    first = input_hashes(["a/train.jsonl", "b/train.jsonl"])
    (inside / "a" / "train.jsonl").write_text("4")
    assert input_hashes(["a/train.jsonl", "b/train.jsonl"]) != first


def test_data_that_moved_is_the_same_data(inside):
    for folder in ("a", "b"):
        (inside / folder).mkdir()
        (inside / folder / "c.jsonl").write_text("1")
    assert input_hashes(["a/c.jsonl"]) == input_hashes(["b/*.jsonl"])


def test_differences_are_found_at_any_depth_and_on_either_side():
    old = {"a": {"b": 1, "c": 2}, "d": [1], "gone": 0}
    new = {"a": {"b": 1, "c": 3}, "d": [1], "new": {"e": 1}}
    assert differences(old, new) == ["a.c: 2 -> 3", "gone: 0 -> None", "new: None -> {'e': 1}"]
    assert differences(old, old) == []
    server = {"url": "http://localhost:1/v1", "model": "m"}
    old, new = (
        {"ppo": {"rewards": [{"judge": server | change, "weight": 1.0}]}} for change in ({}, {"url": "u"})
    )
    assert differences(old, new) == []  # it moved
    other = {"ppo": {"rewards": [{"judge": server | {"model": "n"}, "weight": 2.0}]}}
    assert differences(old, other) == [
        "ppo.rewards.0.judge.model: 'm' -> 'n'",
        "ppo.rewards.0.weight: 1.0 -> 2.0",
    ]
    assert len(differences(old, {"ppo": {"rewards": []}})) == 1


def test_a_server_may_move_and_what_it_is_asked_may_not_change():
    def section(weight=1.0, **change):
        judge = {"url": "http://localhost:1/v1", "model": "m"} | change
        return {"ppo": {"rewards": [{"judge": judge, "weight": weight}]}}

    assert differences(section(), section(url="http://localhost:2/v1")) == []
    found = differences(section(), section(2.0, model="n"))
    assert found == ["ppo.rewards.0.judge.model: 'm' -> 'n'", "ppo.rewards.0.weight: 1.0 -> 2.0"]
    assert len(differences(section(), {"ppo": {"rewards": []}})) == 1


# --- one process at a time -------------------------------------------------------------------------------

HOLD = """
import sys
from conftest import tiny_recipe
from rlhf.runs.stage import open_stage
run = open_stage(tiny_recipe(), "comparisons")
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_on_the_same_stage_is_refused_until_the_first_ends(inside):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as other:
        assert f"comparisons: {FOLDER}" in other.stdout.readline()
        assert other.stdout.readline() == "open\n"
        message = refusal()
        begin(name="reward")  # another stage is free
        other.kill()  # as kill -9 does: the lock goes with the process
        other.wait(timeout=30)
    assert message.startswith(f"{FOLDER}: another process is running this stage")
    assert begin().folder == FOLDER


# --- the clock -------------------------------------------------------------------------------------------


def test_the_clock_adds_up_over_sessions(inside, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stage_folder.time, "monotonic", lambda: now[0])

    def session():
        run = begin()
        run.started = now[0]
        return run

    run = session()
    now[0] += 5
    run.note_clock()
    now[0] += 2
    run.note_clock()
    now[0] += 50  # lost: the process died before it noted them
    run = session()
    now[0] += 3
    assert run.clock()["seconds"] == 10
    run.finish({})
    assert json.loads((FOLDER / "manifest.json").read_text())["seconds"] == 10


def test_the_peak_of_memory_is_the_highest_of_all_sessions(inside, monkeypatch):
    for peak in (3.0, 9.0, 5.0):
        monkeypatch.setattr(stage_folder, "peak_bytes", lambda peak=peak: peak)
        begin().note_clock()
    assert begin().clock()["peak_bytes"] == 9.0


# --- several processes -----------------------------------------------------------------------------------


def place(monkeypatch, **variables):
    for name, value in {**one_of(2), **variables}.items():
        monkeypatch.setenv(name, value)


def test_a_process_that_does_not_see_the_first_one_s_folder_is_one_line(inside, monkeypatch):
    monkeypatch.setattr(lock, "SEEN_WITHIN", 0.2)
    place(monkeypatch, RANK="1")
    of_reward = {"name": "reward", "parents": ("comparisons",)}
    line = refusal(**of_reward)
    assert line == (
        f"process 1 on {platform.node()} does not see what the first process writes into {inside}/runs/tiny: "
        "run in a folder that all machines share"
    ), "and not that the parent is missing"
    with monkeypatch.context() as patch:
        patch.delenv("WORLD_SIZE")
        patch.setenv("RANK", "0")
        finished()
    assert f"does not see what the first process writes into {inside}/runs/tiny/reward:" in refusal(
        **of_reward
    )
    assert not Path("runs/tiny/reward").exists()
    place(monkeypatch)
    assert begin(**of_reward).is_main
    place(monkeypatch, RANK="1")
    assert not begin(**of_reward).is_main
    place(monkeypatch, RANK="1", MASTER_PORT="2")  # the lock is of an earlier start, as in a copied folder
    assert "does not see what the first process writes" in refusal(**of_reward)


def test_a_process_waits_until_the_first_one_has_opened_the_stage(inside, monkeypatch):
    place(monkeypatch, RANK="1")
    FOLDER.mkdir(parents=True)
    first = threading.Timer(0.3, lambda: (FOLDER / lock.FILE).write_text("2@1"))
    began = time.monotonic()
    first.start()
    lock.wait_for_first(FOLDER)
    assert time.monotonic() - began >= 0.3
