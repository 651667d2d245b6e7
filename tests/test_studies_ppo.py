"""The study of what optimization does to a reward: its fits, figures and units."""

import dataclasses
import math

import numpy as np
import pytest

from rlhf.stats.intervals import Estimate, student95
from studies.engine.report import content
from studies.engine.results import Results
from studies.engine.units import run, with_needs
from studies.ppo import __main__, claims, fits, plots, report
from studies.ppo.curves import Curves
from studies.ppo.plan import ARMS, QUICK, Plan, units_of
from studies.ppo.units import compute

D = np.linspace(0.5, 4, 12)


def test_the_fits_find_the_laws_that_made_the_points():
    bon = fits.fit_bon(D, D * (1.0 - 0.2 * D))
    assert (bon.alpha, bon.beta, bon.peak) == pytest.approx((1.0, 0.2, 2.5))
    rl = fits.fit_rl(D, D * (1.0 - 0.7 * np.log(D)))
    assert (rl.alpha, rl.beta, rl.peak) == pytest.approx((1.0, 0.7, math.exp(1 / 0.7 - 1)))
    fine = np.linspace(0.01, 4, 4000)  # each peak is where the curve is highest
    assert fine[(fine * (1.0 - 0.7 * np.log(fine))).argmax()] == pytest.approx(rl.peak, abs=2e-3)
    assert math.isnan(fits.fit_bon(D, D * (1.0 + 0.2 * D)).peak)


def test_a_second_parameter_has_to_be_worth_it():
    noise = np.random.default_rng(0).normal(0, 0.05, len(D))
    assert fits.fit_bon(D, D * (1.0 - 0.2 * D) + noise).aic_gain > 0
    assert fits.fit_bon(D, D + 0.01 * np.cos(9 * D)).aic_gain < 0


def test_aic_is_that_of_the_gaussian_likelihood():
    r = np.array([0.3, -0.1, 0.2, -0.4, 0.1, 0.05, -0.2, 0.15])
    n, variance = len(r), float(np.mean(r**2))
    log_likelihood = -0.5 * n * (math.log(2 * math.pi * variance) + 1)
    constant = n * (math.log(2 * math.pi) + 1)  # the same for all models
    for parameters in (1, 2):
        k = parameters + 1
        expected = -2 * log_likelihood + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        assert fits.aic(r, parameters) + constant == pytest.approx(expected)


