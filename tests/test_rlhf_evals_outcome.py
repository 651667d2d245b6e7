"""What a model did on a task: means, categories, JSON, and pairing with another model."""

import json
import math

import pytest

from rlhf.errors import UserError
from rlhf.evals.outcome import Outcome, paired
from rlhf.stats.intervals import mean_interval, proportion_interval


def outcome(values=(1.0, 0.0, 1.0, 1.0), *, task="hhh", ids=None, groups=None, metric="acc", **options):
    return Outcome(
        task=task,
        metric=metric,
        higher_is_better=options.pop("higher_is_better", True),
        ids=ids or [f"a:{i}" for i in range(len(values))],
        groups=groups or [""] * len(values),
        values={metric: list(values), **options.pop("more", {})},
        **options,
    )


def test_a_share_of_right_answers_has_wilsons_interval_and_other_means_student_s():
    assert outcome().mean() == proportion_interval(3, 4)
    assert outcome((1.0, 0.5, 1.0)).mean() == mean_interval([1.0, 0.5, 1.0])
    assert outcome((2.0, 3.0), metric="loss").mean() == mean_interval([2.0, 3.0])
    assert outcome((1.0, 1.0), more={"loss": [3.0, 5.0]}).mean("loss").mean == 4.0
    assert outcome((1.0,) * 5).mean().low < 1  # five right answers of five are no proof of perfection


def test_categories_count_by_items_or_each_the_same():
    made = outcome((1, 1, 1, 0, 0, 1), groups=["a", "a", "a", "a", "b", "b"])
    assert {name: e.mean for name, e in made.by_group().items()} == {"a": 0.75, "b": 0.5}
    assert made.macro().mean == pytest.approx((0.75 + 0.5) / 2)
    # the standard errors of the two means by hand: s / sqrt(n)
    errors = [math.sqrt(0.25 / 4), math.sqrt(0.5 / 2)]
    half = 1.959963984540054 * math.sqrt(sum(e * e for e in errors)) / 2
    assert made.macro().high - made.macro().mean == pytest.approx(half)
    assert outcome().by_group() == {}
    assert outcome().macro().mean == 0.75


def test_it_goes_through_json():
    made = outcome((0.25, 1.0), groups=["a", "b"], chance=0.5, notes=["x"], aggregate={"perplexity": 3.5})
    assert Outcome.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_two_models_are_paired_item_by_item():
    before, after = outcome((1.0, 0.0, 0.0, 1.0)), outcome((1.0, 1.0, 1.0, 0.0))
    found = paired(before, after)
    assert (found["before"], found["after"], found["diff"], found["n"]) == (0.5, 0.75, 0.25, 4)
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    changes = [0.0, 1.0, 1.0, -1.0]
    spread = math.sqrt(sum((c - 0.25) ** 2 for c in changes) / 3 / 4)
    assert found["ci95"] == pytest.approx(
        [0.25 - 3.182446305284263 * spread, 0.25 + 3.182446305284263 * spread]
    )


def test_where_less_is_better_a_fall_is_a_win():
    before = outcome((2.0, 2.0), metric="loss", higher_is_better=False, more={"acc": [0.0, 1.0]})
    after = outcome((1.0, 3.0), metric="loss", higher_is_better=False, more={"acc": [1.0, 1.0]})
    assert [paired(before, after)[key] for key in ("wins", "ties", "losses")] == [1, 0, 1]
    assert paired(before, after)["diff"] == 0
    assert [paired(before, after, "acc")[key] for key in ("wins", "ties", "losses")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (outcome(ids=["a:0", "a:1", "b:2", "a:3"]), "item 3 is a:2 for one and b:2 for the other"),
        (outcome((1.0, 0.0, 1.0)), "4 items and 3"),
        (outcome(task="lambada"), "cannot be compared with lambada"),
    ],
)
def test_different_items_are_not_paired(other, message):
    with pytest.raises(UserError, match=message):
        paired(outcome(), other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_model_without_finite_probabilities_is_told(value):
    with pytest.raises(UserError, match=r"hhh: acc of a:1 is .*not finite"):
        outcome((1.0, value))


def test_lists_that_do_not_fit_are_a_mistake_of_the_code():
    with pytest.raises(ValueError, match="lists of"):
        outcome(groups=["a"])
    with pytest.raises(ValueError, match="same id"):
        outcome((1.0, 1.0), ids=["a", "a"])
    with pytest.raises(ValueError, match="no values of the metric"):
        Outcome("hhh", "acc", True, [], [], {"loss": []})
