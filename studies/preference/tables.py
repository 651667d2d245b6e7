"""What the finished units say, put together over seeds: credits, paired differences and tables."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from rlhf.stats.intervals import SHARE, Estimate
from studies.engine.ladder import matrix_weights
from studies.engine.results import Results
from studies.engine.seeds import SeedMean, over_seeds
from studies.engine.verdicts import shown
from studies.preference.measure import Floats, from_text
from studies.preference.plan import ARMS

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


def mean_of(items: Iterable[Floats]) -> Estimate:
    """Mean over seeds of a value an item, as the credits of pairs, one array a seed."""
    return over_seeds([SeedMean.of(x) for x in items])


def accuracy_of(items: Iterable[Floats]) -> Estimate:
    """The same of credits, whose mean is a share: the interval is cut at 0 and 1."""
    return mean_of(items).cut(SHARE)


def versus_credits(
    results: Results, data: str, layers: int, arm: str, score: str, labels: str = "true"
) -> list[Floats]:
    """Credits of the test pairs, one array a seed."""
    found = results.by_seed("versus", data=data, layers=layers, arm=arm, labels=labels)
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
    found = results.by_seed("finetune", layers=layers, target=target, arm=arm, pairs=pairs)
    return [from_text(r["credit"]) for r in found]


def transfer_gap(
    results: Results, layers: int, target: str, arm: str, other: str, *, less_many: bool = False
) -> Estimate:
    """Accuracy of one arm less another's, mean over the small numbers of pairs (0 is none), over seeds.

    less_many: less the same at the largest number of pairs.
    """

    def gaps(pairs: int) -> list[Floats]:
        one, two = (transfer_credits(results, layers, target, a, pairs) for a in (arm, other))
        return [x - y for x, y in zip(one, two, strict=True)]

    tried = results.values("finetune", "pairs", target=target)
    small = [gaps(n) for n in tried if 0 < n <= FEW]
    means = [np.mean(of_seed, axis=0) for of_seed in zip(*small, strict=True)]
    if less_many:
        means = [m - g for m, g in zip(means, gaps(tried[-1]), strict=True)]
    return mean_of(means)


def versus_rows(results: Results, data: str) -> list[list[str]]:
    """The table under :data:`VERSUS_COLUMNS`: a row a size."""
    rows = []
    sizes = results.values("versus", "layers")
    for layers in sizes:

        def credited(arm: str, score: str, labels: str = "true", layers: int = layers) -> Estimate:
            return accuracy_of(versus_credits(results, data, layers, arm, score, labels))

        best = best_imitation(results, data, layers)
        perfect = shuffled = "-"
        if data == "ranked":
            ceilings = [credited("il", f"perfect imitation, {s}") for s in ("sum", "mean")]
            perfect = shown(max(ceilings, key=lambda e: e.mean))
            if layers == sizes[0]:
                shuffled = shown(credited("pm", "score", "shuffled"))
        scores = [shown(credited("pm", "score")), shown(credited("il", best)), best]
        scores += [shown(credited("il", "sum less language model")), perfect, shuffled]
        rows.append([str(layers), f"{matrix_weights(layers):,}", *scores])
    return rows


def transfer_rows(results: Results, target: str) -> list[list[str]]:
    """The table under :data:`TRANSFER_COLUMNS`: a row a size and number of pairs."""
    return [
        [target, str(layers), str(pairs)]
        + [shown(accuracy_of(transfer_credits(results, layers, target, arm, pairs))) for arm in ARMS]
        for layers in results.values("finetune", "layers")
        for pairs in results.values("finetune", "pairs", target=target)
    ]
