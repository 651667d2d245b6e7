"""The tax table's figures against plain loops, its page, and its picture."""

import json
import math
import statistics

import pytest

from policy.alignment_tax.plot import draw
from policy.alignment_tax.report import as_markdown
from policy.alignment_tax.table import difference, item_rows, task_figures, variant_figures, verdict, verdicts
from rlhf.evals.outcome import Outcome

T95 = {3: 3.182446, 5: 2.570582}  # quantiles of Student's t by degrees of freedom
IDS = [f"f:{i}" for i in range(1, 7)]
BASE = [0.1, 0.9, 0.4, 0.3, 0.5, 0.7]
ARM = [0.3, 0.9, 0.5, 0.1, 0.9, 0.8]


def outcome(
    values, *, ids=IDS, better=True, groups=None, task="lm_loss", more=None, notes=(), aggregate=None
):
    return Outcome(
        task=task,
        metric="loss",
        higher_is_better=better,
        ids=list(ids),
        groups=list(groups or [""] * len(ids)),
        values={"loss": list(values), **(more or {})},
        chance=0.25,
        notes=list(notes),
        aggregate=aggregate or {},
    )


def mean_and_ends(values):
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean, [mean - half, mean + half]


@pytest.mark.parametrize("better", [True, False])
def test_a_difference_is_that_of_a_loop_and_a_gain_has_its_sign_turned_where_lower_is_better(better):
    found = difference(outcome(BASE, better=better), outcome(ARM, better=better))
    mean, ends = mean_and_ends([b - a for a, b in zip(BASE, ARM, strict=True)])
    assert found["diff"] == pytest.approx(mean)
    assert found["ci95"] == pytest.approx(ends, abs=1e-6)
    assert found["n"] == 6
    sign = 1 if better else -1
    assert found["gain"] == pytest.approx(sign * mean)
    assert found["gain_ci95"] == pytest.approx(sorted(sign * end for end in ends))
    wins, losses = (4, 1) if better else (1, 4)
    assert (found["wins"], found["ties"], found["losses"]) == (wins, 1, losses)
    assert found["unpaired"] == 0


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([0.1, 0.2], "better"),
        ([-0.2, -0.1], "worse"),
        ([-0.1, 0.1], "open"),
        ([0.0, 0.1], "open"),
        ([0.1, 0.1], "open"),
        (None, "open"),
    ],
)
def test_a_verdict_is_given_where_the_interval_leaves_0_out(ends, said):
    assert verdict(ends) == said
    assert verdict(ends, 0.04) == said
    assert verdict(ends, 0.05) == "open"


def test_items_that_are_right_or_wrong_need_the_sign_test_too():
    wrong, right = [0.0] * 20, [1.0] * 4 + [0.0] * 16
    found = difference(outcome(wrong, ids=range(20)), outcome(right, ids=range(20)))
    assert found["gain_ci95"][0] > 0
    assert (found["p_sign"], found["verdict"]) == (0.125, "open")
    found = difference(outcome(wrong, ids=range(20)), outcome([1.0] * 6 + [0.0] * 14, ids=range(20)))
    assert found["verdict"] == "better"
    graded = [x + 0.01 for x in right]  # four large changes of a length need none
    assert difference(outcome(wrong, ids=range(20)), outcome(graded, ids=range(20)))["verdict"] == "better"


def test_the_verdict_is_about_the_gain():
    worse = [b + 1 for b in BASE]
    assert difference(outcome(BASE), outcome(worse))["verdict"] == "better"
    found = difference(outcome(BASE, better=False), outcome(worse, better=False))
    assert (found["verdict"], found["diff"] > 0, found["gain"] < 0) == ("worse", True, True)


def test_items_are_paired_by_name_where_the_two_have_different_ones():
    mixed = [*reversed(IDS[2:]), "f:9"]
    values = dict(zip(IDS, ARM, strict=True)) | {"f:9": 5.0}
    other = outcome([values[i] for i in mixed], ids=mixed)
    found = difference(outcome(BASE), other)
    same = difference(outcome(BASE[2:], ids=IDS[2:]), outcome(ARM[2:], ids=IDS[2:]))
    assert found | {"unpaired": 0} == same
    assert found["unpaired"] == 3  # f:1, f:2 and f:9
    apart = difference(outcome(BASE), outcome([1.0], ids=["x"]))
    assert (apart["diff"], apart["ci95"], apart["n"], apart["verdict"]) == (None, None, 0, "open")


