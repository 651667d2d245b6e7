"""The study of static against online comparisons: its units, figures and page."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import PROMPTS, TINY

from policy.rounds import plan as rounds
from rlhf.data.comparisons import Counts, prompt_key
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.recipe.load import load
from rlhf.runs.artifacts import read_json
from studies.engine.report import content
from studies.engine.results import Results
from studies.engine.units import with_needs
from studies.online import __main__, report, units
from studies.online.plan import Plan, units_of

SMALL = (
    *PROMPTS,
    *("reward.epochs=1", "reward.probe=false", "ppo.steps=2", "evaluate.prompts=6", "data.held_out=0.3"),
)


def of(*overrides, **more):
    plan = Plan(str(TINY), (*SMALL, *overrides), **more)
    return plan, units_of(plan, load(TINY, plan.overrides))


def test_both_arms_have_as_many_comparisons_in_every_seed():
    _, found = of(comparisons=48, rounds=3)
    assert [(u.settings["seed"], u.settings["arm"]) for u in found] == [
        (seed, arm) for seed in (0, 1, 2) for arm in ("static", "online")
    ]
    assert {u.settings["rounds"] * u.settings["prompts"] for u in found} == {48}
    assert {u.settings["rounds"] for u in found if u.settings["arm"] == "online"} == {3}
    assert [u.kind for u in with_needs(found)] == ["base", *["arm"] * 6]
    _, other = of("ppo.steps=3", comparisons=48)
    assert not {u.key for u in found} & {u.key for u in other}


def test_what_cannot_be_compared_is_refused():
    for more in ({"comparisons": 50}, {"rounds": 1}):
        with pytest.raises(UserError, match="must divide into --rounds"):
            of(**more)
    with pytest.raises(UserError, match="needs a gold lab"):
        of("evaluate.judge=reward")


@pytest.mark.slow
def test_the_first_round_is_a_part_of_the_static_comparisons(road, inside):
    shutil.copytree(road / "models", inside / "models")
    _, found = of(seeds=(0,), comparisons=24, rounds=2, fresh=8, noise=0.1)
    static, online = (u.settings for u in found)
    result = units.arm(online)
    assert len(result["rounds"]) == 2
    assert len(result["gold"]) == 6
    units.arm(static)
    name = "tiny-online-{content}-{arm}-{seed}-{rounds}-{prompts}".format
    parts = [
        {
            (prompt_key(c.prompt), c.responses, c.ranks)
            for path in rounds.stored(f"{name(**s)}-round-1-new", "train", "held_out")
            for c in read_native(path, "stop", Counts())
        }
        for s in (static, online)
    ]
    assert parts[1] < parts[0]
    assert len(parts[0]) == 2 * len(parts[1])
    for s, last in ((static, 1), (online, 2)):
        fresh = read_json(Path("runs") / f"{name(**s)}-fresh" / "card" / "card.json")
        assert fresh["model"]["path"] == f"runs/{name(**s)}-round-{last}/reward/model"
        made = read_json(Path("runs") / f"{name(**s)}-fresh" / "comparisons" / "manifest.json")["fingerprint"]
        assert made["recipe"]["collect"]["policies"] == [f"runs/{name(**s)}-round-{last}/ppo/policy"]


def result(gold, kl, accuracy):
    after = float(np.mean(gold))
    gain = {"before": 0.1, "after": after, "mean": after - 0.1, "ci95": [0, 1], "n": 3}
    figure = {"mean": kl, "ci95": None, "n": 3}
    row = {"gain": gain, "kl": figure}
    return {
        "rounds": [row],
        "gold": gold,
        "gain": gain,
        "kl": figure,
        "length": {"before": 8.0, "after": 8.0},
        "accuracy": {"mean": accuracy, "ci95": None, "n": 3},
    }


def test_the_verdict_is_on_the_gold_score_paired_by_prompt():
    plan, found = of(seeds=(0, 1, 2))
    better = [0.30, 0.32, 0.28]
    kept = []
    for unit in found:
        more = better[unit.settings["seed"]] if unit.settings["arm"] == "online" else 0.0
        gold = [0.1 + more, 0.9 + more, -0.5 + more]  # prompts differ far more than the arms
        kept.append({"result": result(gold, 5.0 if more else 10.0, 0.6), "seconds": 1.0, "cpu_seconds": 1.0})
    results = Results(found, kept)
    claim = report.claim(plan, results)
    estimate = claim.statements[0].estimate
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.high - estimate.low == pytest.approx(2 * 4.3027 * 0.02 / 3**0.5, rel=1e-3)
    assert claim.verdict == "SUPPORTED"
    rows = {row[0]: row[1:] for row in claim.rows}
    assert rows["KL, nats"][2].startswith("-5.00")
    page = report.page(content("online", {"seeds": [0, 1, 2]}, [claim], results, command="x", jobs=2))
    assert "## Claim 13." in page


def test_the_options_give_a_small_and_a_full_study():
    full = __main__.plan_of(__main__.arguments().parse_args([]))
    quick = __main__.plan_of(__main__.arguments().parse_args(["--quick", "--rounds", "4"]))
    assert (full.recipe, full.seeds, full.rounds, full.noise) == ("recipes/sentiment.yaml", (0, 1, 2), 3, 0.0)
    assert (quick.recipe, quick.seeds, quick.rounds) == ("recipes/tiny.yaml", (0,), 4)
