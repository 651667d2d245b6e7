"""From finished units to figures: every number at every rung, and its trend. No verdict is made here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.stats.intervals import AT_LEAST_0, SHARE, UNBOUNDED, Z95, Estimate
from studies.engine.results import Results
from studies.engine.seeds import SeedMean, over_seeds
from studies.scaling.data.items import TASKS
from studies.scaling.plan import ARMS, BASE, PPO, PTX
from studies.scaling.trend import Trend, fit

Floats = NDArray[np.float64]
LOSS, WORD, JUDGED = ("lm_loss", "nats_per_byte"), ("last_word", "acc"), ("judged", "score")
UNITS = {"nats_per_byte": "nats a byte", "acc": "share right", "score": "VADER, -1 to 1"}
UNITS |= {"nll": "nats a word", "total_logprob": "ln of the mass", "nats_per_token": "nats a token"}
DISTILLED = {
    "kl_before": ("KL(teacher || student) before", "nats a token"),
    "kl_after": ("KL(teacher || student) after", "nats a token"),
    "kl_recovered": ("share of that KL that is gone", "share"),
    "prompt_gain": ("log-prob that the context gives", "nats a token"),
    "distilled_gain": ("log-prob that distillation gives", "nats a token"),
    "log_prob_recovered": ("share of the context's log-prob", "share"),
}


@dataclass(frozen=True)
class RungOf:
    """A place on the ladder. size: N. setting, value: of its units, ``layers`` or ``model``."""

    size: float
    value: Any
    setting: str = "layers"

    @property
    def label(self) -> str:
        """``L = 2``, or the model's name."""
        return f"L = {self.value}" if self.setting == "layers" else str(self.value)


@dataclass(frozen=True)
class Figure:
    """One number over the ladder.

    group: the heading it stands under. points: for every rung one a seed.
    """

    group: str
    name: str
    unit: str
    rungs: Sequence[RungOf]
    points: Sequence[Sequence[SeedMean]]
    bounds: tuple[float, float] = UNBOUNDED

    @property
    def estimates(self) -> list[Estimate]:
        """At every rung, over the seeds; intervals are cut at the bounds."""
        return [over_seeds(seeds).cut(self.bounds) for seeds in self.points]

    @property
    def trend(self) -> Trend | None:
        """Over the rungs; None with fewer than three."""
        return fit([r.size for r in self.rungs], self.points)

    def as_dict(self) -> dict[str, Any]:
        """The figure for JSON."""
        trend = self.trend
        return {
            "group": self.group,
            "name": self.name,
            "unit": self.unit,
            "rungs": [
                {"rung": r.label, "N": r.size, **e.as_dict()}
                for r, e in zip(self.rungs, self.estimates, strict=True)
            ],
            "trend": None if trend is None else trend.as_dict(),
        }


