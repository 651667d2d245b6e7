"""What all studies share: units that are computed once, intervals over seeds, verdicts, the page."""

import importlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from rlhf.errors import UserError
from rlhf.stats.intervals import Estimate
from studies.engine import command, units
from studies.engine.results import Results
from studies.engine.seeds import SeedMean, combine, over_seeds, slope_weights
from studies.engine.units import Unit
from studies.engine.verdicts import Verdict, above, below, inside, shown, together

SUPPORTED, CONTRADICTED, UNDECIDED = Verdict.SUPPORTED, Verdict.CONTRADICTED, Verdict.UNDECIDED


# units


class Recorder:
    """Computes units by writing down that they were computed; the first of a chain leaves weights."""

    def __init__(self, fail_at=None):
        self.done = []
        self.fail_at = fail_at

    def __call__(self, unit, folder):
        if len(self.done) == self.fail_at:
            raise KeyboardInterrupt
        assert all(units.is_done(need, folder) for need in unit.needs)
        self.done.append(unit.name)
        if unit.kind == "lm":
            units.keep(units.weights_path(unit, folder), lambda file: file.write_text("weights"))
        return {"value": len(self.done)}


def run(some, folder, compute=None, **options):
    """What was computed, and the lines that were printed."""
    recorder, lines = compute or Recorder(), []
    units.run(some, folder, recorder, say=lines.append, **options)
    return recorder.done, lines


def chain(rate=1.0):
    first = Unit("lm", {"seed": 0, "rate": rate}, cost=2.0)
    return [Unit("versus", {"seed": 0, "arm": arm}, (first,), cost=1.0) for arm in ("pm", "il")]


def test_a_stopped_study_goes_on_and_a_finished_one_does_nothing(tmp_path):
    stopped = Recorder(fail_at=2)
    with pytest.raises(KeyboardInterrupt):
        run(chain(), tmp_path, stopped)
    assert stopped.done == ["lm seed=0", "versus seed=0 arm=pm"]
    done, lines = run(chain(), tmp_path)
    assert done == ["versus seed=0 arm=il"]
    assert lines == ["3 units, 2 of them done before", "[3/3] versus seed=0 arm=il: 0 s, 0 min left"]
    assert run(chain(), tmp_path) == ([], ["3 units, 3 of them done before"])
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_a_changed_setting_is_another_unit_also_for_those_that_need_it(tmp_path):
    run(chain(), tmp_path)
    assert len(run(chain(rate=2.0), tmp_path)[0]) == 3
    unit = chain()[0]
    assert replace(unit, cost=9.0).key == unit.key
    assert replace(unit, kind="finetune").key != unit.key


def test_a_damaged_result_or_missing_weights_are_made_again(tmp_path):
    made = chain()
    run(made, tmp_path)
    path = units.result_path(made[0], tmp_path)
    path.write_text(path.read_text()[:40])
    units.weights_path(made[0].needs[0], tmp_path).unlink()
    assert run(made, tmp_path)[0] == ["lm seed=0", "versus seed=0 arm=pm"]


def test_several_at_a_time_do_the_same_and_stop_at_an_error(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        assert sorted(run(chain(), tmp_path, pool=pool, jobs=2)[0]) == sorted(run(chain(), tmp_path / "x")[0])
        with pytest.raises(KeyboardInterrupt):
            run(chain(rate=3.0), tmp_path, Recorder(fail_at=1), pool=pool, jobs=2)


def test_results_are_looked_up_by_settings_and_an_ambiguous_one_is_an_error(tmp_path):
    made = units.with_needs(chain())
    with pytest.raises(FileNotFoundError, match="no result of lm seed=0"):
        Results.read(made, tmp_path)
    run(made, tmp_path)
    found = Results.read(made, tmp_path)
    assert found.by_seed("versus", arm="pm") == [{"value": 2}]
    assert found.values("versus", "arm") == ["il", "pm"]
    with pytest.raises(KeyError, match="2 results"):
        found.one("versus", seed=0)


# intervals over seeds


def test_an_interval_over_seeds_is_the_wider_of_students_and_the_items():
    far = [SeedMean(m, 0.001) for m in (0.1, 0.2, 0.3)]
    estimate = over_seeds(far)
    assert (estimate.mean, estimate.n) == (pytest.approx(0.2), 3)
    assert estimate.high - estimate.mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
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


# verdicts


def between(low, high):
    return Estimate((low + high) / 2, low, high, 3)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (above("", between(0.01, 0.1)), SUPPORTED),
        (above("", between(-0.01, 0.3)), UNDECIDED),
        (above("", between(-0.3, 0.01)), UNDECIDED),
        (above("", between(-0.2, -0.1)), CONTRADICTED),
        (above("", between(0.0, 0.0)), UNDECIDED),
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


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([SUPPORTED, SUPPORTED], SUPPORTED),
        ([SUPPORTED, UNDECIDED], UNDECIDED),
        ([SUPPORTED, UNDECIDED, CONTRADICTED], CONTRADICTED),
        ([], UNDECIDED),
    ],
)
def test_a_claim_holds_if_all_its_statements_do_and_falls_with_one(parts, whole):
    assert together(parts) is whole


