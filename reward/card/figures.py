"""From comparisons with scores to the figures of the reward-model card. Numpy only.

Every figure is a dictionary {mean, ci95: [low, high], n}, n the number of prompts behind it (the clusters of
its interval), mostly with ``pairs`` (or ``responses``), the number of items. What is not known is None.
Suffixes as in ``reward.card.calibration``: ``_N`` pair, ``_R`` response.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reward.card import calibration as calibrate
from reward.card.calibration import Pairs
from rlhf.data.comparisons import Comparison, prompt_key
from rlhf.stats import clustered
from rlhf.stats.clustered import Floats, Indices
from rlhf.stats.intervals import Estimate

ABOUT_EQUAL = 0.1  # two lengths that differ by at most this share of the longer one
MOST_GROUPS = 20  # sources listed by name
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Scored:
    """Comparisons and one model's scores of all their responses, in order."""

    comparisons: Sequence[Comparison]
    scores_R: Floats
    cut_R: NDArray[np.bool_] | None = None
    """True = the model saw only a part of the text; None = not known."""
    normalised: bool = False
    """Whether the scores have mean 0 and variance 1 on reference responses already."""
    gain: float | None = None
    """What the scores were multiplied with after training, where that is known."""


def words(text: str) -> int:
    """Number of words of a text: runs of characters between white space."""
    return len(text.split())


def figures(scored: Scored, *, bins: int, near_tie: float, against_R: Floats | None = None) -> dict[str, Any]:
    """All figures of the card.

    Args:
        scored: at least one comparison.
        bins: of the calibration table.
        near_tie: gap below which a pair is a near-tie, in units of the normalised score: where the scores
            are not normalised it is taken times their standard deviation.
        against_R: a second model's scores of the same responses.
    """
    comparisons, scores_R = scored.comparisons, scored.scores_R
    keys = {key: i for i, key in enumerate(dict.fromkeys(prompt_key(c.prompt) for c in comparisons))}
    prompt_C = np.array([keys[prompt_key(c.prompt)] for c in comparisons], dtype=np.intp)
    owner_R = np.repeat(np.arange(len(comparisons)), [len(c.responses) for c in comparisons])
    words_R = np.array([words(r) for c in comparisons for r in c.responses], dtype=np.float64)
    pairs = calibrate.labelled_pairs([c.ranks for c in comparisons])
    prompt_N = prompt_C[pairs.comparison]
    gaps_N = scores_R[pairs.better] - scores_R[pairs.worse]
    unit, of = (1.0, "normalised score") if scored.normalised else (_spread(scores_R), "standard deviation")
    return {
        "comparisons": len(comparisons),
        "prompts": len(keys),
        "responses": int(scores_R.size),
        "pairs": int(gaps_N.size),
        "accuracy": _accuracy(scored, pairs, gaps_N, prompt_N, words_R),
        "calibration": _calibration(gaps_N, prompt_N, bins, scored.gain),
        "length": _length(scored, pairs, gaps_N, prompt_C, owner_R, words_R),
        "near_ties": {"near_tie": near_tie, "of": of, **_near_ties(gaps_N, prompt_N, near_tie * unit)},
        "scores": _scores(scored, prompt_C[owner_R]),
        "against": None
        if against_R is None
        else _against(gaps_N, against_R[pairs.better] - against_R[pairs.worse], prompt_N)
        | _score_correlation(scores_R, against_R, owner_R, prompt_C[owner_R]),
    }


def known(x: float) -> float | None:
    """A number, or None where it is not one."""
    return float(x) if math.isfinite(x) else None


def figure(estimate: Estimate, **counts: int) -> dict[str, Any]:
    """An estimate as {mean, ci95, n} with further counts."""
    return {**estimate.as_dict(), **counts}


def _spread(x: Floats) -> float:
    return float(x.std(ddof=1)) if x.size > 1 else 0.0


def _accuracy(
    scored: Scored, pairs: Pairs, gaps_N: Floats, prompt_N: Indices, words_R: Floats
) -> dict[str, Any]:
    comparisons, right_N = scored.comparisons, calibrate.right(gaps_N)

    def by(labels: Sequence[str], order: Sequence[str]) -> list[dict[str, Any]]:
        label_N = np.array(labels, dtype=object)
        found = []
        for name in order:
            inside = label_N == name
            if inside.any():
                share = clustered.share(right_N[inside], prompt_N[inside])
                found.append({"group": name, **figure(share, pairs=int(inside.sum()))})
        return found

    of_pair = [comparisons[i] for i in pairs.comparison]
    sources, source_order = _most_common([c.source for c in of_pair])
    better, worse = words_R[pairs.better], words_R[pairs.worse]
    equal = np.abs(better - worse) <= ABOUT_EQUAL * np.maximum(better, worse)
    longer = np.where(equal, "about equal", np.where(better > worse, "longer", "shorter"))
    k = [len(c.responses) for c in of_pair]
    return {
        "overall": figure(clustered.share(right_N, prompt_N), pairs=int(gaps_N.size)),
        "equal_scores": int((gaps_N == 0).sum()),
        "by_source": by(sources, source_order),
        "by_k": by([str(x) for x in k], [str(x) for x in sorted(set(k))]),
        "by_better_length": by(list(longer), ("longer", "about equal", "shorter")),
    }


