"""The gold comparison: what it asks for, its marks, its figures, its page; trl 1.12 is not trained here."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, TINY, tiny_recipe
from safetensors.torch import load_file, save_file

from benchmarks.gold import __main__ as gold
from benchmarks.gold import figures, marks, page, plan
from benchmarks.gold.sides import closed, judge, prompts_of, train_now, train_ours
from rlhf.collect.judges import JUDGES
from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import load
from rlhf.runs.artifacts import read_json
from rlhf.runs.dtype import settled

EOS, PAD = 1, 0


def test_an_open_response_gets_eos_and_a_closed_one_padding():
    ids = torch.tensor([[7, 8, 9, 9], [7, 8, EOS, PAD], [EOS, 8, 9, EOS]])
    assert closed(ids, 2, EOS, PAD)[:, -1].tolist() == [EOS, PAD, PAD]
    assert closed(ids, 2, EOS, PAD)[:, :-1].equal(ids)
    # an EOS of the prompt closes nothing
    assert closed(torch.tensor([[EOS, 8, 9, 9]]), 2, EOS, PAD)[0, -1] == EOS


def test_the_prompts_are_those_of_the_run(road):
    run = road / "runs" / "tiny"
    prompts = prompts_of(run, "held_out_prompts.jsonl")
    lines = (run / "comparisons" / "held_out_prompts.jsonl").read_text().splitlines()
    assert [p[-1].content for p in prompts] == [json.loads(x)["messages"][-1]["content"] for x in lines]


# ---------------------------------------------------------------- training and judging


def test_writing_an_adapter_takes_no_time_of_training(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(marks.time, "perf_counter", lambda: now[0])

    def save(folder):
        saved.append(folder.name)
        now[0] += 100

    saved, clock = [], marks.Marks(tmp_path, every=2, last=5)
    now[0] = 50.0  # loading
    clock.start()
    for _ in range(5):
        now[0] += 3
        clock.end_step(save)
    assert saved == ["step-2", "step-4", "step-5"]
    assert clock.done() == [{"step": n, "seconds": 3.0 * n} for n in (2, 4, 5)]
    with pytest.raises(RuntimeError, match="after 0 steps, not 2"):
        marks.Marks(tmp_path, 1, 2).done()


@pytest.fixture(scope="module")
def trained(road, tmp_path_factory):
    """Ours and both of the installed trl's sides, two steps each."""
    folder, run = tmp_path_factory.mktemp("gold"), road / "runs" / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(road)
        recipe = settled(tiny_recipe("ppo.steps=2"), run, measured=False)
        sides = {"ours": train_ours(recipe, run, folder / "ours", 1)}
        for side in ("rloo", "grpo"):
            sides[side] = train_now(recipe, run, folder / side, 1, side)
    return folder, sides


@pytest.mark.slow
def test_every_side_leaves_an_adapter_that_has_learned_at_every_mark(trained, road):
    folder, sides = trained
    for side, found in sides.items():
        assert [m["step"] for m in found["marks"]] == [1, 2]
        assert 0 < found["marks"][0]["seconds"] < found["marks"][1]["seconds"]
        files = [folder / side / f"step-{n}" / "adapter_model.safetensors" for n in (1, 2)]
        first, second = ({k: v for k, v in load_file(f).items() if "lora_B" in k} for f in files)
        assert all(bool(v.any()) for v in first.values())
        assert any(not first[name].equal(second[name]) for name in first)
    assert not (road / "runs" / "tiny" / "gold_ppo").exists()


@pytest.mark.slow
def test_all_are_judged_on_the_same_prompts_and_the_distance_is_from_the_reference(
    trained, road, tmp_path, monkeypatch
):
    monkeypatch.chdir(road)
    monkeypatch.setitem(JUDGES, "vader", lambda prompts, texts: [float(len(set(text))) for text in texts])
    folder, _ = trained
    far = tmp_path / "far"
    shutil.copytree(folder / "rloo" / "step-2", far)
    file = far / "adapter_model.safetensors"
    save_file({name: 30 * tensor for name, tensor in load_file(file).items()}, file)
    places = {"ours": folder / "ours" / "step-2", "grpo": folder / "grpo" / "step-2", "far": far}
    adapters = {"reference": None, **{k: str(v) for k, v in places.items()}, "again": None}
    run = road / "runs" / "tiny"
    found = judge(settled(tiny_recipe("evaluate.prompts=8"), run, measured=False), run, adapters)
    assert {len(values) for side in found.values() for values in side.values()} == {8}
    assert found["again"] == found["reference"]
    assert found["reference"]["kl"] == [0.0] * 8
    means = {name: abs(sum(side["kl"])) for name, side in found.items()}
    assert 0 < means["ours"] < means["far"] > means["grpo"] > 0
    assert found["far"]["gold"] != found["reference"]["gold"]


