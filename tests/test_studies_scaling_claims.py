import json
import math
import re
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT
from scaling_cases import DEFAULTS, estimate, plan_of, study

from rlhf.errors import UserError
from studies.engine.plots import save
from studies.engine.report import content
from studies.engine.verdicts import Verdict
from studies.scaling import claims, figures, objectives, plots, report
from studies.scaling.figures import LOSS, WORD, point_of
from studies.scaling.plan import ARMS, BASE, FULL, PPO, PTX, Given, units_of

PREFERENCE = ROOT / "docs" / "studies" / "preference" / "study.json"
SUPPORTED, CONTRADICTED, UNDECIDED = Verdict.SUPPORTED, Verdict.CONTRADICTED, Verdict.UNDECIDED


def verdicts(claim, text):
    """The verdicts of the statements that begin with a text; there must be some."""
    found = [s.verdict for s in claim.statements if s.text.startswith(text)]
    assert found, text
    return set(found)


# figures


def test_a_figure_is_the_mean_over_seeds_at_every_rung():
    done = study()
    figure = done.level(*LOSS, PPO)
    assert [r.label for r in figure.rungs] == ["L = 1", "L = 2", "L = 3"]
    assert [r.size for r in figure.rungs] == [196_608, 1_572_864, 5_308_416]
    for layers, got in zip((1, 2, 3), figure.estimates, strict=True):
        seeds = [np.mean(done.items(*LOSS, PPO, figure.rungs[layers - 1], s)) for s in (0, 1, 2)]
        assert got.mean == pytest.approx(np.mean(seeds))
        assert got.n == 3


def test_a_tax_is_what_was_lost_item_by_item():
    done = study()
    for layers, (loss, word) in enumerate(
        zip(done.tax(LOSS, PPO).estimates, done.tax(WORD, PPO).estimates, strict=True), 1
    ):
        assert loss.mean == pytest.approx(DEFAULTS["tax"](layers), abs=0.002)
        assert loss.high - loss.low < 0.01  # the items differ by much more than that, and are paired
        assert word.mean == pytest.approx(DEFAULTS["word_tax"](layers), abs=0.03)


def test_a_figure_of_the_distillation_report_keeps_its_error():
    point = point_of(estimate(0.9, half=0.0196))
    assert (point.mean, point.error) == pytest.approx((0.9, 0.01), rel=1e-3)
    assert math.isnan(point_of(None).mean)


def test_rungs_are_in_the_order_of_their_size_and_an_ambiguous_unit_is_an_error():
    done = study(sizes=(3, 1, 2))
    assert [r.label for r in done.rungs] == ["L = 1", "L = 2", "L = 3"]
    with pytest.raises(KeyError, match="2 results"):
        done.result("ppo", done.rungs[0], 0)


# claim 5


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        ({}, SUPPORTED),
        ({"gone": 0.6}, CONTRADICTED),
        ({"gone": 0.8}, UNDECIDED),
        ({"recovered": None}, UNDECIDED),
        ({"recovered": 0.3}, CONTRADICTED),
        ({"empty": 1e-6}, CONTRADICTED),
    ],
)
def test_distillation_has_to_take_over_four_fifths_on_the_whole_interval(told, verdict):
    assert claims.distillation(study(**told)).verdict is verdict


# claim 6

ON_LOSS = "slope of the tax of PPO on held-out loss"
ON_WORDS = "slope of the tax of PPO on last words"
LOWERED = "tax on held-out loss, PPO less PPO-ptx"
LESS_REWARD, NOTHING_TO_LOSE = "same reward", "nothing to lose"


@pytest.mark.parametrize(
    ("made_up", "expected", "noted"),
    [
        ({}, {ON_LOSS: SUPPORTED, LOWERED: SUPPORTED}, None),
        ({"tax": lambda layers: 0.03 * layers}, {ON_LOSS: CONTRADICTED}, None),
        ({"tax": lambda layers: 0.03}, {ON_LOSS: UNDECIDED}, None),
        ({"ptx": 1.5}, {LOWERED: CONTRADICTED}, None),
        ({"ptx_reward": 0.2}, {LOWERED: UNDECIDED}, LESS_REWARD),
        ({"ptx_reward": 0.2, "ptx": 1.5}, {LOWERED: UNDECIDED}, LESS_REWARD),
        (
            {"word": 0.0, "word_tax": lambda layers: 0.0},  # rungs that never knew the last word
            {"last words lost": UNDECIDED, ON_WORDS: UNDECIDED},
            NOTHING_TO_LOSE,
        ),
    ],
)
def test_a_tax_has_to_fall_with_size_and_with_text_where_that_can_be_judged(made_up, expected, noted):
    claim = claims.tax(study(**made_up))
    for text, verdict in expected.items():
        assert verdicts(claim, text) == {verdict}
    for note in (LESS_REWARD, NOTHING_TO_LOSE):
        assert sum(note in n for n in claim.notes) == (3 if note == noted else 0)


def test_a_lower_reward_is_in_the_table():
    (row,) = [r for r in claims.tax(study(ptx_reward=0.2)).rows if r[0].startswith("reward on held-out")]
    assert row[2].startswith("-0.300")


def test_a_tax_that_is_paid_is_told_and_not_judged():
    claim = claims.tax(study())
    rows = [row for row in claim.rows if row[1] == PPO and row[0].startswith("held-out loss")]
    assert all("*pays*" in at for at in rows[0][2:5])
    gains = claims.tax(study(tax=lambda layers: -0.03))
    assert all("*gains*" in at for at in gains.rows[2][2:5])
    assert not [s for s in claim.statements if "pays" in s.text]


