"""The figures of the tax table: every variant on every task, each against the reference on the same items.

A difference is variant less reference, item by item, so its interval is that of paired items. A gain is that
difference with the sign turned where lower is better: positive is better than the reference in every task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.evals.outcome import Outcome, paired
from rlhf.stats.tests import sign_test

Figures = dict[str, Any]
VERDICTS = ("better", "worse", "open")
"""What can be told of a gain: it is above 0, below 0, or neither can be said."""
LEVEL = 0.05  # of the sign test
_GRADES = {0.0, 0.5, 1.0}  # wrong, tied, right


def task_figures(outcomes: Mapping[str, Outcome], reference: str) -> Figures:
    """One task's part of the table.

    Args:
        outcomes: by variant, the reference among them, all of one task.
        reference: the variant that the others are compared with.

    Returns:
        The task's settings, ``variants`` with each variant's figures, ``differences`` with each other
        variant's, all of it fit for JSON.
    """
    base = outcomes[reference]
    return {
        "task": base.task,
        "metric": base.metric,
        "higher_is_better": base.higher_is_better,
        "chance": base.chance,
        "items": len(base.ids),
        "groups": {group: base.groups.count(group) for group in dict.fromkeys(base.groups) if group},
        "notes": list(dict.fromkeys(note for o in outcomes.values() for note in o.notes)),
        "variants": {variant: variant_figures(outcome) for variant, outcome in outcomes.items()},
        "differences": {
            variant: difference(base, outcome)
            for variant, outcome in outcomes.items()
            if variant != reference
        },
    }


def variant_figures(outcome: Outcome) -> Figures:
    """One variant on one task: its headline with interval, all metrics, groups and aggregates."""
    return {
        **outcome.mean().as_dict(),
        "metrics": {metric: outcome.mean(metric).as_dict() for metric in outcome.values},
        "groups": {group: estimate.as_dict() for group, estimate in outcome.by_group().items()},
        "aggregate": dict(outcome.aggregate),
    }


def difference(reference: Outcome, other: Outcome) -> Figures:
    """A variant against the reference, on the items that both have.

    Returns:
        ``diff`` and ``ci95`` in units of the metric, variant less reference; ``gain`` and ``gain_ci95``,
        positive = better; ``verdict``, one of :data:`VERDICTS`; ``wins``, ``ties`` and ``losses``, item by
        item, and ``p_sign``, the sign test of wins against losses; ``unpaired``, items of one of the two
        only; the differences of the other metrics (without a direction) and of the groups.
    """
    before, after = common(reference, other)
    sign = 1.0 if reference.higher_is_better else -1.0
    headline = _gained(before, after, sign)
    others = {
        metric: {key: paired(before, after, metric)[key] for key in ("diff", "ci95", "n")}
        for metric in before.values
        if metric != before.metric and metric in after.values
    }
    groups = {}
    for group in dict.fromkeys(before.groups) if any(before.groups) else ():
        names = {i for i, g in zip(before.ids, before.groups, strict=True) if g == group}
        groups[group] = _gained(_only(before, names), _only(after, names), sign)
    return {
        **headline,
        "unpaired": len(set(reference.ids) ^ set(other.ids)),
        "metrics": others,
        "groups": groups,
    }


def _gained(before: Outcome, after: Outcome, sign: float) -> Figures:
    change = paired(before, after)
    diff, ends = change["diff"], change["ci95"]
    p_sign = sign_test(change["wins"], change["losses"])
    graded = {*before.values[before.metric], *after.values[before.metric]} <= _GRADES
    gain = None if diff is None else sign * diff
    gain_ends = None if ends is None else sorted(sign * end for end in ends)
    return {
        **{key: change[key] for key in ("diff", "ci95", "n")},
        "gain": gain,
        "gain_ci95": gain_ends,
        "verdict": verdict(gain_ends, p_sign if graded else None),
        **{key: change[key] for key in ("wins", "ties", "losses")},
        "p_sign": p_sign,
    }


def verdict(gain_ci95: Sequence[float] | None, p_sign: float | None = None) -> str:
    """What can be told of a gain.

    It is open without an interval, with one that touches 0 or has no width (items that all changed by the
    same amount do not show how far they vary), and with p_sign at :data:`LEVEL` or above.

    Args:
        gain_ci95: the ends of its interval.
        p_sign: of the sign test, where items are right or wrong: few of them change then, for which the
            normal interval is too narrow.
    """
    if gain_ci95 is None or gain_ci95[0] <= 0 <= gain_ci95[1] or gain_ci95[0] == gain_ci95[1]:
        return "open"
    if p_sign is not None and p_sign >= LEVEL:
        return "open"
    return "better" if gain_ci95[0] > 0 else "worse"


def common(one: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    """Two outcomes cut down to the items that both have, in the order of the first."""
    if one.ids == other.ids:
        return one, other
    names = set(one.ids) & set(other.ids)
    return _only(one, names), _reordered(_only(other, names), [i for i in one.ids if i in names])


def _only(outcome: Outcome, names: set[str]) -> Outcome:
    return _reordered(outcome, [i for i in outcome.ids if i in names])


def _reordered(outcome: Outcome, ids: list[str]) -> Outcome:
    place = {name: index for index, name in enumerate(outcome.ids)}
    at = [place[name] for name in ids]
    return dataclasses.replace(
        outcome,
        ids=ids,
        groups=[outcome.groups[i] for i in at],
        values={metric: [values[i] for i in at] for metric, values in outcome.values.items()},
    )


def intervals(tasks: Sequence[Figures]) -> int:
    """Number of intervals of differences in the table, so that the reader can allow for it."""
    return sum(len(task["differences"]) for task in tasks)


def verdicts(tasks: Sequence[Figures], variant: str) -> dict[str, list[str]]:
    """The tasks on which a variant is better or worse than the reference, or neither can be said."""
    found: dict[str, list[str]] = {name: [] for name in VERDICTS}
    for task in tasks:
        if variant in task["differences"]:
            found[task["differences"][variant]["verdict"]].append(task["task"])
    return found


def item_rows(outcomes: Mapping[str, Outcome]) -> list[Figures]:
    """One entry an item: task, id, group, and every metric's value by variant."""
    rows: dict[str, Figures] = {}
    for variant, outcome in outcomes.items():
        for index, name in enumerate(outcome.ids):
            row = rows.setdefault(
                name, {"task": outcome.task, "id": name, "group": outcome.groups[index], "values": {}}
            )
            for metric, values in outcome.values.items():
                row["values"].setdefault(metric, {})[variant] = values[index]
    return list(rows.values())
