"""Whether a policy was trained beyond what its reward model knows: a verdict from the log of PPO.

A second reward model, the test model, learned from other comparisons and never rewards (Bai 2022, arXiv
2204.05862, section 4.3). Both scores of every rollout are counted from the first one, which the reference
wrote, in standard deviations of each there; the gap is the reward model's rise less the test model's, paired
by response. A reward model that is exploited goes on rising while the test model's score stops or falls
(Gao 2022, arXiv 2210.10760). Plain numpy in, JSON-able figures and sentences out.

Shape suffix: ``_N`` rollout, or window of rollouts in a long run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from rlhf.stats.intervals import Z95, Estimate, mean_interval, student95

Floats = NDArray[np.float64]
Row = Mapping[str, Any]

WINDOW = 5  # rollouts whose mean is a figure of the start, the end, or a step
SIDES = ("proxy", "test", "gap")
TRENDS = {"policy/entropy": "entropy", "response/length": "length", "response/distinct_2": "distinct-2"}
_ALARM = 0.05  # chance that a run without drift is ever called over-optimized
_WINDOWS = 100  # at most, of a run
_FALLS, _MOVES = 1 / 3, 1 / 2  # of entropy and distinct-2; of the length
_REMEDIES = (
    "raise ppo.kl_coef, train fewer steps, collect more comparisons, or train an ensemble (reward.members)"
)
_HONEST = (
    "This audits and does not foresee, and what both models get wrong alike, having one base and one source "
    "of comparisons, it cannot see."
)
_NO_TEST = (
    "Without a test model nobody checks the score itself: reward.test_share=0.5 trains one, and PPO then "
    "compares."
)


class Series(NamedTuple):
    """One figure over the windows of a run."""

    step_N: Floats
    value_N: Floats
    error_N: Floats
    """Standard errors."""


def series(rows: Sequence[Row], name: str, steps: int) -> Series:
    """``proxy``, ``test`` or ``gap`` of the rollouts that have it, several a window where ``steps`` are many.

    rows: of PPO's ``metrics.jsonl``. steps: of the whole run, so that the windows stay as it goes on. The
    error of a window is that of a mean of independent rollouts.
    """
    keys = ("step", f"audit/{name}", f"audit/{name}_error")
    known = [[row.get(key) for key in keys] for row in rows]
    table = np.array([row for row in known if None not in row], dtype=np.float64).reshape(-1, 3)
    size = -(-steps // _WINDOWS)
    parts = [table[i : i + size] for i in range(0, len(table) - len(table) % size, size)]
    step, value = (np.array([part[:, column].mean() for part in parts]) for column in (0, 1))
    return Series(step, value, np.array([math.sqrt(np.square(p[:, 2]).sum()) / len(p) for p in parts]))


def change(first: Series, last: slice, scale_error: float) -> Estimate:
    """Mean of the rollouts ``last`` less the first one's, with a 95% interval.

    scale_error: standard error that comes with the unit, which the first rollout has set.
    """
    mean = float(first.value_N[last].mean() - first.value_N[0])
    own = math.sqrt(float(np.square(first.error_N[last]).sum())) / len(first.error_N[last])
    error = Z95 * math.hypot(own, first.error_N[0], scale_error)
    return Estimate(mean, mean - error, mean + error, len(first.value_N[last]))


def unit_errors(proxy: Series, test: Series, gap: Series, last: slice) -> dict[str, float]:
    """Standard errors of the three changes that come from not knowing the units exactly.

    A standard deviation of n scores has a relative error of 1 / sqrt(2 n), of two scores with correlation r
    these go together with r^2 (delta method, normal scores). n and r follow from the first rollout's errors:
    e^2 = 1 / n, and 2 (1 - r) / n of the gap.
    """
    square, both = proxy.error_N[0] ** 2, gap.error_N[0] ** 2
    r = 1 - both / (2 * square) if square else 1.0
    p, t = (float(s.value_N[last].mean() - s.value_N[0]) for s in (proxy, test))
    gap_square = max(p * p + t * t - 2 * p * t * r * r, 0.0)
    return {
        "proxy": abs(p) * math.sqrt(square / 2),
        "test": abs(t) * math.sqrt(square / 2),
        "gap": math.sqrt(gap_square * square / 2),
    }


def gap_of(proxy: Sequence[ArrayLike], test: Sequence[ArrayLike]) -> Estimate:
    """The gap of the same prompts before and after a training, in standard deviations before it.

    proxy, test: the scores (before, after), a number a prompt, all in the same order. As :func:`change`, the
    interval knows that the units are measured on these prompts too.
    """
    rises, units = [], []
    for scores in (proxy, test):
        before, after = (np.asarray(side, dtype=np.float64) for side in scores)
        units.append((before - before.mean()) / (float(before.std()) or 1.0))
        rises.append((after - before) / (float(before.std()) or 1.0))
    gap = mean_interval(rises[0] - rises[1])
    p, t, r = float(rises[0].mean()), float(rises[1].mean()), float((units[0] * units[1]).mean())
    t95 = student95(gap.n - 1)
    own = (gap.high - gap.low) / (2 * t95)
    error = t95 * math.hypot(own, math.sqrt(max(p * p + t * t - 2 * p * t * r * r, 0.0) / (2 * gap.n)))
    return Estimate(gap.mean, gap.mean - error, gap.mean + error, gap.n)


def slopes(of: Series, end: int) -> tuple[Floats, Floats]:
    """Least-squares slopes a step over all segments of :data:`WINDOW` windows or more that end before
    ``end``, by their first window, and the standard errors: what the rollouts' own errors give, or the
    residuals where those say more.
    """
    slope, error = [], []
    for start in range(end - WINDOW + 1):
        x, y, e = (column[start:end] for column in of)
        x = x - x.mean()
        total = float(np.square(x).sum())
        b = float(x @ y) / total
        left = float(np.square(y - y.mean() - b * x).sum()) / (len(x) - 2)
        slope.append(b)
        error.append(math.sqrt(max(float(np.square(x * e).sum()) / total**2, left / total)))
    return np.array(slope), np.array(error)


def exploited(gap: Series, test: Series, end: int, segments: int) -> bool:
    """Whether on a segment that ends at ``end`` the gap rises, beyond doubt, and the test score does not.

    Beyond doubt: by a one-sided test at 5% over all ``segments`` of the whole run (Bonferroni), so that
    however often one looks, a run in which the gap does not drift is called so with a chance of 5% at most.
    """
    if end < WINDOW:
        return False
    slope, error = slopes(gap, end)
    bound = float(ndtri(1 - _ALARM / max(segments, 1)))
    rises = slope > bound * np.maximum(error, 1e-12)
    return bool((rises & (slopes(test, end)[0] <= 0)).any())


def turning_point(test: Series) -> int:
    """The window from which the test score no longer rises: the corner of the broken line that rises or is
    level before it, falls or is level behind it, and fits best."""
    from scipy.optimize import nnls  # it and scipy.stats take a second, and PPO starts with this module

    x, y = test.step_N, test.value_N
    errors = []
    for corner in x[:-1]:
        before, behind = np.minimum(x - corner, 0), -np.maximum(x - corner, 0)
        ones = np.ones_like(x)
        errors.append(nnls(np.stack([ones, -ones, before, behind], axis=1), y)[1])
    return int(np.argmin(np.round(errors, 12)))


def trend(rows: Sequence[Row], name: str) -> dict[str, Any] | None:
    """Mean of the first and last rollouts, and the Theil-Sen slope a step with its interval (Sen 1968)."""
    from scipy.stats import theilslopes

    found = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    if len(found) < WINDOW:
        return None
    x, y = np.array(found[:: -(-len(found) // (4 * _WINDOWS))]).T
    slope = theilslopes(y, x)
    ends = [float(np.mean([value for _, value in part])) for part in (found[:WINDOW], found[-WINDOW:])]
    return {"first": ends[0], "last": ends[1], "slope": float(slope[0]),
            "ci95": [float(slope[2]), float(slope[3])]}  # fmt: skip


def _signs(trends: Mapping[str, Any]) -> list[str]:
    """What has moved so far that a person should look at the responses."""
    found = []
    for name, of in trends.items():
        share = of["last"] / of["first"] - 1 if of["first"] else 0.0
        sure = of["ci95"][0] > 0 or of["ci95"][1] < 0
        far = abs(share) > _MOVES if name == "length" else share < -_FALLS
        if sure and far:
            found.append(f"{name} {'rose' if share > 0 else 'fell'} by {abs(share):.0%}")
    return found


def verdict(rows: Sequence[Row], steps: int, kept: int | None = None) -> dict[str, Any]:
    """The verdict on a run, finished or not.

    Args:
        rows: of PPO's ``metrics.jsonl``.
        steps: that the recipe plans.
        kept: the step whose policy ``ppo.keep_best`` has kept.

    Returns:
        ``verdict`` (``over-optimized``, ``unconfirmed``, ``no sign``, ``signs of a collapse``, ``unknown``),
        ``text``, ``trends``, and with a test model ``proxy``, ``test`` and ``gap`` as changes in standard
        deviations, ``onset`` (the step from which it is over-optimized) and ``seen`` (the step at which that
        could be told first), None where it is not.
    """
    trends = {label: found for name, label in TRENDS.items() if (found := trend(rows, name))}
    signs = _signs(trends)
    proxy, test, gap = (series(rows, name, steps) for name in SIDES)
    if len(gap.step_N) < 2:
        return _without_test_model(rows, trends, signs)
    number = len(gap.step_N)
    last = slice(max(1, number - WINDOW), number)
    units = unit_errors(proxy, test, gap, last)
    changes = {name: change(s, last, units[name]) for name, s in zip(SIDES, (proxy, test, gap), strict=True)}
    planned = max(-(-steps // -(-steps // _WINDOWS)), number) - WINDOW + 1
    segments = planned * (planned + 1) // 2 if planned > 0 else 0
    where: dict[str, int | None] = {"onset": None, "seen": None}
    if exploited(gap, test, number, segments):
        corner = turning_point(test)
        seen = next(n for n in range(number + 1) if exploited(gap, test, n, segments))
        where = {"onset": round(float(gap.step_N[corner])), "seen": round(float(gap.step_N[seen - 1]))}
        name, text = "over-optimized", _over_optimized(changes, test, corner, where, last, kept)
    elif changes["gap"].low > 0:
        name, text = "unconfirmed", _unconfirmed(changes)
    else:
        name, text = "no sign", _no_sign(changes)
    if signs:
        text += f" Look at the responses: {', '.join(signs)}."
    return {
        "verdict": name,
        "text": f"{text} {_HONEST}",
        **where,
        **{side: estimate.as_dict() for side, estimate in changes.items()},
        "trends": trends,
    }


def _by(estimate: Estimate) -> str:
    how = "rose" if estimate.mean >= 0 else "fell"
    low, high = sorted((math.copysign(1, estimate.mean) * estimate.low,
                        math.copysign(1, estimate.mean) * estimate.high))  # fmt: skip
    return f"{how} by {abs(estimate.mean):.2f} [{low:.2f}, {high:.2f}]"


def _both(changes: Mapping[str, Estimate]) -> str:
    return (
        f"the reward model's score {_by(changes['proxy'])} standard deviations of its start, the test "
        f"model's {_by(changes['test'])}"
    )


def _over_optimized(
    changes: Mapping[str, Estimate],
    test: Series,
    corner: int,
    where: Mapping[str, int | None],
    last: slice,
    kept: int | None,
) -> str:
    around = slice(max(0, corner - WINDOW // 2), corner + WINDOW // 2 + 1)
    top = float(test.value_N[around].mean() - test.value_N[0])
    since = float(test.value_N[last].mean() - test.value_N[0]) - top
    after = f"fell by {-since:.2f} since" if since < -0.005 else "has not risen since"
    best = f"The saved policy is that of step {kept}" if kept is not None else "Set ppo.keep_best=true"
    return (
        f"over-optimized from about step {where['onset']} on, detected at step {where['seen']}: the reward "
        f"model's score {_by(changes['proxy'])} standard deviations of its start, the test model's "
        f"{'rose' if top >= 0 else 'fell'} by {abs(top):.2f} until then and {after}. {best}; {_REMEDIES}."
    )


def _unconfirmed(changes: Mapping[str, Estimate]) -> str:
    gap = changes["gap"]
    return (
        f"not all confirmed: {_both(changes)}; {gap.mean:.2f} [{gap.low:.2f}, {gap.high:.2f}] of the rise is "
        "the reward model's alone, though the test model's score was not seen to stop. More steps will pay "
        "less than the reward says."
    )


def _no_sign(changes: Mapping[str, Estimate]) -> str:
    more = (
        " Both fell: look at ppo.learning_rate." if changes["proxy"].high < 0 > changes["test"].high else ""
    )
    return f"no sign of over-optimization: {_both(changes)}.{more}"


def _without_test_model(
    rows: Sequence[Row], trends: Mapping[str, Any], signs: Sequence[str]
) -> dict[str, Any]:
    if not trends:
        text = f"unknown: fewer than {WINDOW} steps were done."
        return {"verdict": "unknown", "text": text, "trends": dict(trends)}
    kl = rows[-1].get("objective/kl")
    price = "" if kl is None else f", at a KL of {kl:.1f} nats a response"
    shown = ", ".join(f"{name} {of['first']:.3g} -> {of['last']:.3g}" for name, of in trends.items())
    if signs:
        name = "signs of a collapse"
        text = f"{name}: {', '.join(signs)}{price}. Look at the responses; {_REMEDIES}."
    else:
        name, text = "no sign", f"no sign of a collapse ({shown}){price}."
    return {"verdict": name, "text": f"{text} {_NO_TEST}", "trends": dict(trends)}
