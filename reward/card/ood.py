"""How well a model's activations tell prompts that are unlike its own from those that are.

Bai et al. 2022, "Training a Helpful and Harmless Assistant" (arXiv 2204.05862), section 5.4 and appendix B.9:
a Gaussian is fitted to the activations of prompts that are in distribution, distances from it are the scores;
with a few known outliers a linear classifier does better (outlier exposure). Every score is higher the more
outlying the prompt.

Shape suffixes: ``_N``, ``_M`` prompt, ``_D`` hidden unit, ``_T`` token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.masks import last_true_index, positions_from_mask, right_pad
from rlhf.models.token_batches import token_batches
from rlhf.stats.intervals import Z95, Estimate, proportion_interval
from rlhf.training.optimizer import lbfgs

TOKENS_AT_ONCE = 4096  # tokens, padding included, of one forward pass
LEAST_SHRINKAGE = 1e-3  # bounds the condition number of the correlations; far below any estimate with N < D
LEAST_VARIANCE = 1e-6  # of a hidden unit, as a share of the median's: a dead unit must not decide alone
EXPOSURE_PENALTY = 1e-2  # L2 on the weights of standardized activations, against the mean cross-entropy
_SHUFFLE, _EXPOSE = 1, 2  # set the random numbers of the two purposes apart


class Gaussian(NamedTuple):
    """A normal distribution of activations, in float64."""

    mean_D: Tensor
    variance_D: Tensor
    """Of each unit; the diagonal of the full covariance is the same."""
    factor_DD: Tensor
    """Lower Cholesky factor of the full covariance."""
    shrinkage: float
    """Share of every correlation that was given up."""


def fit_gaussian(x_ND: Tensor, shrinkage: float | None = None) -> Gaussian:
    """Mean and covariance (1 / N) of some rows, correlations shrunk towards 0 so that there is an inverse.

    x_ND: one row a prompt; N may be smaller than D. S = (1 - a) C + a diag(C), where a in [0, 1] is
    ``shrinkage`` or, for None, its estimate sum Var(r_ij) / sum r_ij^2 over i != j of the correlations r
    (Schaefer and Strimmer 2005, target "diagonal, unequal variance"), at least 1e-3. Every unit keeps its own
    variance, so the result does not depend on the units' scales. Fewer than two rows, rows that are all the
    same, or numbers that are not finite are a ValueError.
    """
    mean_D, variance_D = _moments(x_ND)
    z_ND = (x_ND.double() - mean_D) / variance_D.sqrt()
    correlation_DD = (z_ND.T @ z_ND / len(z_ND)).fill_diagonal_(1.0)
    if shrinkage is None:
        shrinkage = max(_estimated_shrinkage(z_ND, correlation_DD), LEAST_SHRINKAGE)
    shrunk_DD = ((1.0 - shrinkage) * correlation_DD).fill_diagonal_(1.0)
    factor_DD = variance_D.sqrt()[:, None] * torch.linalg.cholesky(shrunk_DD)
    return Gaussian(mean_D, variance_D, factor_DD, float(shrinkage))


def _moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (1 / N) of every unit, in float64; no variance is below a millionth of the median."""
    x_ND = x_ND.double()
    if len(x_ND) < 2:
        raise ValueError(f"{len(x_ND)} row has no variance")
    if not bool(x_ND.isfinite().all()):
        raise ValueError(f"some of {len(x_ND)} rows are not finite")
    variance_D = x_ND.var(dim=0, correction=0)
    alive = variance_D[(x_ND != x_ND[0]).any(dim=0)]  # rounding may leave a dead unit a variance
    if not len(alive):
        raise ValueError(f"all {len(x_ND)} rows are the same")
    return x_ND.mean(dim=0), variance_D.clamp_min(LEAST_VARIANCE * float(alive.median()))


def _estimated_shrinkage(z_ND: Tensor, correlation_DD: Tensor) -> float:
    """Variance of the correlations over their squares, both summed over pairs of different units.

    r_ij is a mean over rows of z_i z_j, so its variance is the usual one of a mean.
    """
    rows, width = z_ND.shape
    squares = float(correlation_DD.square().sum()) - width
    if squares <= 0:
        return 1.0
    z2_ND = z_ND.square()
    products = float(z2_ND.sum(dim=1).square().sum() - z2_ND.square().sum())
    return min(1.0, max(0.0, (products - rows * squares) / (rows * (rows - 1)) / squares))