class Study(Results):
    """The finished units of a study, by rung, seed and arm."""

    @cached_property
    def rungs(self) -> list[RungOf]:
        """In the order of their size."""
        sizes: dict[tuple[str, Any], float] = {}
        for unit, content in zip(self.units, self.found, strict=True):
            if unit.kind == "rung":
                setting = "layers" if "layers" in unit.settings else "model"
                sizes[setting, unit.settings[setting]] = float(content["result"]["N"])
        in_order = sorted(sizes.items(), key=itemgetter(1))
        return [RungOf(size, value, setting) for (setting, value), size in in_order]

    @cached_property
    def seeds(self) -> list[int]:
        """In ascending order."""
        return self.values("rung", "seed")

    @cached_property
    def tasks(self) -> list[str]:
        """Ours, then the public ones."""
        ours = [LOSS[0], WORD[0], JUDGED[0], *TASKS]
        there = self.result("evaluate", self.rungs[0], self.seeds[0], arm=BASE)
        return [*ours, *sorted(set(there) - set(ours))]

    def result(self, kind: str, rung: RungOf, seed: int, **settings: Any) -> dict[str, Any]:
        """The result of one unit."""
        return self.one(kind, seed=seed, **{rung.setting: rung.value}, **settings)

    def items(self, task: str, metric: str, arm: str, rung: RungOf, seed: int) -> Floats:
        """The values of every item."""
        return np.asarray(self.result("evaluate", rung, seed, arm=arm)[task][metric], dtype=np.float64)

    def points(self, point: Callable[[RungOf, int], SeedMean]) -> list[list[SeedMean]]:
        """Something at every rung and seed."""
        return [[point(rung, seed) for seed in self.seeds] for rung in self.rungs]

    def level(self, task: str, metric: str, arm: str) -> Figure:
        """A metric of an arm."""
        points = self.points(lambda rung, seed: SeedMean.of(self.items(task, metric, arm, rung, seed)))
        bounds = {"acc": SHARE, "score": (-1.0, 1.0)}.get(metric, UNBOUNDED)
        return Figure(f"{task}, {metric}", arm, UNITS.get(metric, metric), self.rungs, points, bounds)

    def change(self, task: str, metric: str, arm: str, before: str = BASE, sign: float = 1.0) -> Figure:
        """A metric of an arm less that of another one, item by item; sign -1 turns it round."""

        def point(rung: RungOf, seed: int) -> SeedMean:
            after, first = (self.items(task, metric, a, rung, seed) for a in (arm, before))
            return SeedMean.of(sign * (after - first))

        name = f"{arm} less {before}" if sign > 0 else f"{before} less {arm}"
        unit = UNITS.get(metric, metric)
        return Figure(f"{task}, {metric}, paired", name, unit, self.rungs, self.points(point))

    def tax(self, of: tuple[str, str], arm: str) -> Figure:
        """What an arm lost against the base: loss gained, or accuracy lost. Above 0 = it pays."""
        return self.change(*of, arm, sign=1.0 if of == LOSS else -1.0)

    def distillation(self, key: str) -> Figure:
        """A figure of the distillation report; NaN where the report leaves it open."""

        points = self.points(lambda rung, seed: point_of(self.result("distil", rung, seed)[key]))
        bounds = AT_LEAST_0 if DISTILLED[key][0].startswith("KL") else UNBOUNDED
        return Figure("context distillation", *DISTILLED[key], self.rungs, points, bounds)

    def training(self, arm: str, key: str, name: str, unit: str) -> Figure:
        """A figure of the PPO log."""
        points = self.points(lambda rung, seed: SeedMean(self.result("ppo", rung, seed, arm=arm)[key]))
        bounds = AT_LEAST_0 if name.startswith(("KL", "entropy")) else UNBOUNDED
        return Figure("PPO, last tenth of its steps", f"{arm}: {name}", unit, self.rungs, points, bounds)

    def metrics(self, task: str) -> list[str]:
        """The metrics of a task."""
        return list(self.result("evaluate", self.rungs[0], self.seeds[0], arm=BASE)[task])


def point_of(estimate: dict[str, Any] | None) -> SeedMean:
    """An estimate of :meth:`Estimate.as_dict` as a point; NaN where there is none."""
    if estimate is None or estimate["mean"] is None:
        return SeedMean(math.nan)
    ends = estimate["ci95"]
    return SeedMean(estimate["mean"], math.nan if ends is None else abs(ends[1] - ends[0]) / 2 / Z95)


def all_figures(study: Study) -> list[Figure]:
    """Every figure of a study, in the order of the page."""
    made = [study.distillation(key) for key in DISTILLED]
    for arm in (PPO, PTX):
        made += [
            study.training(arm, "score_last", "reward", "VADER, -1 to 1"),
            study.training(arm, "kl_last", "KL to the rung", "nats a response"),
            study.training(arm, "entropy_last", "entropy", "nats a token"),
        ]
    headline = [LOSS, WORD, JUDGED, *((task, "acc") for task in study.tasks if task in TASKS)]
    for task in study.tasks:
        for metric in study.metrics(task):
            made += [study.level(task, metric, arm) for arm in ARMS]
            if (task, metric) in headline or task not in {t for t, _ in headline}:
                made += [study.change(task, metric, arm) for arm in ARMS if arm != BASE]
                made += [study.change(task, metric, PTX, before=PPO)]
    return made
