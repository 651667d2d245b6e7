import importlib.util
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.errors import UserError
from rlhf.stats.intervals import Estimate
from studies.preference import __main__ as command
from studies.preference import claims, report, units, work
from studies.preference.measure import (
    SeedMean,
    calibration,
    combine,
    from_text,
    over_seeds,
    slope_weights,
    to_text,
)
from studies.preference.plan import FULL, QUICK, units_of
from studies.preference.results import Results, versus_gaps
from studies.preference.verdicts import Verdict, above, below, inside, together
from studies.preference.work import Unit

SUPPORTED, CONTRADICTED, UNDECIDED = Verdict.SUPPORTED, Verdict.CONTRADICTED, Verdict.UNDECIDED
TINY = replace(
    QUICK, sizes=(1,), sentences=128, versus_pairs=64, versus_test=200, source_pairs=64, target_test=50
)  # seconds for a whole study of few steps, in which nothing is learned


# units and the work folder


class Recorder:
    """Does units by writing down that they were done."""

    def __init__(self, fail_at=None):
        self.done = []
        self.fail_at = fail_at

    def __call__(self, unit, folder):
        if len(self.done) == self.fail_at:
            raise KeyboardInterrupt
        assert all(work.is_done(need, folder) for need in unit.needs)
        self.done.append(unit.name)
        work.write_result(unit, folder, {"value": 1}, 0.0, 0.0)


def chain(rate=1.0):
    first = Unit("lm", {"seed": 0, "rate": rate}, cost=2.0)
    return [Unit("versus", {"seed": 0, "arm": arm}, (first,), cost=1.0) for arm in ("pm", "il")]


def test_a_stopped_study_goes_on_and_a_finished_one_does_nothing(tmp_path):
    stopped, second, third = Recorder(fail_at=2), Recorder(), Recorder()
    with pytest.raises(KeyboardInterrupt):
        work.run(chain(), tmp_path, stopped, say=lambda _: None)
    said = []
    work.run(chain(), tmp_path, second, say=said.append)
    work.run(chain(), tmp_path, third, say=lambda _: None)
    assert stopped.done == ["lm seed=0", "versus seed=0 arm=pm"]
    assert second.done == ["versus seed=0 arm=il"]
    assert third.done == []
    assert said[0] == "3 units, 2 of them done before"
    assert said[1].startswith("[3/3] versus seed=0 arm=il: 0 s, 0 min left")


def test_a_changed_setting_is_another_unit_also_for_those_that_need_it(tmp_path):
    work.run(chain(), tmp_path, Recorder(), say=lambda _: None)
    again = Recorder()
    work.run(chain(rate=2.0), tmp_path, again, say=lambda _: None)
    assert len(again.done) == 3
    before, after = chain(), chain(rate=2.0)
    assert before[0].key != after[0].key
    assert replace(before[0], cost=9.0).key == before[0].key
    assert replace(before[0], kind="finetune").key != before[0].key


def test_a_damaged_result_or_missing_weights_are_made_again(tmp_path):
    units_made = chain()
    work.run(units_made, tmp_path, Recorder(), say=lambda _: None)
    path = work.result_path(units_made[0], tmp_path)
    path.write_text(path.read_text()[:40])
    first = units_made[0].needs[0]
    work.weights_path(first, tmp_path).touch()
    work.write_result(first, tmp_path, {}, 0.0, 0.0)
    assert work.is_done(first, tmp_path)
    work.weights_path(first, tmp_path).unlink()
    again = Recorder()
    work.run(units_made, tmp_path, again, say=lambda _: None)
    assert again.done == ["lm seed=0", "versus seed=0 arm=pm"]