def test_what_is_not_known_is_a_dash():
    assert shown(between(-1.0, 2.0), 1) == "0.5 [-1.0, 2.0]"
    assert shown(Estimate(0.5, math.nan, math.nan, 1)) == "0.500"
    assert shown({"mean": None, "ci95": None, "n": 0}) == "-"


# the reports in docs/


@pytest.mark.parametrize("study", ["preference", "scaling"])
def test_a_stored_study_gives_its_page_and_consists_of_the_units_of_its_plan(study):
    """What was published can be rendered again, and its units would be found done."""
    folder = ROOT / "docs" / "studies" / study
    content = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    report = importlib.import_module(f"studies.{study}.report")
    page = report.page(content)
    assert page == (folder / "study.md").read_text(encoding="utf-8")
    assert all(f"({name})" in page and (folder / name).is_file() for name, _ in report.PLOTS.values())
    plan = importlib.import_module(f"studies.{study}.plan")
    given = (plan.Given(),) if study == "scaling" else ()
    made = {unit.key: unit for unit in units.with_needs(plan.units_of(plan.FULL, *given))}
    stored = {unit["key"] for unit in content["units"]}
    assert len(stored) == len(made) == len(content["units"])
    # distilled by a loop of the study's own, which the project's trainer has replaced
    since = {key for key, u in made.items() if "distil" in (u.kind, *(n.kind for n in u.needs))}
    assert set(made) - since == stored & set(made)
    assert len(since) == (18 if study == "scaling" else 0)


def test_the_stored_transfer_of_pre_training_gives_its_page():
    from studies.pmp_transfer import page

    folder = ROOT / "docs" / "studies" / "pmp"
    content = json.loads((folder / "pmp.json").read_text(encoding="utf-8"))
    assert page(content) == (folder / "pmp.md").read_text(encoding="utf-8")
    assert "| binarized |" in page(content)  # whatever its units are called


def test_the_transfer_of_pre_training_is_paired_by_held_out_comparison():
    from studies.pmp_transfer import cells_of

    right = {("none", 0): [1, 0, 2], ("none", 1): [0, 1, 2], ("lm", 0): [1, 1, 3], ("lm", 1): [1, 0, 3]}
    made = [Unit("finetune", {"arm": arm, "pairs": 4, "seed": seed}) for arm, seed in right]
    found = [{"result": {"correct": correct, "pairs": [1, 1, 3]}} for correct in right.values()]
    cells = cells_of(Results(made, found))
    assert [*cells["none-4"]] == ["accuracy"]
    assert cells["none-4"]["accuracy"]["mean"] == pytest.approx(3 / 5)
    assert cells["lm-4"]["accuracy"]["mean"] == pytest.approx(4.5 / 5)
    assert cells["lm-4"]["difference"]["mean"] == pytest.approx(1.5 / 5)
    assert cells["lm-4"]["difference"]["n"] == 3


# the command line


@pytest.mark.parametrize("study", ["preference", "scaling"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--jobs", "0"], "--jobs 0"), (["--work", "file/below"], "cannot make the folder"), ([], "matplotlib")],
)
def test_mistakes_are_told_before_anything_is_trained(monkeypatch, tmp_path, study, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    if not arguments:
        monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        command.check(command.arguments(study, "").parse_args(arguments))


def test_an_interval_is_cut_at_the_bounds_of_its_quantity_but_not_beyond_its_mean():
    share = over_seeds([SeedMean(x) for x in (0.9, 1.0, 1.0)])
    assert (share.high > 1, share.cut((0, 1)).high, share.cut((0, 1)).low) == (True, 1.0, share.low)
    assert Estimate(-0.1, -0.3, 0.1, 3).cut((0, math.inf)) == Estimate(-0.1, -0.1, 0.1, 3)
    assert math.isnan(Estimate(0.5, math.nan, math.nan, 1).cut((0, 1)).low)
