"""From comparisons with scores to the figures of the reward-model card. No torch.

Every figure is a dictionary {mean, ci95: [low, high], n}, n the number of clusters behind its interval
(:mod:`reward.card.clusters`: prompts, or what the card's ``unit`` says), mostly with ``pairs`` (or
``responses``), the number of items. What is not known is None.
Suffixes as in ``reward.card.calibration``: ``_N`` pair, ``_R`` response; ``_C`` comparison, ``_I`` item.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reward.card import calibration as calibrate
from reward.card.clusters import clusters
from reward.card.variance import variance_figures
from rlhf.data.comparisons import Comparison, prompt_key
from rlhf.stats import clustered
from rlhf.stats.clustered import Floats, Indices
from rlhf.stats.intervals import Estimate
from rlhf.stats.length_control import ABOUT_EQUAL
from rlhf.stats.tests import sign_test

MOST_GROUPS = 20  # sources listed by name
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Scored:
    """Comparisons and one model's scores of all their responses, in order."""

    comparisons: Sequence[Comparison]
    scores_R: Floats
    cut_R: NDArray[np.bool_]
    """True = the model saw only a part of the text."""
    normalized: bool = False
    """Whether the scores have mean 0 and variance 1 on reference responses already."""
    gain: float | None = None
    """What the scores were multiplied with after training, where that is known."""


@dataclass(frozen=True)
class Items:
    """Pairs or responses, in clusters."""

    name: str
    cluster_I: Indices

    def figure(self, estimate: Estimate) -> dict[str, Any]:
        """An estimate over all of them."""
        return {**estimate.as_dict(), self.name: int(self.cluster_I.size)}

    def mean(self, values_I: Floats) -> dict[str, Any]:
        """Mean of a value of each."""
        return self.figure(clustered.mean(values_I, self.cluster_I))

    def share(self, values_I: NDArray[Any], inside_I: NDArray[np.bool_] | None = None) -> dict[str, Any]:
        """Mean of outcomes in [0, 1], of all or of those inside."""
        if inside_I is not None:
            return Items(self.name, self.cluster_I[inside_I]).share(values_I[inside_I])
        return self.figure(clustered.share(values_I, self.cluster_I))

    def correlation(self, x_I: Floats, y_I: Floats, *, by_rank: bool = False) -> dict[str, Any]:
        """Correlation of two values of each."""
        return self.figure(calibrate.correlation(x_I, y_I, self.cluster_I, by_rank=by_rank))


def words(text: str) -> int:
    """Number of words of a text: runs of characters between white space."""
    return len(text.split())