def test_theirs_has_as_many_samples_and_updates_as_ours():
    trl_now = pytest.importorskip("benchmarks.gold.trl_now")
    recipe = tiny_recipe()
    found, ppo = trl_now.arguments(recipe, Path("x")), recipe.ppo
    batch = found["per_device_train_batch_size"] * found["steps_per_generation"]
    assert batch == ppo.batch_size
    passes = found["steps_per_generation"] * found["num_iterations"]
    assert found["max_steps"] / passes == ppo.steps
    assert passes == ppo.minibatches * ppo.epochs
    assert batch % found["num_generations"] == 0
    assert found["beta"] == ppo.kl_coef


# ---------------------------------------------------------------- figures


def side(*at):
    """Marks of two prompts: seconds, gold."""
    return {
        "peak_bytes": 1,
        "marks": [
            {"step": n + 1, "seconds": s, "gold": [g, g], "kl": [2.0, 2.0], "length": [8.0, 8.0]}
            for n, (s, g) in enumerate(at)
        ],
    }


REFERENCE = {"gold": [0.0, 0.2], "kl": [0.0, 0.0], "length": [8.0, 8.0]}


def test_equal_time_is_that_of_the_first_to_end_and_nobody_is_read_after_it():
    record = {"reference": REFERENCE, "ours": side((5, 0.3), (10, 0.6)), "ppo": side((11, 0.5), (20, 0.9))}
    record["rloo"] = side((10, 0.4), (30, 1.0))
    found = figures.of_seed(record)
    assert found["ours"]["gold_at_time"] == pytest.approx(0.6)
    assert found["ppo"]["gold_at_time"] == pytest.approx(0.1)  # not begun: the reference
    assert found["rloo"]["gold_at_time"] == pytest.approx(0.4)
    assert [found[name]["seconds_to_gain"] for name in found] == [10, 11, 30]
    assert found["ours"]["gold_per_nat"] == pytest.approx((0.6 - 0.1) / 2)
    assert figures.seconds_to(side((5, 0.49)), REFERENCE) is None


def test_an_interval_over_three_seeds_is_students():
    found = figures.over_seeds([0.0, 1.0, 2.0])
    half = 4.302653 / 3**0.5
    assert found["ci95"] == pytest.approx([1 - half, 1 + half], abs=1e-5)
    assert figures.over_seeds([1.0])["ci95"] is None
    assert figures.over_seeds([1.0, None])["mean"] is None


@pytest.mark.parametrize(
    ("seeds", "prompts", "word"),
    [
        ([0.1, 0.3], [0.05, 0.4], "higher"),
        ([-0.3, -0.1], None, "lower"),
        ([-0.1, 0.3], [0.05, 0.4], "undecided"),
        ([0.1, 0.3], [-0.05, 0.4], "undecided"),
        (None, [0.05, 0.4], "undecided (one seed)"),
    ],
)
def test_what_is_not_shown_by_seeds_and_by_prompts_is_undecided(seeds, prompts, word):
    by_prompt = None if prompts is None else {"ci95": prompts}
    assert figures.verdict({"ci95": seeds}, by_prompt) == word


def test_differences_are_paired_by_seed_and_by_prompt():
    low = {"reference": REFERENCE, "ours": side((1, 0.5)), "ppo": side((1, 0.4))}
    high = {"reference": REFERENCE, "ours": side((1, 0.9)), "ppo": side((1, 0.6))}
    found = figures.compared({"0": low, "1": high})["differences"]["ppo"]["gold"]
    assert found["by_seed"]["by_seed"] == pytest.approx([0.1, 0.3])
    assert found["by_prompt"]["n"] == 4
    assert found["by_prompt"]["mean"] == pytest.approx(0.2)


# ---------------------------------------------------------------- the command

STAND_IN = """
import json, pathlib, sys
kind, task, result = sys.argv[1:]
task = json.loads(pathlib.Path(task).read_text())
with open("asked", "a") as file:
    file.write(" ".join([kind, *(w for w in task["overrides"] if w.startswith("ppo."))]) + "\\n")
if kind == "judge":
    found = {name: {"gold": [0.1, 0.5], "kl": [1.0, 2.0], "length": [8.0, 8.0]} for name in task["adapters"]}
else:
    found = {"marks": [{"step": 2, "seconds": 10.0}, {"step": 4, "seconds": 21.0}], "peak_bytes": 1}
pathlib.Path(result).write_text(json.dumps(found))
"""


def test_a_stage_that_refuses_says_so_in_the_only_error_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["benchmarks.gold", str(TINY), *PROMPTS, "data.comparisons=no.jsonl", "--peers", "rloo"]
    monkeypatch.setattr(gold, "check", lambda recipe: None)
    monkeypatch.setattr(gold, "load", lambda path, some: load(TINY, PROMPTS))
    monkeypatch.setattr(sys, "argv", [*words, "--output", "out"])
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(gold.main)
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == 2
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "no file matches no.jsonl" in lines[-1]


