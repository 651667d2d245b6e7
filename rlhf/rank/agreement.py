"""How far annotators agree: pairs of responses that they order alike, and Krippendorff's alpha.

Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability": 1 less the observed over the expected
disagreement. A unit here is a pair of responses to a prompt, its value what an annotator says of it: 1 the
first is better, -1 the second, 0 a tie. Each unit counts in both orders: which one is first says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

from rlhf.stats.intervals import cluster_mean_interval

Ranks = Sequence[int]


def verdicts(ranks: Ranks) -> list[int]:
    """Of each pair i < j of responses: 1 where i is better (of lower rank), -1 where j is, 0 for a tie."""
    return [(ranks[i] < ranks[j]) - (ranks[i] > ranks[j]) for i, j in combinations(range(len(ranks)), 2)]


def alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Krippendorff's alpha for interval data; None where nothing varies, or no unit has two values.

    units: the values that each unit got, one an annotator.
    """
    pairable = [Counter(values) for values in units if len(values) > 1]
    total = sum(pairable, Counter[float]())
    n = total.total()
    expected = _squares(total) / (n * (n - 1)) if n else 0.0
    if not expected:
        return None
    observed = sum(_squares(counts) / (counts.total() - 1) for counts in pairable) / n
    return 1 - observed / expected


def _squares(counts: Mapping[float, int]) -> float:
    """Sum of squared differences over all ordered pairs of values."""
    return sum(counts[a] * counts[b] * (a - b) ** 2 for a, b in permutations(counts, 2))


def agreement(items: Sequence[Mapping[str, Ranks]]) -> dict[str, Any]:
    """What the owner sees. items: the ranks of each prompt's responses by annotator.

    Returns:
        ``alpha``; ``pairwise``: the share of agreeing verdicts (mean and 95% interval over prompts; a tie
        against an order counts half), None without two annotators of one prompt; ``prompts``: how many have
        two; ``between``: the share of each two annotators and over how many pairs of responses.
    """
    units: list[list[int]] = []
    between: dict[tuple[str, str], list[float]] = {}
    shares: list[float] = []
    for answers in items:
        said = {name: verdicts(ranks) for name, ranks in answers.items()}
        for values in zip(*said.values(), strict=True):
            units += [list(values), [-value for value in values]]
        found: list[float] = []
        for one, other in combinations(sorted(said), 2):
            alike = [1 - abs(a - b) / 2 for a, b in zip(said[one], said[other], strict=True)]
            between.setdefault((one, other), []).extend(alike)
            found += alike
        if found:
            shares.append(sum(found) / len(found))
    interval = cluster_mean_interval(shares, [1] * len(shares)).as_dict() if shares else None
    return {
        "prompts": len(shares),
        "alpha": alpha(units),
        "pairwise": interval,
        "between": [[*names, sum(found) / len(found), len(found)] for names, found in between.items()],
    }