def test_several_at_a_time_do_the_same_and_stop_at_an_error(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        recorder = Recorder()
        work.run(units_of(TINY), tmp_path, recorder, say=lambda _: None, pool=pool, jobs=2)
        assert len(recorder.done) == len(work.with_needs(units_of(TINY)))
        with pytest.raises(KeyboardInterrupt):
            work.run(chain(), tmp_path, Recorder(fail_at=1), say=lambda _: None, pool=pool, jobs=2)


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_the_units_of_a_plan_are_different_and_come_after_what_they_need(plan):
    everything = work.with_needs(units_of(plan))
    place = {unit.key: i for i, unit in enumerate(everything)}
    assert len(place) == len(everything) == len({u.name for u in everything})
    assert all(place[need.key] < place[unit.key] for unit in everything for need in unit.needs)
    minutes = sum(unit.cost for unit in everything) / 2 / 60  # two at a time
    assert minutes < {"full": 40, "quick": 3.5}[plan.name]


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory):
    """The claim-1 units of the tiny plan, really trained."""
    folder = tmp_path_factory.mktemp("study")
    made = [u for u in units_of(TINY) if u.kind == "versus" and u.settings["data"] == "ranked"]
    work.run(made, folder, units.execute, say=lambda _: None)
    return made, folder


def test_a_unit_done_again_elsewhere_gives_the_same_result_and_weights(tiny_study, tmp_path):
    made, folder = tiny_study
    torch.manual_seed(99)
    work.run(made[:1], tmp_path, units.execute, say=lambda _: None)
    for unit in (made[0], made[0].needs[0]):
        one, other = work.read_result(unit, folder), work.read_result(unit, tmp_path)
        assert one["result"] == other["result"]
    lm = made[0].needs[0]
    assert work.weights_path(lm, folder).read_bytes() == work.weights_path(lm, tmp_path).read_bytes()


def test_a_model_trained_on_shuffled_labels_does_not_support_claim_1(tiny_study):
    made, folder = tiny_study
    longer = []
    for unit in made:
        labels = "shuffled" if unit.settings["arm"] == "pm" else "true"
        longer.append(replace(unit, settings={**unit.settings, "labels": labels, "pairs": 640, "test": 400}))
    longer = longer[:2]
    work.run(longer, folder, units.execute, say=lambda _: None)
    found = [work.read_result(u, folder) for u in longer]
    relabelled = [replace(u, settings={**u.settings, "labels": "true"}) for u in longer]
    gap = over_seeds([SeedMean.of(g) for g in versus_gaps(Results.of(relabelled, found), "ranked", 1)])
    assert above("", gap).verdict is not SUPPORTED
    accuracy = from_text(found[0]["result"]["credits"]["score"]).mean()
    assert abs(accuracy - 0.5) < 0.15


@pytest.mark.parametrize("kind", ["pmp", "finetune", "calibration", "sets"])
def test_every_kind_of_unit_runs_and_starts_from_the_weights_it_needs(tiny_study, kind):
    _, folder = tiny_study
    small = replace(TINY, calibration_pairs=64, calibration_test=50, prompts=16, prompts_test=10)
    everything = work.with_needs(units_of(small))
    made = [u for u in everything if u.kind == kind and u.settings.get("target", "shifted") == "shifted"]
    if kind == "finetune":
        made = [u for u in made if u.settings["pairs"] == 0 or u.settings["arm"] == "binary"]
    work.run(made, folder, units.execute, say=lambda _: None)
    found = {u.name: work.read_result(u, folder)["result"] for u in made}
    if kind == "finetune":  # without a single pair the arms differ in their weights alone
        untouched = {
            name.split("arm=")[1].split()[0]: r["credit"] for name, r in found.items() if "pairs=0" in name
        }
        assert len(untouched) == 4
        assert len({untouched[arm] for arm in ("none", "ranked", "binary")}) == 3
    if kind == "sets":
        assert sorted(r["forwards_per_prompt"] for r in found.values()) == [6, 30]


# intervals and verdicts


def test_an_interval_over_seeds_is_the_wider_of_students_and_the_items():
    far = [SeedMean(m, 0.001) for m in (0.1, 0.2, 0.3)]
    estimate = over_seeds(far)
    assert (estimate.mean, estimate.n) == (pytest.approx(0.2), 3)
    assert estimate.high - estimate.mean == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    close = over_seeds([SeedMean(0.2, 0.03)] * 3)
    assert close.high - close.mean == pytest.approx(1.96 * 0.03 / math.sqrt(3), rel=1e-3)
    one = over_seeds([SeedMean(0.2, 0.03)])
    assert (one.n, one.high) == (1, pytest.approx(0.2 + 1.96 * 0.03, rel=1e-3))
    items = np.array([0.0, 1.0, 1.0, 0.5])
    assert SeedMean.of(items).error == pytest.approx(items.std(ddof=1) / 2)
    both = combine([SeedMean(0.5, 0.3), SeedMean(0.2, 0.4)], (1.0, -1.0))
    assert (both.mean, both.error) == (pytest.approx(0.3), pytest.approx(0.5))


