"""What the finished units say, put together over seeds: lookups, paired differences and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.stats.intervals import Estimate
from studies.preference.ladder import matrix_weights
from studies.preference.measure import SeedMean, from_text, over_seeds
from studies.preference.plan import ARMS
from studies.preference.work import Settings, Unit

Floats = NDArray[np.float64]
FEW = 500  # claims 3 and 4: up to so many finetuning pairs are few
VERSUS_COLUMNS = (
    "L",
    "N",
    "PM",
    "imitation, best",
    "its score",
    "less language model",
    "perfect imitation",
    "PM, shuffled labels",
)
TRANSFER_COLUMNS = ("target", "L", "pairs", "no PMP", "control", "ranked PMP", "binary PMP")


@dataclass(frozen=True)
class Results:
    """The finished units: (kind, settings) and what each found."""

    units: Sequence[tuple[str, Settings, dict[str, Any]]]

    @classmethod
    def of(cls, units: Iterable[Unit], found: Iterable[dict[str, Any]]) -> Results:
        """Put units and the results kept for them together."""
        return cls([(u.kind, u.settings, f["result"]) for u, f in zip(units, found, strict=True)])

    def one(self, kind: str, **settings: Any) -> dict[str, Any]:
        """The result of the one unit with these settings."""
        found = [r for k, s, r in self.units if k == kind and all(s.get(x) == v for x, v in settings.items())]
        if len(found) != 1:
            raise KeyError(f"{len(found)} results for {kind} {settings}")
        return found[0]

    def values(self, kind: str, name: str) -> list[Any]:
        """The values a setting takes among the units of a kind, in ascending order."""
        return sorted({s[name] for k, s, _ in self.units if k == kind})


def in_words(estimate: Estimate, digits: int = 3) -> str:
    """An estimate as text: mean [low, high]."""
    return f"{estimate.mean:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def accuracy(credits: Iterable[Floats]) -> Estimate:
    """Accuracy over seeds from the credits of each seed."""
    return over_seeds([SeedMean.of(c) for c in credits])


def versus_credits(
    results: Results, data: str, layers: int, arm: str, score: str, labels: str = "true"
) -> list[Floats]:
    """Credits of the test pairs, one array a seed."""
    found = by_seed(results, "versus", data=data, layers=layers, arm=arm, labels=labels)
    return [from_text(r["credits"][score]) for r in found]


def best_imitation(results: Results, data: str, layers: int) -> str:
    """Which score of imitation orders more test pairs rightly, the sum or the mean."""
    right = {s: np.mean(versus_credits(results, data, layers, "il", s)) for s in ("mean", "sum")}
    return max(right, key=lambda score: right[score])


def versus_gaps(results: Results, data: str, layers: int) -> list[Floats]:
    """Per test pair: credit of the PM less that of imitation, one array a seed."""
    pm = versus_credits(results, data, layers, "pm", "score")
    il = versus_credits(results, data, layers, "il", best_imitation(results, data, layers))
    return [p - i for p, i in zip(pm, il, strict=True)]


def transfer_credits(results: Results, layers: int, target: str, arm: str, pairs: int) -> list[Floats]:
    """Credits of the target's test pairs after finetuning on so many pairs, one array a seed."""
    found = by_seed(results, "finetune", layers=layers, target=target, arm=arm, pairs=pairs)
    return [from_text(r["credit"]) for r in found]


def transfer_pairs(results: Results, target: str) -> list[int]:
    """The numbers of finetuning pairs tried for a target."""
    return sorted({s["pairs"] for k, s, _ in results.units if k == "finetune" and s["target"] == target})


def transfer_gap(
    results: Results, layers: int, target: str, arm: str, other: str, *, few: bool, less_many: bool = False
) -> list[SeedMean]:
    """Accuracy of one arm less another's, mean over the small numbers of pairs (0 is none); one entry a seed.

    less_many: less the same at the largest number of pairs.
    """

    def gaps(pairs: int) -> list[Floats]:
        one, two = (transfer_credits(results, layers, target, a, pairs) for a in (arm, other))
        return [x - y for x, y in zip(one, two, strict=True)]

    tried = transfer_pairs(results, target)
    small = [gaps(n) for n in tried if 0 < n <= FEW]
    means = [np.mean(of_seed, axis=0) for of_seed in zip(*small, strict=True)]
    if less_many:
        means = [m - g for m, g in zip(means, gaps(tried[-1]), strict=True)]
    return [SeedMean.of(m) for m in means]


def by_seed(results: Results, kind: str, **settings: Any) -> list[dict[str, Any]]:
    """The results of all seeds for otherwise these settings, by ascending seed."""
    return [results.one(kind, seed=seed, **settings) for seed in results.values(kind, "seed")]


def versus_rows(results: Results, data: str) -> list[list[str]]:
    """The table under :data:`VERSUS_COLUMNS`: a row a size."""
    rows = []
    sizes = results.values("versus", "layers")
    for layers in sizes:
        best = best_imitation(results, data, layers)
        cells = [
            in_words(accuracy(versus_credits(results, data, layers, arm, score)))
            for arm, score in (("pm", "score"), ("il", best), ("il", "sum less language model"))
        ]
        perfect = shuffled = "-"
        if data == "ranked":
            ceilings = [
                versus_credits(results, data, layers, "il", f"perfect imitation, {s}")
                for s in ("sum", "mean")
            ]
            perfect = in_words(max(map(accuracy, ceilings), key=lambda e: e.mean))
            if layers == sizes[0]:
                shuffled = in_words(
                    accuracy(versus_credits(results, data, layers, "pm", "score", labels="shuffled"))
                )
        rows.append(
            [
                str(layers),
                f"{matrix_weights(layers):,}",
                cells[0],
                cells[1],
                best,
                cells[2],
                perfect,
                shuffled,
            ]
        )
    return rows


def transfer_rows(results: Results, target: str) -> list[list[str]]:
    """The table under :data:`TRANSFER_COLUMNS`: a row a size and number of pairs."""
    return [
        [target, str(layers), str(pairs)]
        + [in_words(accuracy(transfer_credits(results, layers, target, arm, pairs))) for arm in ARMS]
        for layers in results.values("finetune", "layers")
        for pairs in transfer_pairs(results, target)
    ]