# claim 19


def test_accuracy_that_falls_with_size_is_inverse_scaling():
    claim = claims.inverse_scaling(study())
    assert claim.verdict is SUPPORTED
    assert len(claim.statements) == 8  # four tasks, before and after
    assert sum(row[1] == "ppo less base, paired" for row in claim.rows) == 4
    rises = claims.inverse_scaling(study(accuracy=lambda layers: 0.2 + 0.2 * layers))
    assert rises.verdict is CONTRADICTED


def test_where_the_answers_have_no_probability_nothing_is_decided():
    done = study(mass=0.01)
    claim = claims.inverse_scaling(done)
    assert claim.verdict is UNDECIDED
    assert sum("accuracy there says little" in note for note in claim.notes) == 8
    assert claims.answer_mass(done, "neqa", PPO) == pytest.approx([0.01] * 3)


# fewer rungs


def test_two_rungs_decide_nothing_that_needs_a_trend():
    done = study(sizes=(1, 2))
    assert done.level("neqa", "acc", BASE).trend is None
    claim = claims.inverse_scaling(done)
    assert claim.verdict is UNDECIDED
    assert "2 rungs: a trend needs 3" in claim.notes[-1]
    assert all(s.estimate.n == 0 for s in claim.statements)


# preference objectives


def test_the_objectives_are_read_and_their_trend_is_that_of_their_own_page():
    rows = objectives.read(PREFERENCE)
    gap = objectives.gap(rows, objectives.RANKED)
    page = json.loads(PREFERENCE.read_text(encoding="utf-8"))["claims"][0]["statements"]
    for got, theirs in zip(gap.estimates, page[:3], strict=True):
        assert got.mean == pytest.approx(
            theirs["mean"], abs=1e-3
        )  # the better score is chosen over all rungs
    assert gap.trend.slope.mean == pytest.approx(page[3]["mean"] / math.log(10), abs=1e-3)
    assert claims.preference_objectives(rows).number == 1


def test_the_units_of_the_other_study_are_its_own():
    from studies.preference.plan import FULL as THEIRS
    from studies.preference.plan import units_of as theirs_of

    wanted = {u.key for u in objectives.units(FULL)}
    assert wanted <= {u.key for u in theirs_of(THEIRS)}
    assert len(wanted) == 3 * 3 * 4


def test_a_file_that_is_no_report_is_refused(tmp_path):
    (tmp_path / "study.json").write_text('{"units": [{"kind": "versus"}]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"not a report of `python -m studies\.preference`"):
        objectives.read(tmp_path / "study.json")


# the plan


def test_a_changed_number_or_file_makes_other_units(tmp_path):
    keys = {u.key for u in units_of(FULL, Given())}
    assert len(keys) == 3 * 3 * len(ARMS)
    file = tmp_path / "text.txt"
    file.write_text("one", encoding="utf-8")
    others = [units_of(plan_of(sizes=(1,), seeds=(5,)), Given())]
    others.append(units_of(FULL, Given(text=(str(file),))))
    file.write_text("two", encoding="utf-8")
    others.append(units_of(FULL, Given(text=(str(file),))))
    for units in others:
        assert not keys & {u.key for u in units}
        keys |= {u.key for u in units}


def test_what_does_not_decide_a_rung_leaves_it_as_it_is():
    def needs(plan):
        return {u.needs[0].key for u in units_of(plan, Given())}

    from dataclasses import replace

    assert needs(FULL) == needs(replace(FULL, steps=7, items=10, sequences=5))
    assert needs(FULL).isdisjoint(needs(replace(FULL, tokens=7)))


def test_ptx_is_the_only_difference_of_the_two_arms_of_ppo():
    arms = {u.settings["arm"]: u.needs[1].settings for u in units_of(FULL, Given()) if len(u.needs) > 1}
    differ = {k for k in arms[PPO] if arms[PPO][k] != arms[PTX][k]}
    assert differ == {"arm", "ptx_coef"}


# the page


def test_the_page_has_what_the_json_has_and_the_plots_are_written(tmp_path):
    """How a page is made of its JSON: test_studies_engine.py."""
    done, rows = study(), objectives.read(PREFERENCE)
    made = claims.all_claims(done, rows)
    numbers = [*figures.all_figures(done), *objectives.figures(rows)]
    kept = content(
        "scaling",
        {**asdict(plan_of()), "given": asdict(Given())},
        made,
        done,
        command="python -m studies.scaling",
        jobs=2,
        preference="read",
        seeds=done.seeds,
        rungs=report.rungs(done),
        figures=[f.as_dict() for f in numbers],
    )
    kept = json.loads(json.dumps(kept, allow_nan=False))
    assert [c["number"] for c in kept["claims"]] == [1, 5, 6, 19]
    assert kept["time"] == {"units": 81, "jobs": 2, "unit_seconds": 81 * 60, "cpu_seconds": 81 * 30}
    page = report.page(kept)
    assert "81 units, 81.0 min of unit time (40.5 min of CPU time)" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert len(kept["figures"]) > 60
    assert all(f"### {figure['group']}" in page for figure in kept["figures"])
    files = save(plots.canvases(done, rows), tmp_path)
    assert sorted(f.name for f in files) == ["distillation.png", "inverse.png", "objectives.png", "tax.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
