"""Online RLHF in rounds: what each round samples, learns from and holds out; stops, changes and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROMPTS, ROOT, TINY, tiny_recipe

from policy.rounds import plan
from policy.rounds.__main__ import main
from policy.rounds.run import check_apart, open_rounds, run_rounds, start
from rlhf.data.comparisons import Comparison, Counts, Message, prompt_key, write_native
from rlhf.data.readers import read_comparisons
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.rank.candidates import candidates
from rlhf.rank.store import Store, answer
from rlhf.recipe.load import load
from rlhf.runs.artifacts import MANIFEST, read_json, read_jsonl
from rlhf.runs.lock import locked
from studies.engine.stages import run_stage

SMALL = (
    "name=r",
    "rounds={number: 2, prompts: 16}",
    "data.held_out=0.4",
    "reward.epochs=1",
    "reward.probe=false",
    "ppo.steps=2",
    "evaluate.prompts=6",
)
ROWS = 16


def begun(*overrides, do=run_stage):
    recipe = tiny_recipe(*SMALL, *overrides)
    with open_rounds(recipe) as file:
        return run_rounds(recipe, recipe.rounds, file, do)


@pytest.fixture(scope="module")
def lab(road, tmp_path_factory):
    """A folder in which two rounds have run, uninterrupted. Do not change it."""
    folder = tmp_path_factory.mktemp("rounds")
    shutil.copytree(road / "models", folder / "models")
    before = os.getcwd()
    os.chdir(folder)
    try:
        begun()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def desk(lab, inside):
    """A copy of it as the current folder."""
    shutil.copytree(lab, inside, dirs_exist_ok=True)
    return inside


def comparisons(name, *parts):
    return [c for path in plan.stored(name, *parts) for c in read_native(path, "stop", Counts())]


def texts(found):
    return {(prompt_key(c.prompt), c.responses, c.ranks) for c in found}


# --- what a round does -----------------------------------------------------------------------------------


def test_each_round_learns_from_all_comparisons_so_far_and_none_that_was_held_out(desk):
    new = [texts(comparisons(f"r-round-{n}-new", "train", "held_out")) for n in (1, 2)]
    assert [len(part) for part in new] == [ROWS, ROWS]
    assert texts(comparisons("r-round-1", "train", "held_out")) == new[0]
    assert texts(comparisons("r-round-2", "train", "held_out")) == new[0] | new[1]
    asked = [{key for key, *_ in part} for part in new]
    assert not asked[0] & asked[1]  # other prompts in each round
    held = [{prompt_key(c.prompt) for c in comparisons(f"r-round-{n}", "held_out")} for n in (1, 2)]
    trained = {prompt_key(c.prompt) for c in comparisons("r-round-2", "train")}
    assert held[0] < held[1]
    assert not held[1] & trained
    prompts = [Path(plan.stored(f"r-round-{n}", "held_out_prompts")[0]).read_bytes() for n in (1, 2)]
    assert prompts[0] == prompts[1]


def test_the_newest_policies_write_and_each_policy_starts_from_the_base(desk):
    rows = read_jsonl(Path("runs/r-round-2-new/comparisons/sampled.jsonl"))
    assert {writer for row in rows for writer in row["writers"]} == {"base", "runs/r-round-1/ppo/policy"}
    assert not Path("runs/r-round-1-new/comparisons/sampled.jsonl").exists()  # the base alone
    for n in (1, 2):
        noted = read_json(Path(f"runs/r-round-{n}/ppo") / MANIFEST)["fingerprint"]
        assert noted["recipe"]["ppo"]["start"] is None
        assert noted["recipe"]["ppo"]["reward_model"] == []  # of its own run


def test_the_table_has_what_the_stages_found(desk):
    rounds = read_json(Path("runs/r/rounds.json"))["rounds"]
    for n, row in enumerate(rounds, 1):
        summary = read_json(Path(f"runs/r-round-{n}/evaluate/summary.json"))
        assert row["gain"]["mean"] == summary["gold"]["diff"]
        assert row["kl"] == summary["kl"]
        assert row["train"] == len(comparisons(f"r-round-{n}", "train"))
        card = read_json(Path(f"runs/r-round-{n}/card/card.json"))
        assert row["accuracy"]["after"] == card["accuracy"]["overall"]
    fresh = {prompt_key(c.prompt) for c in comparisons("r-round-2-new", "train", "held_out")}
    held = {prompt_key(c.prompt) for c in comparisons("r-round-2", "held_out")}
    rows = read_jsonl(Path("runs/r-round-2/card/scores.jsonl"))
    scored = {prompt_key(tuple(Message(**message) for message in row["prompt"])) for row in rows}
    assert scored == fresh & held  # neither reward model has learned from any of them
    assert card["against_model"]["path"] == "runs/r-round-1/reward/model"
    assert rounds[1]["accuracy"]["before"] == card["against"]["other_accuracy"]
    page = Path("runs/r/rounds.md").read_text()
    assert page.count("\n| ") == 4
    assert "gold score" in page


def test_the_next_rounds_go_on_from_the_finished_ones(lab, monkeypatch):
    monkeypatch.chdir(lab)
    asked = []
    recipe = tiny_recipe(*SMALL, "rounds.number=3")

    def stops(module, words):
        asked.append((module, next(w for w in words if w.startswith("name="))))
        if "round-3" in asked[-1][1]:
            raise KeyboardInterrupt
        before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.safetensors")}
        run_stage(module, words)
        assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.safetensors")} == before

    with open_rounds(recipe) as file, pytest.raises(KeyboardInterrupt):
        run_rounds(recipe, recipe.rounds, file, stops)
    assert asked[-1] == ("rlhf.collect", 'name="r-round-3-new"')


@pytest.mark.slow
def test_rounds_that_were_stopped_anywhere_end_as_if_they_had_not_been(road, lab, inside):
    shutil.copytree(road / "models", inside / "models")
    for at in (2, 9):
        calls = []

        def stops(module, words, at=at, calls=calls):
            calls.append(module)
            if len(calls) == at:
                raise KeyboardInterrupt
            run_stage(module, words)

        with pytest.raises(KeyboardInterrupt):
            begun(do=stops)
    begun()
    for file in ("rounds.json", "rounds.md"):
        assert Path("runs/r", file).read_bytes() == (lab / "runs/r" / file).read_bytes()
    for n in (1, 2):
        weights = f"runs/r-round-{n}/ppo/policy/adapter_model.safetensors"
        assert Path(weights).read_bytes() == (lab / weights).read_bytes()


# --- comparisons that are there already ------------------------------------------------------------------


def files(number, *overrides, ranked=("x.jsonl",)):
    recipe = tiny_recipe(*SMALL, f"data.comparisons={ROOT}/recipes/tiny/comparisons.jsonl", *overrides)
    words = plan.training(recipe, number, ranked)
    return recipe, dict(word.split("=", 1) for word in words)


def test_a_recipe_with_comparisons_begins_with_those_and_adds_to_them():
    recipe, first = files(1)
    assert "data.comparisons" not in first
    assert not plan.adds(recipe, 1)
    _, second = files(2)
    stored = [f"runs/r-round-1/comparisons/{part}.jsonl" for part in ("train", "held_out")]
    assert json.loads(second["data.comparisons"]) == [*stored, "x.jsonl"]
    _, apart = files(2, f"data.held_out_comparisons={ROOT}/recipes/tiny/comparisons.jsonl")
    assert json.loads(apart["data.comparisons"]) == [stored[0], "x.jsonl"]
    assert json.loads(apart["data.held_out_comparisons"]) == [stored[1]]
    words = dict(word.split("=", 1) for word in plan.sampling(recipe, recipe.rounds, 3))
    assert words["collect.skip"] == "16"  # the second round that samples
    assert json.loads(words["data.held_out_prompts"]) == ["runs/r-round-1/comparisons/held_out_prompts.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("tests", [False, True])
def test_rounds_over_comparisons_of_ones_own(tests, road, inside):
    """The first round reads them, the second one samples; test files of one's own stay what is held out."""
    shutil.copytree(road / "models", inside / "models")
    rows = read_comparisons([f"{ROOT}/recipes/tiny/comparisons.jsonl"], on_bad_rows="stop")[0]
    short = [c for c in rows if len(c.prompt) == 1 and len(c.prompt[0].content) < 60][:30]
    write_native(Path("own.jsonl"), short[6:])
    write_native(Path("tests.jsonl"), short[:6])
    own = ["data.comparisons=own.jsonl", "data.prompts=[]", "data.held_out_prompts=[]", "data.limit=20"]
    own += ["data.held_out_comparisons=tests.jsonl"] if tests else []
    one, two = begun(*own)
    assert (one.new, one.policies) == (0, [])
    assert (two.new, two.policies) == (ROWS, ["runs/r-round-1/ppo/policy", "base"])
    first, second = (texts(comparisons(f"r-round-{n}", "train", "held_out")) for n in (1, 2))
    assert second - first == texts(comparisons("r-round-2-new", "train", "held_out"))
    assert first < second
    assert len(first) == 20 + 6 * tests
    if tests:
        assert texts(comparisons("r-round-2", "held_out")) == texts(short[:6])
    prompts = [Path(plan.stored(f"r-round-{n}", "held_out_prompts")[0]).read_bytes() for n in (1, 2)]
    assert sorted(prompts[0].split(b"\n")) == sorted(prompts[1].split(b"\n"))