def _most_common(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names with the rare ones beyond :data:`MOST_GROUPS` put together, and the order to list them in."""
    count: dict[str, int] = defaultdict(int)
    for name in names:
        count[name] += 1
    order = sorted(count, key=lambda name: (-count[name], name))
    if len(order) <= MOST_GROUPS:
        return list(names), order
    listed, rest = set(order[: MOST_GROUPS - 1]), f"{len(order) - MOST_GROUPS + 1} other sources"
    return [n if n in listed else rest for n in names], [*order[: MOST_GROUPS - 1], rest]


def _calibration(gaps_N: Floats, prompt_N: Indices, bins: int, gain: float | None) -> dict[str, Any]:
    error = calibrate.calibration_error(gaps_N, prompt_N, bins)
    slope, number = calibrate.slope(gaps_N, prompt_N), int(gaps_N.size)
    rows = calibrate.calibration_bins(gaps_N, prompt_N, bins)
    before = {}
    if gain is not None:  # the gap before normalisation is gap / gain, so its slope is slope * gain
        ends = (slope.mean * gain, slope.low * gain, slope.high * gain)
        before = {"slope_before_normalisation": figure(Estimate(*ends, slope.n), pairs=number)}
    return {
        "bins": [
            {
                "low": b.low,
                "high": b.high,
                "mean_gap": b.gap,
                "predicted": b.predicted,
                **figure(b.accuracy, pairs=b.pairs),
            }
            for b in rows
        ],
        "slope": figure(slope, pairs=number),
        **before,
        "ece": {**figure(error.error, pairs=number), "by_chance": known(error.by_chance)},
        "log_loss": figure(clustered.mean(calibrate.log_loss(gaps_N), prompt_N), pairs=number),
        "brier": figure(clustered.mean(calibrate.brier(gaps_N), prompt_N), pairs=number),
    }


def _length(
    scored: Scored, pairs: Pairs, gaps_N: Floats, prompt_C: Indices, owner_R: Indices, words_R: Floats
) -> dict[str, Any]:
    prompt_R, prompt_N, number = prompt_C[owner_R], prompt_C[pairs.comparison], int(gaps_N.size)
    responses = int(owner_R.size)
    rule_N = calibrate.right(words_R[pairs.better] - words_R[pairs.worse])
    without_R, effect = calibrate.without_length(scored.scores_R, words_R, owner_R)
    without_N = calibrate.right(without_R[pairs.better] - without_R[pairs.worse])
    spearman = calibrate.correlation(scored.scores_R, words_R, prompt_R, by_rank=True)
    within = calibrate.correlation(
        calibrate.centred(scored.scores_R, owner_R), calibrate.centred(words_R, owner_R), prompt_R
    )
    return {
        "spearman": figure(spearman, responses=responses),
        "within_comparisons": figure(within, responses=responses),
        "longer_is_better": figure(clustered.share(rule_N, prompt_N), pairs=number),
        "model_minus_rule": figure(clustered.mean(calibrate.right(gaps_N) - rule_N, prompt_N), pairs=number),
        "effect_per_100_words": known(100 * effect),
        "accuracy_without_length": figure(clustered.share(without_N, prompt_N), pairs=number),
    }


def _near_ties(gaps_N: Floats, prompt_N: Indices, threshold: float) -> dict[str, Any]:
    near, right_N = np.abs(gaps_N) < threshold, calibrate.right(gaps_N)
    return {
        "threshold": threshold,
        "share": figure(clustered.share(near, prompt_N), pairs=int(near.size)),
        "accuracy": figure(clustered.share(right_N[near], prompt_N[near]), pairs=int(near.sum())),
        "accuracy_of_others": figure(
            clustered.share(right_N[~near], prompt_N[~near]), pairs=int((~near).sum())
        ),
    }


def _scores(scored: Scored, prompt_R: Indices) -> dict[str, Any]:
    scores_R, number = scored.scores_R, int(scored.scores_R.size)
    centre = float(scores_R.mean())
    spread = clustered.jackknife(
        lambda kept: _spread(scores_R[kept]), prompt_R, forward=math.log, back=math.exp
    )
    cut = scored.cut_R
    return {
        "mean": figure(clustered.mean(scores_R, prompt_R), responses=number),
        "sd": figure(spread, responses=number),
        "quantiles_of_centred": {f"{q:g}": float(np.quantile(scores_R - centre, q)) for q in QUANTILES},
        "cut": None if cut is None else figure(clustered.share(cut, prompt_R), responses=number),
    }


def _against(gaps_N: Floats, other_N: Floats, prompt_N: Indices) -> dict[str, Any]:
    found = calibrate.compared(gaps_N, other_N, prompt_N)
    number = int(gaps_N.size)
    return {k: figure(v, pairs=number) if isinstance(v, Estimate) else v for k, v in found.items()}


def _score_correlation(
    scores_R: Floats, other_R: Floats, owner_R: Indices, prompt_R: Indices
) -> dict[str, Any]:
    """Over all responses (no correlation depends on a mean), and of scores centred within comparisons."""
    one, other = (calibrate.centred(x, owner_R) for x in (scores_R, other_R))
    return {
        "correlation": figure(
            calibrate.correlation(scores_R, other_R, prompt_R), responses=int(scores_R.size)
        ),
        "correlation_within": figure(calibrate.correlation(one, other, prompt_R), responses=int(one.size)),
    }