def figures(
    scored: Scored,
    *,
    bins: int,
    near_tie: float,
    against_R: Floats | None = None,
    bag_R: Floats | None = None,
    probes_R: Mapping[str, Floats] | None = None,
) -> dict[str, Any]:
    """All figures of the card.

    Args:
        scored: at least one comparison.
        bins: of the calibration table.
        near_tie: gap below which a pair is a near-tie, in units of the normalized score: where the scores
            are not normalized it is taken times their standard deviation.
        against_R: a second model's scores of the same responses.
        bag_R: a bag of words' scores of them, where there is one.
        probes_R: the probes' scores of them by name, NaN where they are not known.
    """
    comparisons, scores_R = scored.comparisons, scored.scores_R
    keys = list(map(prompt_key, (c.prompt for c in comparisons)))
    cluster_C, unit_of_n = clusters(comparisons)
    owner_R = np.repeat(np.arange(len(comparisons)), [len(c.responses) for c in comparisons])
    words_R = np.array([words(r) for c in comparisons for r in c.responses], dtype=np.float64)
    better_N, worse_N, comparison_N = calibrate.labeled_pairs([c.ranks for c in comparisons])
    pairs, responses = Items("pairs", cluster_C[comparison_N]), Items("responses", cluster_C[owner_R])

    def gaps(values_R: Floats) -> Floats:
        return values_R[better_N] - values_R[worse_N]

    gaps_N, right_N = gaps(scores_R), calibrate.right(gaps(scores_R))
    rule_N = calibrate.right(gaps(words_R))
    without_R, effect = calibrate.without_length(scores_R, words_R, owner_R)
    within_R = calibrate.centered(scores_R, owner_R)
    unit, of = (1.0, "normalised score") if scored.normalized else (_spread(scores_R), "standard deviation")
    near_N = np.abs(gaps_N) < near_tie * unit
    found: dict[str, Any] = {
        "comparisons": len(comparisons),
        "prompts": len(set(keys)),
        "unit": unit_of_n,
        "clusters": int(cluster_C.max()) + 1,
        "responses": int(scores_R.size),
        "pairs": int(gaps_N.size),
        "pairs_left_out": sum(calibrate.possible_pairs(c.ranks) for c in comparisons) - int(gaps_N.size),
        "accuracy": {
            "overall": pairs.share(right_N),
            "equal_scores": int((gaps_N == 0).sum()),
            **_by_group(
                pairs, right_N, [comparisons[i] for i in comparison_N], words_R[better_N], words_R[worse_N]
            ),
        },
        "baselines": _baselines(
            pairs,
            right_N,
            rule_N,
            None if bag_R is None else calibrate.right(gaps(bag_R)),
            about_equal(words_R[better_N], words_R[worse_N]),
        ),
        "probe": _probes(pairs, right_N, {name: gaps(x_R) for name, x_R in (probes_R or {}).items()}),
        "calibration": _calibration(pairs, gaps_N, bins, scored.gain),
        "length": {
            "spearman": responses.correlation(scores_R, words_R, by_rank=True),
            "within_comparisons": responses.correlation(within_R, calibrate.centered(words_R, owner_R)),
            "longer_is_better": pairs.share(rule_N),
            "model_minus_rule": pairs.mean(right_N - rule_N),
            "effect_per_100_words": known(100 * effect),
            "accuracy_without_length": pairs.share(calibrate.right(gaps(without_R))),
        },
        "near_ties": {
            "near_tie": near_tie,
            "of": of,
            "threshold": near_tie * unit,
            "share": pairs.share(near_N),
            "accuracy": pairs.share(right_N, near_N),
            "accuracy_of_others": pairs.share(right_N, ~near_N),
        },
        "scores": _scores(responses, scores_R, scored.cut_R),
        "variance": variance_figures(comparisons, keys, scores_R, responses.cluster_I),
        "against": None,
    }
    if against_R is not None:
        found["against"] = {
            **_against(pairs, gaps_N, gaps(against_R)),
            "correlation": responses.correlation(scores_R, against_R),
            "correlation_within": responses.correlation(within_R, calibrate.centered(against_R, owner_R)),
        }
    return found


def about_equal(better_N: Floats, worse_N: Floats) -> NDArray[np.bool_]:
    """Where two lengths differ by at most :data:`ABOUT_EQUAL` of the longer one."""
    return np.abs(better_N - worse_N) <= ABOUT_EQUAL * np.maximum(better_N, worse_N)


def _baselines(
    pairs: Items, right_N: Floats, rule_N: Floats, bag_N: Floats | None, like_N: NDArray[np.bool_]
) -> dict[str, Any]:
    """What can be had without a model, and what the model adds to it: paired, this minus the baseline."""
    found: dict[str, Any] = {
        "chance": 0.5,
        "longer_is_better": pairs.share(rule_N),
        "bag_of_words": None if bag_N is None else pairs.share(bag_N),
        "like_length": pairs.share(right_N, like_N),
        "like_length_bag_of_words": None if bag_N is None else pairs.share(bag_N, like_N),
        "adds": {"chance": pairs.mean(right_N - 0.5), "longer_is_better": pairs.mean(right_N - rule_N)},
    }
    if bag_N is not None:
        found["adds"]["bag_of_words"] = pairs.mean(right_N - bag_N)
        kept = Items(pairs.name, pairs.cluster_I[like_N])
        found["adds"]["like_length_bag_of_words"] = kept.mean((right_N - bag_N)[like_N])
    return found


def _probes(pairs: Items, right_N: Floats, gaps: Mapping[str, Floats]) -> dict[str, Any] | None:
    """Accuracy of each probe, and (``adds_``) what the model adds to it, paired, on the pairs it knows."""
    found: dict[str, Any] = {}
    for name, gaps_N in gaps.items():
        known_N = np.isfinite(gaps_N)
        if known_N.any():
            some, probe_N = Items(pairs.name, pairs.cluster_I[known_N]), calibrate.right(gaps_N[known_N])
            found |= {name: some.share(probe_N), f"adds_{name}": some.mean(right_N[known_N] - probe_N)}
    return found or None


