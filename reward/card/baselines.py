"""A bag of words as a reward model: what the words alone say of a preference. numpy and scipy, no torch.

Linear in log(1 + count) times the inverse document frequency of each word (Salton and Buckley 1988), without
normalizing the length away, fitted to pairs by logistic regression with an L2 penalty. ``_V`` word of the
vocabulary, ``_N`` pair, ``_R`` response.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from reward.card.calibration import labeled_pairs, log_loss, right, sigmoid
from reward.card.clusters import clusters
from rlhf.data.comparisons import Comparison
from rlhf.stats.clustered import Floats, Indices

WORDS = 5_000  # the most frequent ones, by the number of responses that have them
MOST_PAIRS = 20_000  # of the training comparisons, drawn where there are more
PENALTIES = (
    10.0,
    3.0,
    1.0,
    0.3,
    0.1,
    0.03,
    0.01,
    0.003,
    0.001,
)  # of 1/2 |w|^2 beside the mean loss of a pair
FOLDS = 5
_ITERATIONS = 200
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class BagOfWords:
    """A fitted bag of words."""

    vocabulary: dict[str, int]
    inverse_frequency_V: Floats
    weights_V: Floats
    penalty: float
    pairs: int
    """Pairs it was fitted on."""

    def scores(self, responses: Sequence[str]) -> Floats:
        """One score a response, [R]; words that are not in the vocabulary say nothing."""
        x_RV = counted(responses, self.vocabulary)
        return np.asarray(x_RV @ (self.inverse_frequency_V * self.weights_V), dtype=np.float64)


def fit_bag_of_words(train: Sequence[Comparison], *, seed: int) -> BagOfWords | None:
    """The bag of words of training comparisons; None where they have no pair or no word.

    The penalty is the one with the best accuracy in cross-validation, whose folds keep clusters
    (:func:`reward.card.clusters.clusters`) together; without two clusters it is the middle one.
    """
    texts = [r for c in train for r in c.responses]
    found = Counter(word for text in texts for word in set(words_of(text)))
    vocabulary = {word: i for i, (word, _) in enumerate(found.most_common(WORDS))}
    better_N, worse_N, comparison_N = labeled_pairs([c.ranks for c in train])
    if not vocabulary or not better_N.size:
        return None
    random = np.random.default_rng(seed % 2**63)
    if better_N.size > MOST_PAIRS:
        kept = np.sort(random.choice(better_N.size, MOST_PAIRS, replace=False))
        better_N, worse_N, comparison_N = better_N[kept], worse_N[kept], comparison_N[kept]
    frequency_V = np.array([found[word] for word in vocabulary], dtype=np.float64)
    inverse_V = np.log((1 + len(texts)) / (1 + frequency_V)) + 1
    x_RV = counted(texts, vocabulary) @ scipy.sparse.diags(inverse_V)
    x_NV = (x_RV[better_N] - x_RV[worse_N]).tocsr()
    penalty = best_penalty(x_NV, clusters(train).of_C[comparison_N], random)
    return BagOfWords(vocabulary, inverse_V, fit_pairs(x_NV, penalty), penalty, int(better_N.size))


def words_of(text: str) -> list[str]:
    """Words and signs of a text, in small letters."""
    return _WORD.findall(text.lower())


def counted(texts: Sequence[str], vocabulary: dict[str, int]) -> Any:
    """log(1 + count) of every word of the vocabulary in every text, a sparse [R, V]."""
    starts, columns, values = [0], list[int](), list[float]()
    for text in texts:
        known = Counter(vocabulary[word] for word in words_of(text) if word in vocabulary)
        columns += known
        values += known.values()
        starts.append(len(columns))
    shape = (len(texts), len(vocabulary))
    return scipy.sparse.csr_matrix((np.log1p(np.array(values, dtype=np.float64)), columns, starts), shape)


def best_penalty(x_NV: Any, clusters_N: Indices, random: np.random.Generator) -> float:
    """The penalty with the most pairs right in cross-validation over clusters; the largest of equal ones."""
    names, of_N = np.unique(clusters_N, return_inverse=True)
    folds = min(FOLDS, names.size)
    if folds < 2:
        return PENALTIES[len(PENALTIES) // 2]
    fold_N = (random.permutation(names.size) % folds)[of_N]

    def correct(penalty: float) -> float:
        inside = [(np.flatnonzero(fold_N != f), np.flatnonzero(fold_N == f)) for f in range(folds)]
        return float(sum(right(x_NV[test] @ fit_pairs(x_NV[fit], penalty)).sum() for fit, test in inside))

    return max(PENALTIES, key=correct)


def fit_pairs(x_NV: Any, penalty: float) -> NDArray[np.float64]:
    """Weights w, [V], that minimize mean(log(1 + exp(-x w))) + penalty / 2 |w|^2; x = better minus worse."""

    def loss(w: Floats) -> tuple[float, Floats]:
        gaps_N = x_NV @ w
        slope_V = -(x_NV.T @ sigmoid(-gaps_N)) / gaps_N.size
        return float(log_loss(gaps_N).mean() + penalty / 2 * (w @ w)), slope_V + penalty * w

    start = np.zeros(x_NV.shape[1])
    options = {"maxiter": _ITERATIONS}
    return np.asarray(scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)
