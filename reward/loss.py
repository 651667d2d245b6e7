"""Losses and moments of a scalar score that is learned from rankings.

Suffixes: ``_B`` comparison (one prompt), ``_K`` response of a comparison. A rank is an integer, the SMALLER
the better; equal ranks are a tie. Masks: True = a real response, False = padding of a comparison that has
fewer responses than the widest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def ranked_loss(
    scores_BK: Tensor,
    ranks_BK: Tensor,
    mask_BK: Tensor,
    *,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ranking loss of comparisons: -log sigmoid(s_better - s_worse), mean over the pairs, then over the rows.

    scores_BK: higher is better. ranks_BK: smaller is better, equal = tie. mask_BK: True = a real response.
    A comparison weighs 1 however many responses it has: its pairs are averaged, 1 / C(K, 2) each when no two
    tie. A tie gives no term; a row without an untied pair gives none either and is not counted in the mean.
    normaliser: replaces the number of rows with a pair as the divisor of the outer mean; give that of the
    whole batch, and the losses of micro-batches add up. To be minimised; log 2 when all scores are equal.
    Returns (loss, correct, pairs): the last two are sums of :func:`pair_accuracy` over the rows.

    Ouyang et al. 2022 (arXiv 2203.02155), eq. 1.
    """
    scores_BK = _clean(scores_BK, mask_BK)
    pairs_BKK = _untied_pairs(ranks_BK, mask_BK)
    pairs_B = pairs_BKK.sum(dim=(1, 2))
    terms_BKK = torch.where(pairs_BKK, -logsigmoid(_gaps(scores_BK)), 0.0)
    row_loss_B = terms_BKK.sum(dim=(1, 2)) / pairs_B.clamp(min=1)
    divisor = (pairs_B > 0).sum().clamp(min=1) if normaliser is None else normaliser
    correct_B = _correct(scores_BK, pairs_BKK)
    return row_loss_B.sum() / divisor, correct_B.sum(), pairs_B.sum()


def pair_accuracy(scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Count, in every comparison, the untied pairs and those that the scores put in the right order.

    scores_BK: higher is better. ranks_BK: smaller is better, equal = tie, no pair. mask_BK: True = a real
    response. Returns float correct_B, in which a pair of EQUAL scores counts 1/2, and long pairs_B.
    """
    pairs_BKK = _untied_pairs(ranks_BK, mask_BK)
    return _correct(_clean(scores_BK, mask_BK), pairs_BKK), pairs_BKK.sum(dim=(1, 2))


def head_init_std(d: int) -> float:
    """Standard deviation of a fresh reward head on d hidden units: 1 / sqrt(d + 1), the bias starting at 0.

    Stiennon et al. 2020 (arXiv 2009.01325), official code; Huang et al. 2024 (arXiv 2403.17031), detail 5.
    """
    return 1.0 / math.sqrt(d + 1)


def normalisation(scores: Tensor) -> tuple[float, float]:
    """Find (gain, offset) so that gain * scores + offset has mean 0 and population variance 1.

    scores: any shape, every entry counts. Fewer than two different scores, or one that is not finite, is a
    ValueError: no gain can normalise them.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.1 and official code.
    """
    values = scores.detach().double().flatten()
    if not bool(values.isfinite().all()):
        raise ValueError("a score is not finite, so the scores cannot be normalised")
    if values.numel() == 0 or bool((values == values[0]).all()):
        raise ValueError(f"the {values.numel()} scores have zero variance, so they cannot be normalised")
    gain = 1.0 / float(values.std(correction=0))
    return gain, -gain * float(values.mean())


def _clean(scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
    exact = scores_BK if scores_BK.dtype == torch.float64 else scores_BK.float()
    return torch.where(mask_BK, exact, 0.0)


def _gaps(scores_BK: Tensor) -> Tensor:
    return scores_BK.unsqueeze(2) - scores_BK.unsqueeze(1)  # [b, i, j] = s_i - s_j


def _untied_pairs(ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    both_real_BKK = mask_BK.unsqueeze(2) & mask_BK.unsqueeze(1)
    return both_real_BKK & (ranks_BK.unsqueeze(2) < ranks_BK.unsqueeze(1))  # [b, i, j]: i better than j


def _correct(scores_BK: Tensor, pairs_BKK: Tensor) -> Tensor:
    gaps_BKK = _gaps(scores_BK.detach())
    credit_BKK = 0.5 * (gaps_BKK.sign() + 1.0)  # 1 right order, 1/2 equal, 0 wrong order
    return torch.where(pairs_BKK, credit_BKK, 0.0).sum(dim=(1, 2))
