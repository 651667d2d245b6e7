"""The study of policies that learn from people: its halves, units, equal sizes, scores and page."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, TINY, tiny_recipe
from safetensors.torch import load_file

from reward.model.model import RewardModelConfig, TextRewardModel, new_reward_model, save_reward_model
from reward.model.reward_func import as_reward_func
from rlhf.data.comparisons import Comparison, Counts, Message, prompt_key, write_native
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.models import prepare
from rlhf.recipe.load import load
from rlhf.runs.artifacts import WEIGHTS, write_jsonl
from rlhf.tokenization.dialogue import load_dialogue
from studies.engine.results import Results
from studies.engine.units import with_needs
from studies.people import __main__, report, trl_arms, units
from studies.people.plan import ARMS, Plan, check_variants, units_of


def settings(**more):
    plan = Plan(str(TINY), tuple(PROMPTS))
    return units_of(plan, load(TINY, PROMPTS))[0].settings | more


def test_a_study_has_two_reward_models_and_a_policy_an_arm_and_seed():
    plan = Plan(str(TINY), tuple(PROMPTS))
    found = with_needs(units_of(plan, load(TINY, PROMPTS)))
    assert [u.kind for u in found] == ["halves", "reward", "reward", *["policy"] * 15]
    assert {(u.settings["arm"], u.settings["seed"]) for u in found[3:]} == {
        (a, s) for a in ARMS for s in (0, 1, 2)
    }
    other = with_needs(units_of(plan, load(TINY, [*PROMPTS, "ppo.steps=7"])))
    assert not {u.key for u in found} & {u.key for u in other}  # another recipe, other units and runs
    assert units.run_name(found[0].settings, "all") != units.run_name(other[0].settings, "all")


@pytest.mark.parametrize(
    ("given", "arms"), [([], tuple(ARMS)), (["--arms", "dpo"], ("ppo", "dpo")), (["--arms"], ("ppo",))]
)
def test_a_study_of_some_arms_keeps_what_others_have_done(given, arms):
    plan = __main__.plan_of(__main__.arguments().parse_args(["--recipe", str(TINY), *given]))
    assert plan.arms == arms
    recipe = load(TINY, PROMPTS)
    every = units_of(Plan(plan.recipe), recipe)
    assert {u.key for u in units_of(plan, recipe)} == {u.key for u in every if u.settings["arm"] in arms}


def test_a_variant_is_an_arm_of_its_own(inside, monkeypatch):
    recipe, variant = load(TINY, PROMPTS), "ppo.kl_coef=0.1 ppo.steps=3"
    plain = Plan(str(TINY), tuple(PROMPTS), arms=("ppo",))
    both = Plan(str(TINY), tuple(PROMPTS), arms=("ppo",), variants=(variant,))
    check_variants(both)
    kept = {u.key for u in units_of(plain, recipe)}
    assert kept < {u.key for u in units_of(both, recipe)}  # what is done without variants stays done
    asked = []
    monkeypatch.setattr(units, "stages", lambda s, modules, overrides: asked.append(overrides))
    for unit in units_of(both, recipe)[:2]:
        with pytest.raises(FileNotFoundError):
            units.policy(unit.settings)
    names = [next(word for word in words if word.startswith("name=")) for words in asked]
    assert len(set(names)) == 2
    assert ["ppo.kl_coef=0.1" in words for words in asked] == ["-ppo-" not in name for name in names]


@pytest.mark.parametrize(
    ("variants", "line"),
    [
        (["reward.epochs=2"], "give options of PPO"),
        ([""], "give options of PPO"),
        (["ppo.reward_model=elsewhere"], "one reward model"),
        (["ppo.lam=0.9", "ppo.lam=0.9"], "twice"),
        (["ppo.kl_coeff=0.1"], "did you mean"),
    ],
)
def test_a_wrong_variant_is_told_before_anything_is_done(variants, line):
    with pytest.raises(UserError, match=line):
        check_variants(Plan(str(TINY), tuple(PROMPTS), variants=tuple(variants)))


def test_no_group_and_no_prompt_is_in_both_halves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        Comparison((Message("user", f"{i % 30} "),), ("a", "b"), (0, 1), "x", None, group)
        for i, group in ((i, f"g{i % 7}" if i % 2 else None) for i in range(120))
    ]

    def collect(s, modules, overrides):
        folder = Path("runs") / units.run_name(s, "all") / "comparisons"
        folder.mkdir(parents=True)
        write_native(folder / "train.jsonl", rows)

    monkeypatch.setattr(units, "stages", collect)
    s = settings()
    sizes = units.halves(s)
    train, test = (list(read_native(units.half_file(s, half), "stop", Counts())) for half in sizes)
    assert (len(train), len(test)) == (sizes["train"], sizes["test"])
    assert min(sizes.values()) > 20
    assert sorted(map(repr, train + test)) == sorted(map(repr, rows))
    keys = [{c.group or prompt_key(c.prompt) for c in part} for part in (train, test)]
    assert not keys[0] & keys[1]


def test_the_overrides_of_a_half_make_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = settings()
    for file in (units.half_file(s, "train"), Path("runs") / units.run_name(s, "all") / "comparisons/x"):
        file.parent.mkdir(parents=True, exist_ok=True)
    units.half_file(s, "train").write_text("")
    (Path("runs") / units.run_name(s, "all") / "comparisons/held_out_prompts.jsonl").write_text("")
    limited = s | {"overrides": [*s["overrides"], "data.limit=5"]}
    recipe = units.recipe_of(limited, *units.of_half(s | {"overrides": limited["overrides"]}, "train"))
    assert recipe.data.limit is None  # what a half holds has been drawn already
    assert recipe.data.comparisons == [str(units.half_file(s, "train"))]


def test_trl_has_as_many_responses_and_optimizer_steps_as_ppo():
    recipe = tiny_recipe()
    found = trl_arms.arguments(recipe, Path("x"))
    rollouts = found["max_steps"] / (found["steps_per_generation"] * found["num_iterations"])
    responses = rollouts * found["per_device_train_batch_size"] * found["steps_per_generation"]
    assert responses == recipe.ppo.steps * recipe.ppo.batch_size
    assert found["max_steps"] == recipe.ppo.steps * recipe.ppo.minibatches * recipe.ppo.epochs
    for _, config in trl_arms.TRAINERS.values():
        assert config(**found).generation_batch_size == recipe.ppo.batch_size


@pytest.mark.parametrize(("how", "cut"), [("ignore", 2.0), ("replace", -3.0), ("subtract", -1.0)])
def test_a_response_that_was_cut_scores_as_in_ppo(how, cut):
    recipe = tiny_recipe(f"ppo.missing_eos={how}", "ppo.missing_eos_penalty=3")

    class Ends:
        end_ids = (1,)

    reward = trl_arms.scored_as_ppo(lambda prompts, completions, **_: [2.0, 2.0], recipe.ppo, Ends())
    assert reward(["p", "p"], ["a", "b"], completion_ids=[[5, 1], [5, 6]]) == [2.0, cut]


# --- the reward model as a function ----------------------------------------------------------------------


def save_random_reward_model(recipe, folder):
    dialogue = load_dialogue(recipe)
    model = new_reward_model(recipe, dialogue)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    card = RewardModelConfig(recipe.model.path, 0.5, 1.0, dialogue.fingerprint(), "plain", 96, 8)
    save_reward_model(model, folder, card, dialogue)


@pytest.mark.parametrize("arm", ["trl_rloo", "trl_grpo"])
def test_trl_trains_on_fewer_prompts_than_a_step_has(arm, inside):
    from conftest import stage

    stage(prepare.main)
    recipe = tiny_recipe("ppo.steps=2", "ppo.batch_size=16", "ppo.micro_batch_size=8", "ppo.minibatches=2")
    save_random_reward_model(recipe, Path("saved"))
    prompts = [{"messages": [{"role": "user", "content": "one "}]}]
    Path("run/comparisons").mkdir(parents=True)
    write_jsonl(Path("run/comparisons/prompts.jsonl"), prompts)
    place = trl_arms.train(recipe, arm, Path("saved"), Path("run"))
    learned = [v for k, v in load_file(place / WEIGHTS).items() if "lora_B" in k]
    assert learned
    assert all(bool(v.any()) for v in learned)


def test_a_saved_reward_model_is_a_reward_func(inside):
    from conftest import stage

    stage(prepare.main)
    recipe, folder = tiny_recipe(), Path("saved")
    save_random_reward_model(recipe, folder)
    prompts, said = ["one ", "two "], ["ab", "c"]
    expected = TextRewardModel(folder).score([(Message("user", p),) for p in prompts], said).tolist()
    reward = as_reward_func(folder)
    assert reward(prompts=prompts, completions=said, completion_ids=[[3], [4]]) == pytest.approx(expected)
    assert expected[0] != pytest.approx(expected[1])
    turns = [[{"role": "user", "content": p}] for p in prompts]
    answers = [[{"role": "assistant", "content": text}] for text in said]
    assert reward(turns, answers) == pytest.approx(expected)
    assert isinstance(reward.__name__, str)


# --- the page --------------------------------------------------------------------------------------------


def figure(mean, half=0.1):
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": 9}


def test_an_interval_over_seeds_does_not_shrink_with_prompts_that_they_share():
    found = report.over_seeds([figure(1.0), figure(1.0), figure(1.0)])
    assert found["ci95"] == pytest.approx([0.9, 1.1])
    found = report.over_seeds([figure(0.0), figure(1.0), figure(2.0)])
    half = 4.302653 / 3**0.5  # Student's t, 2 degrees of freedom, deviation 1
    assert found["ci95"] == pytest.approx([1 - half, 1 + half], abs=1e-4)
    assert report.over_seeds([{"mean": None, "ci95": None, "n": 0}]) == {"mean": None, "ci95": None, "n": 0}


def summary(gain):
    paired = {"before": 0.0, "after": gain, "diff": gain, "ci95": [gain - 0.1, gain + 0.1], "n": 9}
    controlled = {
        "gain": figure(gain),
        "gain_at_equal_length": figure(gain / 2),
        "win_rate_at_equal_length": figure(0.6),
        "about_equal": {"gain": figure(gain / 4), "win_rate": figure(0.5), "pairs": 3},
    }
    row = {"n": 1, "kl_bound": 0.0, "length_controlled": controlled}
    return {
        "reward": paired, "judge": paired, "judge_win_rate": figure(0.7),
        "judge_length_controlled": controlled, "kl": figure(3.0),
        "response_length": paired | {"before": 20.0},
        "best_of_n": {"rows": [row, row | {"n": 2, "kl_bound": 0.193}]},
        "samples": [{"prompt": "p", "before": "b", "after": "a"}], "train_seconds": 100 + gain,
    }  # fmt: skip


def test_the_page_has_a_row_an_arm_with_its_figures():
    plan = Plan(str(TINY), tuple(PROMPTS), seeds=(0, 1), variants=("ppo.lam=0.9",))
    done = units_of(plan, load(TINY, PROMPTS))
    gains = {"ppo": 1.0, "rloo": 0.8, "ppo.lam=0.9": 1.2}
    results = Results(
        done, [{"result": summary(gains.get(u.settings["arm"], 0.0) + u.settings["seed"])} for u in done]
    )
    content = {
        "command": "c", "plan": {"seeds": [0, 1]}, "halves": {"train": 3, "test": 4},
        "reward_models": {"train": figure(0.6), "test": figure(0.7)},
        "arms": report.arms(results), "base_length": report.base_length(results),
        "against": report.against_ppo(results, plan.variants),
        "samples": summary(0.0)["samples"], "machine": {"cpu": "x", "cores": 2},
        "time": {"units": 2, "unit_seconds": 60, "jobs": 2},
    }  # fmt: skip
    page = report.page(json.loads(json.dumps(content)))
    rows = {cells[1].strip(): cells for cells in (x.split("|") for x in page.splitlines()) if len(cells) > 5}
    assert list(rows)[2:] == ["best of 2", *ARMS.values(), "PPO, `ppo.lam=0.9`"]
    assert "| PPO, `ppo.lam=0.9` | +0.200 [+0.200, +0.200] | +0.100 [+0.100, +0.100] | +0.00 " in page
    assert rows["PPO"][3].strip().startswith("+1.500 [")
    assert rows["PPO"][4].strip().startswith("+0.750 [")
    assert rows["RLOO"][3].strip().startswith("+1.300 [")
    assert rows["best of 2"][8].strip() == "at most 0.19"
    assert rows["PPO"][8].strip() == "3.00 [2.90, 3.10]"
    assert "over 2 seeds" in page
    one = {**content, "plan": {"seeds": [0]}, "base_length": {"mean": 62.75, "ci95": None, "n": 1}}
    alone = {"mean": 0.5, "ci95": None, "n": 1}
    one["against"] = [{**v, "figures": dict.fromkeys(v["figures"], alone)} for v in content["against"]]
    page = report.page(json.loads(json.dumps(one)))
    assert "in 62.8 tokens" in page
    assert "paired by seed; one seed, no interval." in page
    assert "| PPO, `ppo.lam=0.9` | +0.500 | +0.500 | +0.50 | 0.50 |" in page


def test_an_interval_of_a_win_rate_or_kl_over_seeds_stays_where_they_can_be():
    wins = [{"mean": m, "ci95": None, "n": 6} for m in (1.0, 0.9, 0.95)]
    found = report.over_seeds(wins, "judge_length_controlled.win_rate_at_equal_length")["ci95"]
    assert found == [pytest.approx(0.95 - 4.302653 * 0.05 / 3**0.5), 1.0]
    assert report.over_seeds([{"mean": m, "ci95": None, "n": 6} for m in (0.0, 0.2)], "kl")["ci95"][0] == 0.0
    assert report.over_seeds(wins, "judge.diff")["ci95"][1] > 1