def test_groups_and_other_metrics_are_paired_too():
    groups = ["a", "b", "a", "b", "a", "b"]
    x = outcome(BASE, groups=groups, better=False, more={"words": [1.0] * 6})
    y = outcome(ARM, groups=groups, better=False, more={"words": [2.0, 4.0, 2.0, 2.0, 2.0, 3.0]})
    found = difference(x, y)
    assert found["groups"]["a"]["diff"] == pytest.approx(statistics.fmean([0.2, 0.1, 0.4]))
    assert found["groups"]["a"]["gain"] == pytest.approx(-statistics.fmean([0.2, 0.1, 0.4]))
    assert found["groups"]["b"]["n"] == 3
    assert found["metrics"] == {
        "words": {"diff": 1.5, "ci95": pytest.approx([0.6220, 2.3780], abs=1e-3), "n": 6}
    }
    assert difference(outcome(BASE), outcome(ARM))["groups"] == {}


def test_a_variant_has_its_mean_its_metrics_its_groups_and_its_aggregates():
    groups = ["a", "b", "a", "b", "a", "b"]
    found = variant_figures(
        outcome(BASE, groups=groups, more={"words": [2.0] * 6}, aggregate={"perplexity": 9.0})
    )
    mean, ends = mean_and_ends(BASE)
    assert found["mean"] == pytest.approx(mean)
    assert found["ci95"] == pytest.approx(ends, abs=1e-6)
    assert found["metrics"]["words"]["mean"] == 2
    assert found["groups"]["a"]["mean"] == pytest.approx((0.1 + 0.4 + 0.5) / 3)
    assert found["aggregate"] == {"perplexity": 9.0}


def table(**changes):
    """A table of three variants and two tasks."""
    groups = ["helpful", "honest"] * 3
    first = {
        "base": outcome(BASE, groups=groups, task="hhh", more={"acc_sum": BASE}),
        "sft": outcome([b + 0.2 + 0.01 * i for i, b in enumerate(BASE)], groups=groups, task="hhh"),
        "policy": outcome(ARM, groups=groups, task="hhh", notes=["6 of 9 items"]),
    }
    second = {
        "base": outcome(BASE, better=False, aggregate={"perplexity": 1234.5}),
        "sft": outcome([b + 0.2 + 0.01 * i for i, b in enumerate(BASE)], better=False),
        "policy": outcome(ARM[:5], ids=IDS[:5], better=False),
    }
    return {
        "name": "x",
        "seed": 3,
        "reference": "base",
        "variants": [{"name": n, "what": f"the {n} | model"} for n in ("base", "sft", "policy")],
        "tasks": [task_figures(first, "base"), task_figures(second, "base")],
        "reward_model_hhh": None,
        "groups_shown": 8,
        "notes": ["about all"],
        "files": {"hhh": {f"{i}.json": "a" * 64 for i in range(7)}},
        "versions": {"torch": "2"},
        "cost": {"seconds": 90.0, "peak_bytes": 2e9},
        "plot": True,
        **changes,
    }


def rows(page, heading):
    """Cells of the table below a heading."""
    part = page.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_the_page_has_every_number_of_the_table():
    tax = table()
    page = as_markdown(tax)
    head, hhh, loss = rows(page, "Results")
    assert head == ["task", "metric", "better", "items", "chance", "base", "sft", "policy"]
    assert hhh[:5] == ["hhh", "loss", "higher", "6", "0.250"]
    assert loss[2] == "lower"
    mean, (low, high) = mean_and_ends(BASE)
    assert hhh[5] == f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    head, hhh, loss = rows(page, "Difference to base: + is better, - is worse")
    assert head == ["task", "sft", "policy"]
    mean, (low, high) = mean_and_ends([0.2 + 0.01 * i for i in range(6)])
    assert hhh[1] == f"**+{mean:.3f} [+{low:.3f}, +{high:.3f}]**"
    assert loss[1] == f"**-{mean:.3f} [-{high:.3f}, -{low:.3f}]**"  # the same numbers, and lower is better
    assert "**" not in hhh[2]
    _, hhh, loss = rows(page, "Item by item against base: better / equal / worse (p of the sign test)")
    assert hhh == ["hhh", "6 / 0 / 0 (p 0.031)", "4 / 1 / 1 (p 0.38)"]
    assert loss == ["lm_loss", "0 / 0 / 6 (p 0.031)", "1 / 1 / 3 (p 0.62)"]