def test_the_newest_policies_come_first_and_the_base_is_the_oldest():
    recipe = tiny_recipe(*SMALL, "rounds.policies=3")
    names = [plan.policies(recipe, recipe.rounds, n) for n in (1, 2, 5)]
    assert names[:2] == [["base"], ["runs/r-round-1/ppo/policy", "base"]]
    assert names[2] == [f"runs/r-round-{n}/ppo/policy" for n in (4, 3, 2)]


# --- people ----------------------------------------------------------------------------------------------


def answered(number, of, skipped=()):
    """What people would have said to some of the candidates of a round."""
    items = candidates(load(f"runs/r/rounds/round-{number}.yaml"))
    store = Store(Path(f"runs/r-round-{number}-new/rank/comparisons.jsonl"))
    for place, item in list(enumerate(items))[of]:
        ranks = tuple(range(len(item.responses)))
        row = Comparison(item.prompt, item.responses, ranks, "people")
        store.append(answer(row, "Ada", item=item.id, skipped=place in skipped))


def test_rounds_wait_for_people_and_go_on_when_they_are_done(road, inside, capsys):
    shutil.copytree(road / "models", inside / "models")
    people = "rounds.ranked_by=people"
    said = "make rank RECIPE=runs/r/rounds/round-{}.yaml; then the same".format
    assert begun(people) == []
    assert f"round 1: people are to rank: {said(1)}" in capsys.readouterr().out
    assert begun(people) == []  # still
    items = candidates(load("runs/r/rounds/round-1.yaml"))  # as `make rank` samples them
    assert len(items) == ROWS
    assert begun(people) == []
    assert f"round 1: 0 of 16 prompts are ranked: {said(1)}" in capsys.readouterr().out
    answered(1, slice(0, 15))
    assert begun(people) == []
    assert f"round 1: 15 of 16 prompts are ranked: {said(1)}" in capsys.readouterr().out
    answered(1, slice(15, 16), skipped=[15])
    (row,) = begun(people)
    assert (row.new, row.train + len(comparisons("r-round-1", "held_out"))) == (15, 15)
    assert f"round 2: people are to rank: {said(2)}" in capsys.readouterr().out
    second = candidates(load("runs/r/rounds/round-2.yaml"))
    assert {w for item in second for w in item.writers} == {"base", "runs/r-round-1/ppo/policy"}
    assert not {prompt_key(x.prompt) for x in items} & {prompt_key(x.prompt) for x in second}
    assert Path("runs/r/rounds.md").read_text().count("\n| ") == 3


