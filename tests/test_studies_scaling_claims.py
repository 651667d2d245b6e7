import json
import math
import re
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT
from scaling_cases import DEFAULTS, base_arm, estimate, plan_of, study

from rlhf.errors import UserError
from rlhf.markdown import cell
from studies.preference.verdicts import Verdict
from studies.scaling import claims, figures, objectives, plots, report
from studies.scaling.figures import LOSS, WORD, point_of
from studies.scaling.plan import ARMS, FULL, PPO, PTX, Given, units_of

PREFERENCE = ROOT / "docs" / "studies" / "preference" / "study.json"
SUPPORTED, CONTRADICTED, UNDECIDED = Verdict.SUPPORTED, Verdict.CONTRADICTED, Verdict.UNDECIDED


def verdicts(claim, text):
    """The verdicts of the statements that begin with a text; there must be some."""
    found = [s.verdict for s in claim.statements if s.text.startswith(text)]
    assert found, text
    return set(found)


# figures


def test_a_figure_is_the_mean_over_seeds_at_every_rung():
    done, _, _ = study()
    figure = done.level(*LOSS, PPO)
    assert [r.label for r in figure.rungs] == ["L = 1", "L = 2", "L = 3"]
    assert [r.size for r in figure.rungs] == [196_608, 1_572_864, 5_308_416]
    for layers, got in zip((1, 2, 3), figure.estimates, strict=True):
        seeds = [np.mean(done.items(*LOSS, PPO, figure.rungs[layers - 1], s)) for s in (0, 1, 2)]
        assert got.mean == pytest.approx(np.mean(seeds))
        assert got.n == 3


def test_a_tax_is_what_was_lost_item_by_item():
    done, _, _ = study()
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
    done, _, _ = study(sizes=(3, 1, 2))
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
    assert claims.distillation(study(**told)[0]).verdict is verdict


# claim 6


def test_a_tax_that_falls_with_size_and_that_text_lowers_is_supported():
    claim = claims.tax(study()[0])
    assert verdicts(claim, "slope of the tax of PPO on held-out loss") == {SUPPORTED}
    assert verdicts(claim, "tax on held-out loss, PPO less PPO-ptx") == {SUPPORTED}
    assert not any("same reward" in note for note in claim.notes)


def test_a_tax_that_grows_is_contradicted_and_one_that_stays_undecided():
    grows = claims.tax(study(tax=lambda layers: 0.03 * layers)[0])
    assert verdicts(grows, "slope of the tax of PPO on held-out loss") == {CONTRADICTED}
    stays = claims.tax(study(tax=lambda layers: 0.03)[0])
    assert verdicts(stays, "slope of the tax of PPO on held-out loss") == {UNDECIDED}


def test_text_that_does_not_lower_the_tax_is_told():
    assert verdicts(claims.tax(study(ptx=1.5)[0]), "tax on held-out loss, PPO less") == {CONTRADICTED}


def test_a_tax_that_is_lower_for_less_reward_is_told_and_not_judged():
    claim = claims.tax(study(ptx_reward=0.2)[0])
    assert verdicts(claim, "tax on held-out loss, PPO less PPO-ptx") == {UNDECIDED}
    assert sum("same reward" in note for note in claim.notes) == 3
    (row,) = [row for row in claim.rows if row[0].startswith("reward on held-out openings")]
    assert row[2].startswith("-0.300")
    assert verdicts(claims.tax(study(ptx_reward=0.2, ptx=1.5)[0]), "tax on held-out") == {UNDECIDED}


def test_a_tax_that_is_paid_is_told_and_not_judged():
    claim = claims.tax(study()[0])
    rows = [row for row in claim.rows if row[1] == PPO and row[0].startswith("held-out loss")]
    assert all("*pays*" in at for at in rows[0][2:5])
    gains = claims.tax(study(tax=lambda layers: -0.03)[0])
    assert all("*gains*" in at for at in gains.rows[2][2:5])
    assert not [s for s in claim.statements if "pays" in s.text]


def test_a_rung_that_never_knew_the_last_word_has_nothing_to_lose():
    able = claims.tax(study()[0])
    assert verdicts(able, "last words lost, prompted") <= {SUPPORTED, UNDECIDED}
    unable = claims.tax(study(word=0.0, word_tax=lambda layers: 0.0)[0])
    assert verdicts(unable, "last words lost") == {UNDECIDED}
    assert verdicts(unable, "slope of the tax of PPO on last words") == {UNDECIDED}
    assert sum("nothing to lose" in note for note in unable.notes) == 3