def test_the_page_tells_all_sides_holds_no_path_and_nothing_is_done_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "child.py").write_text(STAND_IN)
    stages = []

    def run(seeds):
        return gold.compare(
            str(TINY), PROMPTS, seeds, plan.PEERS,
            child=[sys.executable, "-S", str(tmp_path / "child.py")],
            peer=lambda: Path("/p"), stage=lambda *call: stages.append(call), output=tmp_path,
            words=[str(TINY), "--seeds", "0"],
        )  # fmt: skip

    report = run([0])
    text = (tmp_path / "gold.md").read_text()
    asked = Path("asked").read_text().split()
    assert asked == ["ours", "theirs", "rloo", "grpo", "judge"]
    assert "+0.4 gold" in text
    assert all(label in text for label in page.LABELS.values())
    assert "undecided (one seed)" in text
    assert report["work"]["responses"] == 6 * 16
    assert str(tmp_path) not in text + json.dumps(report)
    assert str(TINY.parent) not in text + json.dumps(report)
    assert page.markdown(read_json(tmp_path / "gold.json")) == text
    assert [module for module, _ in stages] == list(gold.STAGES)
    assert "name=tiny-gold-0" in stages[0][1]
    run([0, 1])  # a second seed: its sides alone, in another order
    assert Path("asked").read_text().split()[5:] == ["theirs", "rloo", "grpo", "ours", "judge"]


def test_a_variant_is_ours_once_more_with_its_options_on_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "child.py").write_text(STAND_IN)
    command = ["gold", str(TINY), *PROMPTS, "--seeds", "0", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--variant", "ppo.kl_coef=0.5 ppo.lam=1"])
    monkeypatch.setattr(gold, "CHILD", [sys.executable, "-S", str(tmp_path / "child.py")])
    monkeypatch.setattr(gold.compare, "__kwdefaults__", gold.compare.__kwdefaults__ | {
        "child": gold.CHILD, "stage": lambda *_: None})  # fmt: skip
    gold.main()
    lines = Path("asked").read_text().splitlines()
    assert lines == ["ours", "ours ppo.kl_coef=0.5 ppo.lam=1", "judge"]  # no peer, unless named
    report = read_json(tmp_path / "gold_settings.json")
    assert list(report["differences"]) == ["ppo.kl_coef=0.5 ppo.lam=1"]
    assert "ppo.kl_coef=0.5 ppo.lam=1" in (page := (tmp_path / "gold_settings.md").read_text())
    assert "trl" not in page.splitlines()[0]
    assert "PPOTrainer" not in page
    gold.main()
    assert Path("asked").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["collect.noise=0"], "give options of PPO"),
        (["ppo.kl_coef"], "give options of PPO"),
        ([" "], "give options of PPO"),
        (["ppo.kl_coeff=1"], "kl_coef"),
        (["ppo.lam=1", "ppo.lam=1"], "stands twice"),
        (["ppo.steps=2"], "ppo.steps is .* on all sides"),
        (["ppo.kl_coef=1 ppo.batch_size=8"], "ppo.batch_size is .* on all sides"),
        (["ppo.ensemble=minimum"], "ppo.ensemble=minimum is of several reward models, and there is one"),
        (["ppo.ema_decay=0.9"], "ppo.ema_decay does not go with marks"),
        (["ppo.max_kl=0.1"], "ppo.max_kl does not go with marks"),
    ],
)
def test_a_variant_that_is_none_is_told(variants, message):
    with pytest.raises(UserError, match=message):
        plan.check_variants(str(TINY), PROMPTS, variants)


def test_a_variant_combines_the_reward_models_as_all_sides_do():
    with pytest.raises(UserError, match=r"ppo.ensemble is 'mean' on all sides"):
        plan.check_variants(str(TINY), [*PROMPTS, "reward.members=2"], ["ppo.ensemble=minimum"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.judge=reward", "gold judge"),
        ("ppo.kl_controller=adaptive", "ppo.kl_controller"),
        ("ppo.missing_eos=replace", "ppo.missing_eos"),
        ("ppo.batch_size=18", "no multiple of 4"),
    ],
)
def test_what_theirs_does_not_have_is_told(override, message):
    more = ["ppo.micro_batch_size=3"] if "batch_size" in override else []
    with pytest.raises(UserError, match=message):
        plan.check(tiny_recipe(override, *more))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no recipe given"),
        (("x.yaml", "--every", "0"), "at least one step apart"),
        (("x.yaml", "--quick"), "--quick has a recipe of its own; leave out x.yaml"),
        (("x.yaml", "--seeds", "1", "1"), "a seed stands twice"),
        ((str(TINY), *PROMPTS, "--seeds", "-3"), "seed: Input should be"),
        ((str(TINY), *PROMPTS, "--output", "/dev/null/nope"), "--output: /dev/null/nope cannot be made"),
    ],
)
def test_a_command_that_asks_for_nothing_is_told(monkeypatch, words, message):
    monkeypatch.setattr("sys.argv", ["gold", *words])
    with pytest.raises(UserError, match=message):
        gold.main()
