"""Reward variance within a prompt against between prompts. No torch. ``_R`` response, ``_P`` prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf.data.comparisons import Comparison
from rlhf.stats import clustered
from rlhf.stats.clustered import Floats, Indices


def variance_components(scores_R: Floats, prompt_R: Indices) -> tuple[float, float]:
    """Variance of the scores within prompts, and of the prompts' means; NaN where it is not known.

    prompt_R: the prompt of each response, an integer. The estimators of the one-way analysis of variance with
    random prompts of unequal size (Searle, Casella and McCulloch 1992, section 3.6): within = sum of squares
    around the prompts' means / (R - P); between = (mean square between - within) / n0, at least 0, with
    n0 = (R - sum n_p^2 / R) / (P - 1). Within is unknown where no prompt has two responses, between also
    where there is one prompt.
    """
    names, of_R = np.unique(prompt_R, return_inverse=True)
    count_P = np.bincount(of_R).astype(np.float64)
    number, prompts = float(scores_R.size), names.size
    if number <= prompts:
        return math.nan, math.nan
    mean_P = np.bincount(of_R, weights=scores_R) / count_P
    within = float(np.square(scores_R - mean_P[of_R]).sum()) / (number - prompts)
    if prompts < 2:
        return within, math.nan
    between = float((count_P * np.square(mean_P - scores_R.mean())).sum()) / (prompts - 1)
    typical = (number - float(np.square(count_P).sum()) / number) / (prompts - 1)
    return within, max(0.0, (between - within) / typical)


def variance_figures(
    comparisons: Sequence[Comparison], keys: Sequence[str], scores: Floats, clusters: Indices
) -> dict[str, Any]:
    """Within, between and the share within / (within + between), with jackknife intervals.

    A policy gradient sees the variance within a prompt only: where it is small the objective is flat, however
    accurate the rewards (Razin 2025, arXiv 2503.15477, theorem 1, whose variance is over the policy's own
    responses; here it is over those that people compared, each of a prompt's once).

    Args:
        comparisons: whose responses the scores are of, in order.
        keys: of each comparison's prompt.
        scores: one a response.
        clusters: of each response; the units of the interval.
    """
    texts = [(key, r.strip()) for c, key in zip(comparisons, keys, strict=True) for r in c.responses]
    first = np.array(sorted({text: i for i, text in reversed(list(enumerate(texts)))}.values()))
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    prompt_R = np.array([number[texts[i][0]] for i in first], dtype=np.intp)
    scores_R, clusters_R = scores[first], clusters[first]

    def component(pick: Callable[[float, float], float], forward: Any, back: Any) -> dict[str, Any]:
        def statistic(kept: Indices) -> float:
            return pick(*variance_components(scores_R[kept], prompt_R[kept]))

        found = clustered.jackknife(statistic, clusters_R, forward=forward, back=back)
        return {**found.as_dict(), "responses": int(first.size)}

    return {
        "within": component(lambda within, _: within, math.log, math.exp),
        "between": component(lambda _, between: between, float, lambda x: max(0.0, x)),
        "share": component(_share, float, lambda x: min(1.0, max(0.0, x))),
    }


def _share(within: float, between: float) -> float:
    total = within + between
    return within / total if total > 0 else math.nan