def test_the_page_says_what_can_be_told_and_how_many_intervals_there_are():
    tax = table()
    page = as_markdown(tax)
    assert "- `sft` against `base`: better on hhh; worse on lm_loss.\n" in page
    assert "- `policy` against `base`: no significant difference on hhh, lm_loss.\n" in page
    assert "The page has 4 such intervals: if nothing had changed at all, about 0.2 of them" in page
    assert verdicts(tax["tasks"], "sft") == {"better": ["hhh"], "worse": ["lm_loss"], "open": []}
    for word in (
        "about all",
        "hhh: 6 of 9 items",
        "1 items were done by `policy` or by `base` alone",
        "and 2 more",
    ):
        assert word in page, word
    assert "Measured in 1.5 min, 2.00 GB at the peak, with torch 2." in page
    assert "the sft \\| model" in page


def test_groups_are_shown_where_there_are_few():
    page = as_markdown(table())
    head, helpful, honest = rows(page, "By group of items")
    assert head == ["task", "group", "items", "base", "sft", "policy"]
    assert helpful[:4] == ["hhh", "helpful", "3", f"{(0.1 + 0.4 + 0.5) / 3:.3f}"]
    assert helpful[4] == f"{(0.1 + 0.4 + 0.5) / 3 + 0.22:.3f} (**+0.220**)"
    assert honest[1] == "honest"
    assert "By group of items" not in as_markdown(table(groups_shown=1))
    assert "By group of items" not in as_markdown(table(groups_shown=0))


def test_other_figures_stand_in_a_table_of_their_own():
    found = rows(as_markdown(table()), "Other figures")
    assert found[1] == ["hhh", "acc_sum", f"{statistics.fmean(BASE):.3f}", "", ""]
    assert found[2] == ["lm_loss", "perplexity", "1234.5", "unknown", "unknown"]


def test_a_reward_model_has_a_line_of_its_own():
    own = {"metric": "acc", "items": 6, "figures": {"mean": 0.5, "ci95": [0.1, 0.9], "n": 6}, "groups": {}}
    page = as_markdown(table(reward_model_hhh=own))
    assert "ranks 0.500 [0.100, 0.900] of the 6 HHH items right (metric acc)" in page


def test_a_single_variant_has_nothing_to_be_compared_with():
    tax = table()
    alone = {"base": outcome(BASE)}
    page = as_markdown(
        tax | {"tasks": [task_figures(alone, "base")], "variants": tax["variants"][:1], "plot": False}
    )
    assert "only `base`: nothing to compare" in page
    assert "such intervals" not in page
    assert "tax.png" not in page


def test_the_table_survives_json():
    tax = table()
    assert as_markdown(json.loads(json.dumps(tax))) == as_markdown(tax)


def test_the_picture_is_one(tmp_path):
    draw(table(), tmp_path / "tax.png")
    assert (tmp_path / "tax.png").read_bytes().startswith(b"\x89PNG")
    empty = table()
    empty["tasks"][0]["differences"]["sft"] |= {"gain": None, "gain_ci95": None}
    empty["tasks"][1]["differences"]["sft"] |= {"gain_ci95": None}
    draw(empty, tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").stat().st_size > 1000


def test_items_have_every_value_of_every_variant():
    found = item_rows({"base": outcome(BASE, more={"words": ARM}), "x": outcome(ARM[1:], ids=IDS[1:])})
    assert len(found) == 6
    assert found[0] == {
        "task": "lm_loss",
        "id": "f:1",
        "group": "",
        "values": {"loss": {"base": 0.1}, "words": {"base": 0.3}},
    }
    assert found[1]["values"]["loss"] == {"base": 0.9, "x": 0.9}