def test_slope_weights_give_the_least_squares_slope():
    x, y = [1.0, 2.0, 4.0], [0.3, 0.1, 0.9]
    assert np.dot(slope_weights(x), y) == pytest.approx(np.polyfit(x, y, 1)[0])


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


def between(low, high):
    return Estimate((low + high) / 2, low, high, 3)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (above("", between(0.01, 0.1)), SUPPORTED),
        (above("", between(-0.01, 0.3)), UNDECIDED),
        (above("", between(-0.3, 0.01)), UNDECIDED),
        (above("", between(-0.2, -0.1)), CONTRADICTED),
        (below("", between(0.7, 0.9), 1.0), SUPPORTED),
        (below("", between(0.7, 1.1), 1.0), UNDECIDED),
        (below("", between(0.95, 1.2), 1.0), UNDECIDED),
        (below("", between(1.1, 1.2), 1.0), CONTRADICTED),
        (inside("", between(-0.02, 0.03), -0.03, 0.03), SUPPORTED),
        (inside("", between(-0.02, 0.04), -0.03, 0.03), UNDECIDED),
        (inside("", between(-0.5, 0.5), -0.03, 0.03), UNDECIDED),
        (inside("", between(0.04, 0.06), -0.03, 0.03), CONTRADICTED),
        (inside("", between(-0.06, -0.04), -0.03, 0.03), CONTRADICTED),
        (above("", Estimate(0.5, math.nan, math.nan, 1)), UNDECIDED),
        (inside("", Estimate(math.nan, math.nan, math.nan, 0), -1, 1), UNDECIDED),
    ],
)
def test_a_verdict_is_a_bound_on_the_interval(statement, expected):
    assert statement.verdict is expected


def test_a_claim_holds_if_all_its_statements_do_and_falls_with_one():
    assert together([SUPPORTED, SUPPORTED]) is SUPPORTED
    assert together([SUPPORTED, UNDECIDED]) is UNDECIDED
    assert together([SUPPORTED, UNDECIDED, CONTRADICTED]) is CONTRADICTED
    assert together([]) is UNDECIDED


# claims on constructed results


def share_right(share, n=400):
    """Credits of n pairs of which this share is right."""
    return to_text(np.arange(n) < round(share * n))


def constructed(world="as the paper says"):
    """A study whose accuracies are made up, as the papers say or the other way round."""
    sign = 1 if world == "as the paper says" else -1
    plan = replace(FULL, small_sizes=(1,))
    everything = work.with_needs(units_of(plan))
    found = []
    for unit in everything:
        s = unit.settings
        wiggle = 0.002 * s["seed"]
        result = {}
        if unit.kind == "versus":
            gap = {"ranked": 0.1 + 0.05 * s["layers"], "binary": 0.005}[s["data"]] + wiggle
            gap = gap if sign > 0 else {"ranked": -gap, "binary": 0.4}[s["data"]]
            right = 0.5 if s["labels"] == "shuffled" else 0.6 + gap * (s["arm"] == "pm") - (sign < 0) * 0.1
            names = ["score"] if s["arm"] == "pm" else ["sum", "mean", "sum less language model"]
            names += [f"perfect imitation, {x}" for x in ("sum", "mean")]
            result = {"credits": {name: share_right(right - 0.1 * (name == "sum")) for name in names}}
        if unit.kind == "finetune":
            few = s["pairs"] <= 500
            bonus = {"none": 0.0, "imitation": 0.02, "ranked": 0.15, "binary": 0.25}[s["arm"]]
            result = {"credit": share_right(0.6 + sign * (bonus if few else bonus / 5) + wiggle)}
        if unit.kind == "calibration":
            slope = (1.02 if s["epochs"] == 1 else 0.7) if sign > 0 else 1.5
            bins = [
                {"pairs": 0, "promised": None, "observed": None},
                {"pairs": 9, "promised": 0.7, "observed": 0.6},
            ]
            measured = {
                "slope": slope + wiggle,
                "slope_error": 0.02,
                "ece": 0.01,
                "loss": 0.5,
                "accuracy": 0.7,
            }
            result = {"model": {**measured, "bins": bins}, "known score": {**measured, "bins": bins}}
        if unit.kind == "sets":
            grouped = s["arm"] == "grouped"
            loss = 0.5 if grouped else 0.5 + sign * 0.05
            losses = np.linspace(loss - 0.1, loss + 0.1, 50) + wiggle
            result = {"curve": [{"seen": 0.0, "loss": 0.7}, {"seen": 1.0, "loss": loss}]}
            result |= {"held_out_losses": losses.tolist(), "training_loss": 0.4, "known_score_loss": 0.45}
            result["forwards_per_prompt"] = 6.0 if grouped else 30.0
        if unit.kind == "lm":
            sizes = ("matrix_weights", "non_embedding_parameters", "parameters")
            result = dict.fromkeys(sizes, s["layers"])
        found.append({"result": result, "seconds": 1.0, "cpu_seconds": 1.0})
    return plan, everything, found