def test_a_curve_is_read_at_a_given_kl():
    kl, gold = [0.0, 2.0, 1.0, 4.0], [0.0, 1.0, 1.0, 2.0]
    assert fits.at_kl(kl, gold, 1.0) == pytest.approx(0.5)
    assert fits.at_kl(kl, gold, 3.0) == pytest.approx(1.5)
    assert math.isnan(fits.at_kl(kl, gold, 5.0))
    assert fits.smooth([0.0, 3.0, 6.0, 0.0, 0.0], 3) == pytest.approx([1.5, 3.0, 3.0, 2.0, 0.0])
    assert fits.r_squared([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)


def test_the_needed_seeds_are_the_fewest_whose_interval_leaves_the_bound_out():
    deviation, mean = 1.0, 0.5
    half = student95(2) * deviation / math.sqrt(3)
    n = fits.seeds_needed(Estimate(mean, mean - half, mean + half, 3), 0.0)
    assert (
        student95(n - 1) * deviation / math.sqrt(n) < mean < student95(n - 2) * deviation / math.sqrt(n - 1)
    )
    assert fits.seeds_needed(Estimate(0.0, -half, half, 3), 0.0) is None
    assert fits.seeds_needed(Estimate(0.5, math.nan, math.nan, 1), 0.0) is None


def test_every_arm_changes_one_unit_and_shares_the_rest():
    units = with_needs(units_of(Plan()))
    policies = [u for u in units if u.kind == "policy"]
    assert len({u.key for u in policies}) == 3 * len(ARMS)
    assert len([u for u in units if u.kind == "rung"]) == 3 * 3  # two sizes, and one whose stories end
    assert len([u for u in units if u.kind == "reward"]) == 3 * (9 + 2)  # two more members of the average
    assert {u.settings["arm"] for u in policies if u.settings["closed"]} == {"closed", "EOS trick"}
    watched = {u.settings["arm"] for u in policies if len(u.needs) == 4}
    assert watched == {"free small 1", "free large 1"}


def _result(unit, seed):
    """What a unit might have left, with known shapes of the curves."""
    if unit.kind == "policy":
        t = np.linspace(0, 1, 30)
        kl = 9 * t
        weak = "0" in unit.settings["arm"] and "free" in unit.settings["arm"]
        gold = np.sqrt(kl) * (0.3 - (0.2 if weak else 0.05) * np.log(np.sqrt(kl) + 1e-9)) + 0.01 * seed
        other = {"proxy": np.sqrt(kl), "test": np.sqrt(kl) - t, "explained_variance": 0 * t, "eos": 0 * t + 1}
        steps = {"kl": kl, "gold": gold, "distinct_2": t, **other}
        size = len(unit.settings["arm"])
        ends = {"forward_kl": 1.0 + size, "reverse_kl": 7.0 * size % 5, "loop_seconds": 1.0}
        tax = 0.1 * ends["forward_kl"]
        return {"steps": {k: [float(x) for x in v] for k, v in steps.items()}, "tax": tax, **ends}
    if unit.kind == "best":
        kl = [math.log(n) - (n - 1) / n for n in (2**k for k in range(11))]
        gain = [d * (0.3 - 0.05 * d) + 0.001 * math.cos(40 * d + seed) for d in map(math.sqrt, kl)]
        proxies = {name: {"gold": gain, "proxy": gain} for name in unit.settings["proxies"]}
        return {"n": [2**k for k in range(11)], "kl": kl, **proxies}
    share = {"mean": 0.7, "ci95": None, "n": 9}
    return {"gold": 0.0, "labels_right": 0.8, "accuracy": share, "train_accuracy": share}


def test_known_curves_get_their_verdicts():
    units = with_needs(units_of(Plan()))
    found = [{"result": _result(u, u.settings["seed"]), "seconds": 1.0, "cpu_seconds": 1.0} for u in units]
    made = {claim.number: claim for claim in claims.all_claims(Curves(Results(units, found)))}
    assert sorted(made) == [7, 8, 9, 10, 17, 18, 22, 23]
    verdicts = {n: [str(s.verdict) for s in c.statements] for n, c in made.items()}
    assert verdicts[8] == ["SUPPORTED"] * 4 + ["UNDECIDED"]  # both sizes have the same curves
    assert verdicts[9][0] == "SUPPORTED"  # the weak proxy turns over
    assert verdicts[9][3:] == ["SUPPORTED"] * 2  # both laws bend
    assert verdicts[10] == ["SUPPORTED"] * 4  # the same curve at every price
    assert verdicts[17] == ["SUPPORTED"] * 2
    assert verdicts[22] == ["SUPPORTED"]
    assert any("more than 200 seeds" in note for note in made[8].notes)


@pytest.mark.parametrize("arms", [QUICK.arms, ("ppo", "rloo", "EOS trick")])
def test_claims_and_plots_do_with_the_arms_there_are(arms):
    units = with_needs(units_of(dataclasses.replace(QUICK, arms=arms)))
    found = [{"result": _result(u, u.settings["seed"]), "seconds": 1.0, "cpu_seconds": 1.0} for u in units]
    curves = Curves(Results(units, found))
    rows = {row[0]: row for claim in claims.all_claims(curves) if claim.number == 18 for row in claim.rows}
    assert bool(rows["EOS trick"][3]) == ("closed" in arms)  # beside its own world, not beside `ppo`


def test_the_quick_study_is_a_small_one(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ppo", "--quick", "--seeds", "5"])
    plan = __main__.plan_of(__main__.arguments().parse_args())
    assert (plan.seeds, plan.arms, plan.steps) == ((5,), QUICK.arms, QUICK.steps)


@pytest.mark.slow
def test_a_tiny_study_goes_all_the_way(tmp_path):
    arms = ("free small 0", "free small 1", "value from the reward model", "rloo", "dpo", "closed")
    arms = (*arms, "averaged reward models")
    sizes = {"tokens": 4_000, "data": (12, 16, 20), "reward_epochs": (1, 1, 1), "held_out": 8, "prompts": 16}
    loop = {"steps": 3, "responses": 8, "response_tokens": 8, "lessons": 4, "samples": 8, "best_prompts": 2}
    plan = Plan(seeds=(0,), vocabulary=300, rank=2, arms=arms, **sizes, **loop)
    units = with_needs(units_of(plan))
    assert [u.kind for u in units].count("rung") == 2  # stories that end, and that do not
    assert [u.kind for u in units].count("reward") == 7  # four, one with a test model, two more of an average
    lines = []
    run(units, tmp_path, compute, say=lines.append)
    curves = Curves(Results.read(units, tmp_path))
    free, watched, from_reward, _, preferred, closed, averaged = (curves.runs(arm)[0] for arm in arms)
    assert free["steps"]["kl"][0] == pytest.approx(0, abs=1e-4)
    assert len(free["steps"]["gold"]) == 3
    assert free["steps"]["test"] == [None] * 3
    assert None not in watched["steps"]["test"]
    assert from_reward["steps"]["explained_variance"] != free["steps"]["explained_variance"]
    assert preferred["steps"]["gold"] == [pytest.approx(preferred["gold"], abs=1e-5)]
    assert preferred["forward_kl"] != 0  # it has moved
    assert min(free["steps"]["length"]) == 8  # the full length of every response
    assert closed["steps"]["proxy"] != watched["steps"]["proxy"]  # another world
    assert averaged["steps"]["proxy"][0] != from_reward["steps"]["proxy"][0]  # of the same responses
    best = curves.results.one("best")
    assert best["n"] == [1, 2, 4, 8]
    assert best["small 0"]["proxy"] == sorted(best["small 0"]["proxy"])  # the proxy chooses by itself
    run(units, tmp_path, compute, say=lines.append)
    assert lines[-1] == f"{len(units)} units, {len(units)} of them done before"
    made = claims.all_claims(curves)
    more = {"reward_models": report.reward_models(curves), "labels_right": "", "base": ""}
    kept = content(
        "ppo", {"seeds": [0], **dataclasses.asdict(plan)}, made, curves.results, command="", jobs=1, **more
    )
    page = report.page(kept)
    for number in (7, 8, 9, 22):
        assert f"## Claim {number}." in page
    for name in plots.canvases(curves, [c.number for c in made]):
        assert f"({name})" in page


@pytest.mark.parametrize("fit", [fits.fit_bon, fits.fit_rl])
def test_a_curve_that_bends_upwards_is_no_turning_over(fit):
    d = np.linspace(0.5, 4, 20)
    upwards = fit(d, 0.2 * d**2 + 0.05 * d)
    assert (upwards.beta, upwards.peak) == (0.0, pytest.approx(math.nan, nan_ok=True))
    assert upwards.aic_gain < 0
    assert upwards.alpha == pytest.approx(float(d @ (0.2 * d**2 + 0.05 * d) / (d @ d)))