# --- what is refused -------------------------------------------------------------------------------------


def refused(*overrides):
    before, sys.argv = sys.argv, ["stage", str(TINY), *PROMPTS, *overrides]
    try:
        with pytest.raises(UserError) as caught:
            main()
    finally:
        sys.argv = before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_that_cannot_be_run_in_rounds_is_refused(road, inside):
    shutil.copytree(road, inside, dirs_exist_ok=True)
    assert "this recipe has no rounds section; add one" in refused()
    assert "remove ppo.reward_model" in refused(*SMALL, "ppo.reward_model=runs/tiny/reward/model")
    assert "rounds.number: Input should be greater than 0" in refused("rounds.number=0")
    assert "did you mean rounds.number?" in refused("rounds={nunber: 2}")
    assert not Path("runs/r").exists()


def test_another_recipe_under_the_same_name_and_a_second_start_are_refused(desk):
    assert "begun with another recipe (ppo.steps: 2 -> 3)" in refused(*SMALL, "ppo.steps=3")
    assert "(rounds.prompts: 16 -> 17)" in refused(*SMALL, "rounds.prompts=17")
    with locked(Path("runs/r/rounds")):
        assert "another process is running this" in refused(*SMALL)


def test_a_prompt_on_both_sides_is_refused(inside):
    recipe = tiny_recipe(*SMALL)

    def row(text):
        return Comparison((Message("user", text),), ("a", "b"), (0, 1), "test")

    for name, train, held in (("r-round-1", "one", "two"), ("r-round-2", "two", "one")):
        for part, text in (("train", train), ("held_out", held)):
            path = Path(plan.stored(name, part)[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_native(path, [row(text)])
    assert check_apart(recipe, 1) == {prompt_key(row("two").prompt)}
    with pytest.raises(UserError, match="2 prompts are held out in one round and trained on in another"):
        check_apart(recipe, 2)


# --- processes -------------------------------------------------------------------------------------------


def test_a_stage_that_fails_ends_the_rounds_with_its_status(inside, capfd):
    with pytest.raises(SystemExit) as end:
        start("rlhf.collect", ["none.yaml"])
    assert end.value.code == 2
    assert "none.yaml: no such recipe file" in capfd.readouterr().err


def test_a_stop_reaches_the_stage(road, inside):
    shutil.copytree(road / "models", inside / "models")
    command = [sys.executable, "-m", "policy.rounds", str(TINY), *PROMPTS, *SMALL]
    rounds = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = Path("runs/r-round-1-new/comparisons/.lock")
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    rounds.send_signal(signal.SIGTERM)
    said, _ = rounds.communicate(timeout=60)  # ends with the last process that holds the pipe
    assert rounds.returncode == 128 + signal.SIGTERM
    assert said.count("stopped by SIGTERM; run the same command again") == 1
