"""How well anybody could do: agreement of annotators, and of judgments of the same pair. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from reward.card.clusters import suite_item
from rlhf.data.comparisons import Comparison, prompt_key
from rlhf.stats import clustered
from rlhf.stats.clustered import Indices
from rlhf.stats.intervals import Estimate

MOST_RESPONSES = 20  # of a comparison whose pairs are looked up
MOST_PAIRS = 500_000  # pairs kept in memory


def annotator_agreement(comparisons: Sequence[Comparison], of_C: Indices) -> dict[str, Any] | None:
    """Mean ``confidence`` of the comparisons that carry one, with their number; None where none does.

    Where it is the share of the annotators behind the majority, an annotator drawn at random is right on so
    many pairs, which is more than one annotator can promise of another.
    """
    known = [i for i, c in enumerate(comparisons) if c.confidence is not None]
    if not known:
        return None
    sure = np.array([comparisons[i].confidence for i in known], dtype=np.float64)
    return {**clustered.share(sure, of_C[known]).as_dict(), "pairs": len(known)}


def duplicate_agreement(comparisons: Iterable[Comparison]) -> dict[str, Any] | None:
    """Of two judgments of the same pair, how often they agree; None where no pair was judged twice.

    comparisons: as they were read, repeats among them. A pair with a judgments for the one response and b
    for the other has a (a - 1) / 2 + b (b - 1) / 2 couples that agree, of (a + b) (a + b - 1) / 2; the pairs
    are the clusters, and each counts the same. A tie is no judgment, and items of benchmarks, which repeat
    texts, are none; that a row is a copy of another cannot be seen, and counts as agreement. Looked
    at are the first :data:`MOST_PAIRS` pairs, in comparisons of up to :data:`MOST_RESPONSES` responses.
    """
    votes: dict[bytes, list[int]] = {}
    for c in comparisons:
        if len(c.responses) > MOST_RESPONSES or suite_item(c.group):
            continue
        prompt = prompt_key(c.prompt)
        texts = [r.strip() for r in c.responses]
        for (a, rank), (b, other) in combinations(zip(texts, c.ranks, strict=True), 2):
            if rank == other or a == b:
                continue
            # both lengths are in the key, so no two pairs share their text
            text = f"{prompt}{len(min(a, b))}:{min(a, b)}{max(a, b)}".encode("utf-8", "surrogatepass")
            key = hashlib.blake2b(text, digest_size=16).digest()
            if key not in votes and len(votes) >= MOST_PAIRS:
                continue
            votes.setdefault(key, [0, 0])[(a < b) != (rank < other)] += 1
    agreed = [(x * (x - 1) + y * (y - 1)) / ((x + y) * (x + y - 1)) for x, y in votes.values() if x + y > 1]
    if not agreed:
        return None
    return {**clustered.share(np.array(agreed), np.arange(len(agreed))).as_dict(), "pairs": len(agreed)}


def from_manifest(figure: Any) -> dict[str, Any] | None:
    """A figure that a manifest has, {mean, ci95, n}, or a bare number; None where it is neither."""
    if isinstance(figure, int | float) and not isinstance(figure, bool):
        return Estimate(float(figure), float("nan"), float("nan"), 0).as_dict()
    return dict(figure) if isinstance(figure, dict) and {"mean", "ci95", "n"} <= figure.keys() else None