def known(x: float) -> float | None:
    """A number, or None where it is not one."""
    return float(x) if math.isfinite(x) else None


def _spread(x: Floats) -> float:
    return float(x.std(ddof=1)) if x.size > 1 else 0.0


def _by_group(
    pairs: Items, right_N: Floats, of_pair: Sequence[Comparison], better_N: Floats, worse_N: Floats
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy by source, by the number of responses, and by the length of the better response."""

    def by(labels: Sequence[str], order: Sequence[str]) -> list[dict[str, Any]]:
        label_N = np.array(labels, dtype=object)
        return [
            {"group": name, **pairs.share(right_N, label_N == name)}
            for name in order
            if (label_N == name).any()
        ]

    equal_N = about_equal(better_N, worse_N)
    longer_N = np.where(equal_N, "about equal", np.where(better_N > worse_N, "longer", "shorter"))
    k = [len(c.responses) for c in of_pair]
    return {
        "by_source": by(*_most_common([c.source for c in of_pair])),
        "by_k": by([str(x) for x in k], [str(x) for x in sorted(set(k))]),
        "by_better_length": by(list(longer_N), ("longer", "about equal", "shorter")),
    }


def _most_common(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names with the rare ones beyond :data:`MOST_GROUPS` put together, and the order to list them in."""
    count = Counter(names)
    order = sorted(count, key=lambda name: (-count[name], name))
    if len(order) <= MOST_GROUPS:
        return list(names), order
    listed, rest = order[: MOST_GROUPS - 1], f"{len(order) - MOST_GROUPS + 1} other sources"
    return [n if n in listed else rest for n in names], [*listed, rest]


def _calibration(pairs: Items, gaps_N: Floats, bins: int, gain: float | None) -> dict[str, Any]:
    error, by_chance = calibrate.calibration_error(gaps_N, pairs.cluster_I, bins)
    slope = calibrate.slope(gaps_N, pairs.cluster_I)
    found = {
        "bins": calibrate.calibration_bins(gaps_N, pairs.cluster_I, bins),
        "slope": pairs.figure(slope),
        "ece": {**pairs.figure(error), "by_chance": known(by_chance)},
        "log_loss": pairs.mean(calibrate.log_loss(gaps_N)),
        "brier": pairs.mean(calibrate.brier(gaps_N)),
    }
    if gain is not None:  # the gap before normalization is gap / gain, so its slope is slope * gain
        before = Estimate(slope.mean * gain, slope.low * gain, slope.high * gain, slope.n)
        found["slope_before_normalisation"] = pairs.figure(before)
    return found


def _scores(responses: Items, scores_R: Floats, cut_R: NDArray[np.bool_]) -> dict[str, Any]:
    spread = clustered.jackknife(
        lambda kept: _spread(scores_R[kept]), responses.cluster_I, forward=math.log, back=math.exp
    )
    centered_R = scores_R - float(scores_R.mean())
    return {
        "mean": responses.mean(scores_R),
        "sd": responses.figure(spread),
        "quantiles_of_centred": {f"{q:g}": float(np.quantile(centered_R, q)) for q in QUANTILES},
        "cut": responses.share(cut_R),
    }


def _against(pairs: Items, gaps_N: Floats, other_N: Floats) -> dict[str, Any]:
    """Two models on the same pairs: accuracies, their paired difference (first minus second), agreement.

    Agreement is the share of pairs that both put in the same order; where one scores equally it is 1/2.
    McNemar's exact p (1947) is over the pairs that neither scores equally.
    """
    first_N, second_N = calibrate.right(gaps_N), calibrate.right(other_N)
    only_first = int(((gaps_N > 0) & (other_N < 0)).sum())
    only_second = int(((gaps_N < 0) & (other_N > 0)).sum())
    return {
        "accuracy": pairs.share(first_N),
        "other_accuracy": pairs.share(second_N),
        "difference": pairs.mean(first_N - second_N),
        "agreement": pairs.share(calibrate.right(np.sign(gaps_N) * np.sign(other_N))),
        "only_first": only_first,
        "only_second": only_second,
        "p_value": sign_test(only_first, only_second),
    }