def mahalanobis(x_ND: Tensor, gaussian: Gaussian) -> Tensor:
    """Squared Mahalanobis distance of each row, (x - m)^T S^-1 (x - m), [N] float64 (Bai 2022, sec. 5.4)."""
    deviation_ND = x_ND.double() - gaussian.mean_D
    return torch.linalg.solve_triangular(gaussian.factor_DD, deviation_ND.T, upper=False).square().sum(dim=0)


def simplified_relative_mahalanobis(x_ND: Tensor, gaussian: Gaussian) -> Tensor:
    """(x - m)^T S^-1 (x - m) - (x - m)^T S_diag^-1 (x - m) of each row, [N] float64 (Bai 2022, section 5.4).

    What is unusual in the correlations of the units, less what is unusual in each of them alone; it may be
    negative.
    """
    alone_N = ((x_ND.double() - gaussian.mean_D).square() / gaussian.variance_D).sum(dim=1)
    return mahalanobis(x_ND, gaussian) - alone_N


def outlier_exposure(inside_ND: Tensor, outside_MD: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear classifier that has seen a few outliers (Bai 2022, appendix B.9).

    inside_ND: class 0. outside_MD: class 1, repeated floor(N / M) times (at least once) so that both classes
    weigh the same. Logistic regression with bias on activations that are standardized by the inside rows;
    mean cross-entropy + 0.01 |w|^2, the bias unpenalized. The optimum is unique: nothing is random.
    Returns a function of rows [n, D]: log-odds of class 1, [n] float64, in the order of the class-1 output
    but without its ties at 1.
    """
    if not len(outside_MD):
        raise ValueError("no outlier to be exposed to")
    mean_D, variance_D = _moments(inside_ND)
    copies_MD = outside_MD.repeat(max(1, len(inside_ND) // len(outside_MD)), 1)
    x = (torch.cat([inside_ND, copies_MD]).double() - mean_D) / variance_D.sqrt()
    target = torch.cat([torch.zeros(len(inside_ND)), torch.ones(len(copies_MD))]).double()

    def loss(weights: Tensor) -> Tensor:
        entropy = nn.functional.binary_cross_entropy_with_logits(x @ weights[:-1] + weights[-1], target)
        return entropy + EXPOSURE_PENALTY * weights[:-1].square().sum()

    start = torch.zeros(x.shape[1] + 1, dtype=torch.float64)  # the bias is the last
    found = lbfgs(loss, start, max_iter=500, tolerance_grad=1e-8)
    return lambda rows: (rows.double() - mean_D) / variance_D.sqrt() @ found[:-1] + found[-1]


def auroc(inside: ArrayLike, outside: ArrayLike) -> Estimate:
    """Probability that an outlier scores higher than a prompt from inside, a tie counting 1/2.

    inside, outside: one score a prompt. Interval of DeLong 1988: se^2 = s_10^2 / M + s_01^2 / N, where s_10^2
    is the variance over outliers of the share of inside scores below each, and s_01^2 the other way round;
    cut off at 0 and 1. At an area of 0 or 1 that variance is 0, which is too good to be true: there the ends
    are Wilson's for min(N, M) trials without a miss. n of the result is N + M. A NaN is a ValueError.
    """
    x, y = (np.sort(np.asarray(scores, dtype=np.float64).ravel()) for scores in (inside, outside))
    if np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("a score is not a number")
    n, m = int(x.size), int(y.size)
    if not (n and m):
        return Estimate(math.nan, math.nan, math.nan, n + m)
    below_M = (np.searchsorted(x, y, "left") + np.searchsorted(x, y, "right")) / (2 * n)
    below_N = (np.searchsorted(y, x, "left") + np.searchsorted(y, x, "right")) / (2 * m)
    area = float(below_M.mean())
    if area in (0.0, 1.0):
        certain = proportion_interval(round(area) * min(n, m), min(n, m))
        return Estimate(area, certain.low, certain.high, n + m)
    if min(n, m) == 1:
        return Estimate(area, math.nan, math.nan, n + m)
    half = Z95 * math.sqrt(float(below_M.var(ddof=1)) / m + float(below_N.var(ddof=1)) / n)
    return Estimate(area, max(0.0, area - half), min(1.0, area + half), n + m)


@torch.no_grad()
def activations(decoder: nn.Module, rows: Sequence[Sequence[int]], pad_id: int, layer: int) -> Tensor:
    """Hidden state of one layer at the last token of each prompt, [N, D] float32 on the CPU, in their order.

    decoder: a model without vocabulary head that returns its hidden states. rows: token ids of the prompts.
    layer: 0 = the embeddings, i = the output of layer i, negative from the end; -1 = the last, normalized.
    Bai 2022 leaves open how the tokens of a prompt become one vector. The last token has read the whole
    prompt, and the response starts from it. In a mean over tokens the first token's state, the same in every
    prompt and in the middle layers larger by orders of magnitude, would speak of little but the length.

    Raises:
        UserError: there is no such layer.
    """
    device = next(decoder.parameters()).device
    found: dict[int, Tensor] = {}
    for batch in token_batches([len(row) for row in rows], TOKENS_AT_ONCE):
        ids_NT, mask_NT = (t.to(device) for t in right_pad([rows[i] for i in batch], pad_id))
        states = decoder(
            input_ids=ids_NT,
            attention_mask=mask_NT.long(),
            position_ids=positions_from_mask(mask_NT),
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
        if not -len(states) <= layer < len(states):
            raise UserError(
                f"card.outlier_layer: there is no layer {layer}; use 0 (the embeddings) to "
                f"{len(states) - 1}, or -1 for the last"
            )
        last_ND = states[layer][torch.arange(len(batch), device=device), last_true_index(mask_NT)]
        found.update(zip(batch, last_ND.float().cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])


def report(inside_ND: Tensor, outside_ND: Tensor, *, exposure: int = 0, seed: int) -> dict[str, Any]:
    """How well each score tells the outliers from prompts of the run's own, as it goes into a summary.

    inside_ND: the run's own prompts, one half (drawn by the seed) to fit on, the other to judge by; no row is
    in both. outside_ND: outliers; ``exposure`` of them, drawn by the seed, are shown to the classifier and
    left out of every figure, so that all scores are judged on the same prompts.
    Returns the numbers of prompts, the shrinkage, and an area under the ROC curve with its interval for
    ``mahalanobis``, ``simplified_relative_mahalanobis`` and, with exposure, ``outlier_exposure``.

    Raises:
        UserError: too few prompts for that, or a layer that says the same of all of them.
    """
    inside, outside = len(inside_ND), len(outside_ND)
    if inside < 4:
        raise UserError(
            f"card.outliers: {inside} prompts of the run's own are too few to fit on one half and judge by "
            "the other; use at least 4, better some hundreds"
        )
    if outside - exposure < 2:
        raise UserError(
            f"card.outliers: of {outside} outliers card.exposure takes {exposure}, which leaves fewer than 2 "
            "to judge by; add prompts or lower card.exposure"
        )
    order = np.random.default_rng([seed % 2**63, _SHUFFLE]).permutation(inside)
    fitted_ND, judged_ND = inside_ND[order[: inside // 2]], inside_ND[order[inside // 2 :]]
    order = np.random.default_rng([seed % 2**63, _EXPOSE]).permutation(outside)
    exposed_MD, unseen_ND = outside_ND[order[:exposure]], outside_ND[order[exposure:]]
    try:
        gaussian = fit_gaussian(fitted_ND)
    except ValueError as error:  # as with the embedding of the one token on which every prompt ends
        raise UserError(f"card.outlier_layer: {error}; choose another layer") from None
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "mahalanobis": lambda rows: mahalanobis(rows, gaussian),
        "simplified_relative_mahalanobis": lambda rows: simplified_relative_mahalanobis(rows, gaussian),
    }
    if exposure:
        scores["outlier_exposure"] = outlier_exposure(fitted_ND, exposed_MD)
    return {
        "fitted_on": len(fitted_ND),
        "inside": len(judged_ND),
        "outside": len(unseen_ND),
        "exposed": exposure,
        "shrinkage": gaussian.shrinkage,
        **{name: auroc(score(judged_ND), score(unseen_ND)).as_dict() for name, score in scores.items()},
    }
