"""What is measured on the scores of pairs: credits in a file, and calibration.

Suffix ``_N``: one entry a comparison.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reward.card.calibration import log_loss, right, sigmoid, slope

Floats = NDArray[np.float64]
BIN_EDGES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, math.inf)  # of |score gap|


def to_text(credit_N: ArrayLike) -> str:
    """Credits 0, 1/2, 1 as one character each: what a unit keeps of its test pairs."""
    return "".join("0h1"[round(2 * c)] for c in np.asarray(credit_N))


def from_text(text: str) -> Floats:
    """The inverse of :func:`to_text`."""
    return np.array(["0h1".index(c) / 2 for c in text])


def calibration(gap_N: Floats) -> dict[str, Any]:
    """How well sigmoid(gap) tells how often the label agrees with the score.

    gap_N: score of the side labelled good less that of the other. slope: the b that maximizes
    sum log sigmoid(b * gap), 1 if calibrated, below 1 if the gaps promise too much (over-confident), with its
    standard error from the information. ece: expected calibration error over bins of |gap|. bins: for each of
    BIN_EDGES, pairs, mean promised and observed agreement (equal scores count 1/2).
    """
    b = slope(gap_N, np.arange(len(gap_N))).mean
    error = math.nan
    if math.isfinite(b):
        error = float((gap_N**2 * sigmoid(b * gap_N) * sigmoid(-b * gap_N)).sum()) ** -0.5
    size_N = np.abs(gap_N)
    promised_N, agrees_N = sigmoid(size_N), right(gap_N)
    bins: list[dict[str, Any]] = []
    ece = 0.0
    for low, high in pairwise(BIN_EDGES):
        inside = (size_N >= low) & (size_N < high)
        if not inside.any():
            bins.append({"pairs": 0, "promised": None, "observed": None})
            continue
        promised, observed = float(promised_N[inside].mean()), float(agrees_N[inside].mean())
        ece += abs(promised - observed) * float(inside.mean())
        bins.append({"pairs": int(inside.sum()), "promised": promised, "observed": observed})
    return {
        "slope": b,
        "slope_error": error,
        "ece": ece,
        "bins": bins,
        "loss": float(log_loss(gap_N).mean()),
        "accuracy": float(agrees_N.mean()),
    }
