"""The units of the preference study as they run, and its claims on constructed results."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import slow_but

from studies.engine.plots import save
from studies.engine.report import content
from studies.engine.results import Results
from studies.engine.units import read_result, run, weights_path, with_needs
from studies.engine.verdicts import Verdict, above
from studies.preference import claims, plots, report
from studies.preference.measure import calibration, from_text, to_text
from studies.preference.plan import FULL, QUICK, units_of
from studies.preference.tables import mean_of, versus_gaps
from studies.preference.units import compute

SUPPORTED, CONTRADICTED, UNDECIDED = Verdict.SUPPORTED, Verdict.CONTRADICTED, Verdict.UNDECIDED
TINY = replace(
    QUICK, sizes=(1,), sentences=128, versus_pairs=64, versus_test=200, source_pairs=64, target_test=50
)  # seconds for a whole study of few steps, in which nothing is learned


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_the_units_of_a_plan_are_different_and_come_after_what_they_need(plan):
    everything = with_needs(units_of(plan))
    place = {unit.key: i for i, unit in enumerate(everything)}
    assert len(place) == len(everything) == len({u.name for u in everything})
    assert all(place[need.key] < place[unit.key] for unit in everything for need in unit.needs)
    minutes = sum(unit.cost for unit in everything) / 2 / 60  # two at a time
    assert minutes < {"full": 40, "quick": 3.5}[plan.name]


# units


def trained(some, folder):
    """The results of units, really trained."""
    run(some, folder, compute, say=lambda _: None)
    return Results.read(some, folder)


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory):
    """The claim-1 units of the tiny plan."""
    folder = tmp_path_factory.mktemp("study")
    made = [u for u in units_of(TINY) if u.kind == "versus" and u.settings["data"] == "ranked"]
    trained(made, folder)
    return made, folder


def test_a_unit_done_again_elsewhere_gives_the_same_result_and_weights(tiny_study, tmp_path):
    made, folder = tiny_study
    torch.manual_seed(99)
    trained(made[:1], tmp_path)
    lm = made[0].needs[0]
    for unit in (made[0], lm):
        assert read_result(unit, folder)["result"] == read_result(unit, tmp_path)["result"]
    assert weights_path(lm, folder).read_bytes() == weights_path(lm, tmp_path).read_bytes()


def test_a_model_trained_on_shuffled_labels_does_not_support_claim_1(tiny_study):
    made, folder = tiny_study
    longer = []
    for unit in made[:2]:
        labels = "shuffled" if unit.settings["arm"] == "pm" else "true"
        longer.append(replace(unit, settings={**unit.settings, "labels": labels, "pairs": 640, "test": 400}))
    found = trained(longer, folder).found
    relabeled = [replace(u, settings={**u.settings, "labels": "true"}) for u in longer]
    gap = mean_of(versus_gaps(Results(relabeled, found), "ranked", 1))
    assert above("", gap).verdict is not SUPPORTED
    assert abs(from_text(found[0]["result"]["credits"]["score"]).mean() - 0.5) < 0.15


@pytest.mark.parametrize("kind", slow_but(["pmp"], ["pmp", "finetune", "calibration", "sets"]))
def test_every_kind_of_unit_runs_and_starts_from_the_weights_it_needs(tiny_study, kind):
    _, folder = tiny_study
    small = replace(TINY, calibration_pairs=64, calibration_test=50, prompts=16, prompts_test=10)
    made = [
        u
        for u in with_needs(units_of(small))
        if u.kind == kind
        and u.settings.get("target", "shifted") == "shifted"
        and (kind != "finetune" or u.settings["pairs"] == 0 or u.settings["arm"] == "binary")
    ]
    found = trained(made, folder)
    if kind == "finetune":  # without a single pair the arms differ in their weights alone
        untouched = {arm: found.one(kind, arm=arm, pairs=0)["credit"] for arm in found.values(kind, "arm")}
        assert len(untouched) == 4
        assert len({untouched[arm] for arm in ("none", "ranked", "binary")}) == 3
    if kind == "sets":
        assert sorted(r["forwards_per_prompt"] for r in found.all(kind)) == [6, 30]


# what is measured


def test_calibration_finds_the_slope_the_labels_were_drawn_with():
    draw = np.random.default_rng(0)
    size = np.abs(draw.normal(size=40000)) * 2
    for slope in (0.5, 1.0, 2.0):
        sign = np.where(draw.random(40000) < 1 / (1 + np.exp(-slope * size)), 1.0, -1.0)
        found = calibration(sign * size)
        assert abs(found["slope"] - slope) < 4 * found["slope_error"] < 0.2
        assert (found["ece"] < 0.01) == (slope == 1.0)
        assert sum(b["pairs"] for b in found["bins"]) == 40000
    by_hand = calibration(np.array([0.1, -0.1, 2.5]))
    first, last = (1 / (1 + math.exp(-x)) for x in (0.1, 2.5))
    assert by_hand["ece"] == pytest.approx(abs(first - 0.5) * 2 / 3 + (1 - last) / 3)
    assert math.isnan(calibration(np.zeros(5))["slope"])


def test_credits_survive_the_file():
    credits = [0.0, 0.5, 1.0, 1.0]
    assert to_text(credits) == "0h11"
    assert from_text("0h11").tolist() == credits


# claims on constructed results


def share_right(share, n=400):
    """Credits of n pairs of which this share is right."""
    return to_text(np.arange(n) < round(share * n))


def made_up(unit, agrees):
    """What a unit found, made up; agrees: as the papers say, or the other way round."""
    s, sign = unit.settings, 1 if agrees else -1
    wiggle = 0.002 * s["seed"]
    if unit.kind == "lm":
        return dict.fromkeys(("matrix_weights", "non_embedding_parameters", "parameters"), s["layers"])
    if unit.kind == "versus":
        gap = {"ranked": 0.1 + 0.05 * s["layers"], "binary": 0.005}[s["data"]] + wiggle
        gap = gap if agrees else {"ranked": -gap, "binary": 0.4}[s["data"]]
        right = 0.5 if s["labels"] == "shuffled" else 0.6 + gap * (s["arm"] == "pm") - (not agrees) * 0.1
        names = ["score"] if s["arm"] == "pm" else ["sum", "mean", "sum less language model"]
        names += [f"perfect imitation, {x}" for x in ("sum", "mean")]
        return {"credits": {name: share_right(right - 0.1 * (name == "sum")) for name in names}}
    if unit.kind == "finetune":
        bonus = {"none": 0.0, "imitation": 0.02, "ranked": 0.15, "binary": 0.25}[s["arm"]]
        return {"credit": share_right(0.6 + sign * bonus / (1 if s["pairs"] <= 500 else 5) + wiggle)}
    if unit.kind == "calibration":
        slope = (1.02 if s["epochs"] == 1 else 0.7) if agrees else 1.5
        measured = {"slope": slope + wiggle, "slope_error": 0.02, "ece": 0.01, "loss": 0.5, "accuracy": 0.7}
        empty = {"pairs": 0, "promised": None, "observed": None}
        measured["bins"] = [empty, {"pairs": 9, "promised": 0.7, "observed": 0.6}]
        return {"model": measured, "known score": measured}
    if unit.kind == "sets":
        grouped = s["arm"] == "grouped"
        loss = 0.5 + (0 if grouped else sign * 0.05)
        losses = (np.linspace(loss - 0.1, loss + 0.1, 50) + wiggle).tolist()
        found = {"held_out_losses": losses, "training_loss": 0.4, "known_score_loss": 0.45}
        found["curve"] = [{"seen": 0.0, "loss": 0.7}, {"seen": 1.0, "loss": loss}]
        return found | {"forwards_per_prompt": 6.0 if grouped else 30.0}
    return {}


def constructed(*, agrees=True):
    """A plan and its results, made up."""
    plan = replace(FULL, small_sizes=(1,))
    everything = with_needs(units_of(plan))
    times = {"seconds": 1.0, "cpu_seconds": 1.0}
    return plan, Results(everything, [{"result": made_up(unit, agrees)} | times for unit in everything])


def test_results_as_the_papers_say_support_every_claim():
    _, results = constructed()
    made = claims.all_claims(results)
    assert [c.number for c in made] == [1, 2, 3, 4, 11, 12]
    assert {c.verdict for c in made} == {SUPPORTED}
    shrinks = made[2].statements[2]  # ranked: 0.15 above none with few pairs, 0.03 with most
    assert shrinks.text.startswith("ranked PMP less no PMP: with few pairs less with most")
    assert shrinks.estimate.mean == pytest.approx(0.12, abs=0.003)


def test_results_the_other_way_round_contradict_every_claim():
    _, results = constructed(agrees=False)
    made = claims.all_claims(results)
    assert {c.verdict for c in made} == {CONTRADICTED}


def test_one_seed_that_disagrees_leaves_claim_1_undecided():
    _, results = constructed()
    for unit, found in zip(results.units, results.found, strict=True):
        if unit.kind == "versus" and unit.settings["seed"] == 2 and unit.settings["arm"] == "pm":
            found["result"]["credits"]["score"] = share_right(0.5)
    first = claims.ranked_against_imitation(results)
    assert first.verdict is UNDECIDED
    assert [s.estimate.n for s in first.statements] == [3, 3, 3, 3]


def test_the_better_score_of_imitation_is_kept():
    _, results = constructed()
    gap = np.mean(versus_gaps(results, "ranked", 1))
    assert gap == pytest.approx(0.152, abs=0.003)  # 0.1 less than the sum's


def test_the_report_has_every_verdict_and_every_plot(tmp_path):
    plan, results = constructed()
    made = claims.all_claims(results)
    kept = content(
        "preference",
        {"seeds": plan.seeds, "sentences": 1},
        made,
        results,
        command="x --quick",
        jobs=1,
        short=report.short,
        models=report.models(results),
    )
    again = json.loads(json.dumps(kept, allow_nan=False))
    assert [c["verdict"] for c in again["claims"]] == ["SUPPORTED"] * 6
    assert again["time"]["units"] == len(results.units)
    assert "credits" not in json.dumps(again)
    page = report.page(again)
    for claim in made:
        assert f"## Claim {claim.number}. {claim.title}: SUPPORTED" in page
        assert all(statement.text in page for statement in claim.statements)
    assert "x --quick" in page
    files = save(plots.canvases(results), tmp_path)
    assert sorted(p.name for p in files) == sorted(name for name, _ in report.PLOTS.values())
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in files)
