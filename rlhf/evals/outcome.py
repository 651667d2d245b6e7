"""What one model did on one task, item by item, and the comparison of two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf.errors import UserError
from rlhf.stats.intervals import (
    Z95,
    Estimate,
    mean_interval,
    paired_difference,
    proportion_interval,
    student95,
)


@dataclass(frozen=True)
class Outcome:
    """One model on one task.

    Raises:
        UserError: a value is not a finite number, as those of a broken model are not.
        ValueError: the lists do not fit each other.
    """

    task: str
    """Name of the task."""
    metric: str
    """The metric that stands for the task: a key of ``values``."""
    higher_is_better: bool
    """Whether a higher value of that metric is better."""
    ids: list[str]
    """Name of every item, all different; the same item has the same name for every model."""
    groups: list[str]
    """Category of every item, such as ``harmless``; "" where the task has none."""
    values: dict[str, list[float]]
    """Metric -> one value an item, in the order of ``ids``."""
    chance: float | None = None
    """What guessing gives on these items, in units of ``metric``; None where there is no guessing."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the figures must know."""
    aggregate: dict[str, float] = field(default_factory=dict)
    """Figures of the whole set that are no means of items, such as a perplexity."""

    def __post_init__(self) -> None:
        if self.metric not in self.values:
            raise ValueError(f"{self.task}: no values of the metric {self.metric}")
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(f"{self.task}: two items have the same id")
        lengths = {len(self.groups), *map(len, self.values.values())}
        if lengths != {len(self.ids)}:
            raise ValueError(f"{self.task}: {len(self.ids)} ids, but lists of {sorted(lengths)} entries")
        for metric, values in self.values.items():
            for name, value in zip(self.ids, values, strict=True):
                if not math.isfinite(value):
                    raise UserError(
                        f"{self.task}: {metric} of {name} is {value}: the model's probabilities are not "
                        "finite; check its weights, or load it with model.dtype=float32"
                    )

    @classmethod
    def of(
        cls,
        task: str,
        metric: str,
        items: Sequence[Any],
        rows: Sequence[Mapping[str, float]],
        *,
        higher_is_better: bool = True,
        **further: Any,
    ) -> Outcome:
        """The outcome of items, which have an ``id`` and, where there are categories, a ``group``.

        rows: metric -> value, of each item. further: ``chance``, ``notes`` and ``aggregate``.
        """
        ids, groups = [item.id for item in items], [getattr(item, "group", "") for item in items]
        values = {name: [row[name] for row in rows] for name in rows[0]}
        return cls(task, metric, higher_is_better, ids, groups, values, **further)

    def mean(self, metric: str | None = None) -> Estimate:
        """Mean over the items with its 95% interval: Wilson's where every value is 0 or 1, else normal.

        metric: None = the one that stands for the task.
        """
        return _estimate(self.values[metric or self.metric])

    def by_group(self) -> dict[str, Estimate]:
        """The mean of every category, in the order they come up; empty where the task has none."""
        found: dict[str, list[float]] = {}
        for group, value in zip(self.groups, self.values[self.metric], strict=True):
            found.setdefault(group, []).append(value)
        return {} if set(found) <= {""} else {group: _estimate(values) for group, values in found.items()}

    def macro(self, metric: str | None = None) -> Estimate:
        """Mean of the means of the categories, each counting the same: se = sqrt(sum se_g^2) / G, normal
        quantile.

        n is the number of items. A category of one item has no standard error, so neither has the macro mean.
        """
        parts: dict[str, list[float]] = {}
        for group, value in zip(self.groups, self.values[metric or self.metric], strict=True):
            parts.setdefault(group, []).append(value)
        means = [mean_interval(values) for values in parts.values()]
        if not means:
            return mean_interval([])
        center = sum(m.mean for m in means) / len(means)
        errors = [(m.high - m.mean) / student95(m.n - 1) for m in means]
        half = Z95 * math.sqrt(sum(e * e for e in errors)) / len(means)
        return Estimate(center, center - half, center + half, len(self.ids))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Outcome:
        """What :meth:`as_dict` gave, read back."""
        return cls(**value)


def _estimate(values: list[float]) -> Estimate:
    if values and set(values) <= {0.0, 1.0}:
        return proportion_interval(int(sum(values)), len(values))
    return mean_interval(values)


def paired(before: Outcome, after: Outcome, metric: str | None = None) -> dict[str, Any]:
    """Change of a metric on the same items: :func:`rlhf.stats.intervals.paired_difference`, and who won how
    often.

    metric: None = the one that stands for the task. Returns {before, after, diff, ci95, n, wins, ties,
    losses}; a win is an item on which ``after`` has the better value, by the task's direction for its own
    metric and by "higher is better" for any other.

    Raises:
        UserError: the two did different tasks or items.
    """
    if before.task != after.task:
        raise UserError(f"{before.task} cannot be compared with {after.task}: name one task")
    if before.ids != after.ids:
        raise UserError(
            f"{before.task}: the two models did different items "
            f"({_first_difference(before.ids, after.ids)}); evaluate both on the same files with the same "
            "limit and seed"
        )
    metric = metric or before.metric
    x, y = before.values[metric], after.values[metric]
    sign = 1.0 if before.higher_is_better or metric != before.metric else -1.0
    changes = [sign * (b - a) for a, b in zip(x, y, strict=True)]
    return {
        **paired_difference(x, y),
        "wins": sum(c > 0 for c in changes),
        "ties": sum(c == 0 for c in changes),
        "losses": sum(c < 0 for c in changes),
    }


def _first_difference(x: list[str], y: list[str]) -> str:
    for index, (a, b) in enumerate(zip(x, y, strict=False)):
        if a != b:
            return f"item {index + 1} is {a} for one and {b} for the other"
    return f"{len(x)} items and {len(y)}"