def test_results_as_the_papers_say_support_every_claim():
    _, everything, found = constructed()
    made = claims.all_claims(Results.of(everything, found))
    assert [c.number for c in made] == [1, 2, 3, 4, 11, 12]
    assert {c.verdict for c in made} == {SUPPORTED}
    shrinks = made[2].statements[2]  # ranked: 0.15 above none with few pairs, 0.03 with most
    assert shrinks.text.startswith("ranked PMP less no PMP: with few pairs less with most")
    assert shrinks.estimate.mean == pytest.approx(0.12, abs=0.003)


def test_results_the_other_way_round_contradict_every_claim():
    _, everything, found = constructed("the other way round")
    made = claims.all_claims(Results.of(everything, found))
    assert {c.verdict for c in made} == {CONTRADICTED}


def test_one_seed_that_disagrees_leaves_claim_1_undecided():
    _, everything, found = constructed()
    for unit, content in zip(everything, found, strict=True):
        if unit.kind == "versus" and unit.settings["seed"] == 2 and unit.settings["arm"] == "pm":
            content["result"]["credits"]["score"] = share_right(0.5)
    first = claims.ranked_against_imitation(Results.of(everything, found))
    assert first.verdict is UNDECIDED
    assert [s.estimate.n for s in first.statements] == [3, 3, 3, 3]


def test_the_better_score_of_imitation_is_kept():
    _, everything, found = constructed()
    results = Results.of(everything, found)
    assert np.mean(versus_gaps(results, "ranked", 1)) == pytest.approx(
        0.152, abs=0.003
    )  # 0.1 less than the sum's


def test_the_report_says_every_verdict_and_is_strict_json(tmp_path):
    plan, everything, found = constructed()
    results = Results.of(everything, found)
    made = claims.all_claims(results)
    pytest.importorskip("matplotlib")
    content = report.study(
        {"seeds": plan.seeds, "sentences": 1}, made, everything, found, command="x --quick", jobs=1
    )
    again = json.loads(json.dumps(content, allow_nan=False))
    assert [c["verdict"] for c in again["claims"]] == ["SUPPORTED"] * 6
    assert again["time"]["units"] == len(everything)
    assert "credits" not in json.dumps(again)
    page = report.page(content, made)
    for claim in made:
        assert f"## Claim {claim.number}. {claim.title}: SUPPORTED" in page
        assert all(statement.text in page for statement in claim.statements)
    assert "x --quick" in page
    from studies.preference import plots

    files = plots.draw_all(results, tmp_path)
    assert sorted(p.name for p in files) == sorted(name for name, _ in report.PLOTS.values())
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in files)


def test_mistakes_are_told_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["study", "--jobs", "0"])
    with pytest.raises(UserError, match="--jobs 0"):
        command.main()
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["study", "--work", "file/below"])
    with pytest.raises(UserError, match="cannot make the folder"):
        command.main()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["study"])
    with pytest.raises(UserError, match="matplotlib"):
        command.main()