# claim 19


def test_accuracy_that_falls_with_size_is_inverse_scaling():
    claim = claims.inverse_scaling(study()[0])
    assert claim.verdict is SUPPORTED
    assert len(claim.statements) == 8  # four tasks, before and after
    rises = claims.inverse_scaling(study(accuracy=lambda layers: 0.2 + 0.2 * layers)[0])
    assert rises.verdict is CONTRADICTED


def test_a_change_of_accuracy_by_ppo_is_paired_and_beside_the_trend():
    claim = claims.inverse_scaling(study()[0])
    assert sum(row[1] == "ppo less base, paired" for row in claim.rows) == 4


def test_where_the_answers_have_no_probability_nothing_is_decided():
    claim = claims.inverse_scaling(study(mass=0.01)[0])
    assert claim.verdict is UNDECIDED
    assert sum("accuracy there says little" in note for note in claim.notes) == 8
    assert claims.answer_mass(study(mass=0.01)[0], "neqa", PPO) == pytest.approx([0.01] * 3)


# fewer rungs


def test_two_rungs_decide_nothing_that_needs_a_trend():
    done, _, _ = study(sizes=(1, 2))
    assert base_arm(done, "neqa").trend is None
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


@pytest.fixture(scope="module")
def written():
    done, units, found = study()
    rows = objectives.read(PREFERENCE)
    made = claims.all_claims(done, rows)
    numbers = [*figures.all_figures(done), *objectives.figures(rows)]
    content = report.study(
        {**asdict(plan_of()), "given": asdict(Given())},
        done,
        made,
        numbers,
        units,
        found,
        command="python -m studies.scaling",
        jobs=2,
        preference="read",
    )
    content = json.loads(json.dumps(content, allow_nan=False))
    return content, report.page(content, made, numbers)


def shown(figure, digits=4):
    """A figure of the JSON as the page has it."""
    if figure["mean"] is None:
        return "| -"
    ends = figure["ci95"]
    tail = "" if ends is None else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"| {figure['mean']:.{digits}f}{tail} |"


def test_the_page_holds_every_figure_of_the_json(written):
    content, page = written
    assert len(content["figures"]) > 60
    lines = page.splitlines()
    for figure in content["figures"]:
        start = lines.index(f"### {figure['group']}")
        (line,) = [
            x
            for x in lines[start : start + 20]
            if x.startswith(f"| {cell(figure['name'])} | {figure['unit']} |")
        ][:1]
        for rung in figure["rungs"]:
            assert shown(rung) in line, figure
        assert shown(figure["trend"]["slope"]) in line
        assert f"{figure['trend']['misfit']:.4f}" in line
        assert {rung["N"] for rung in figure["rungs"]} == {rung["N"] for rung in content["rungs"]}


def test_the_page_holds_every_statement_and_table_of_the_json(written):
    content, page = written
    assert [c["number"] for c in content["claims"]] == [1, 5, 6, 19]
    for claim in content["claims"]:
        assert f"| {claim['number']} | {claim['title']} | **{claim['verdict']}** |" in page
        for statement in claim["statements"]:
            (line,) = [x for x in page.splitlines() if x.startswith(f"| {cell(statement['text'])} |")]
            assert line.endswith(f"| {statement['rule']} | {statement['verdict']} |")
            measured = [float(x) for x in re.findall(r"-?\d+\.?\d*", line.split(" | ")[1])]
            assert measured == pytest.approx([statement["mean"], *statement["ci95"]], abs=6e-4)
        for row in claim["table"]["rows"]:
            assert all(cell(text) in page for text in row)
        for note in claim["notes"]:
            assert note in page


def test_the_page_tells_time_models_and_what_it_is_no_measure_of(written):
    content, page = written
    assert content["time"] == {"units": 81, "jobs": 2, "unit_seconds": 81 * 60, "cpu_seconds": 81 * 30}
    assert "81 units, 81.0 min of unit time (40.5 min of CPU time)" in page
    assert "no number here can stand beside one of a model of ten billion parameters" in page
    assert "PAY the tax in the papers" in page
    for rung in content["rungs"]:
        assert f"| {rung['rung']} | {rung['N']:,.0f} |" in page
    assert "nan" not in page.lower().split()
    assert not re.search(r"\bnan\b", page)


def test_the_plots_are_written(tmp_path):
    done, _, _ = study()
    files = plots.draw_all(done, objectives.read(PREFERENCE), tmp_path)
    assert sorted(f.name for f in files) == ["distillation.png", "inverse.png", "objectives.png", "tax.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
