"""Losses and moments of what is learned from rankings: scalar scores, or the log-probability of the best.

Suffixes: ``_B`` comparison (one prompt), ``_K`` response of a comparison. A rank is an integer, the SMALLER
the better; equal ranks are a tie. Masks: True = a real response, False = padding of a comparison that has
fewer responses than the widest; what stands there, NaN included, changes no value and no gradient.

Every loss is a mean over the comparisons that have an untied pair; the others give no term and are not
counted, in any of them, so that losses of the same comparisons can be added. ``normalizer`` replaces the
number of those rows as the divisor: give that of the whole batch, and the losses of micro-batches add up. A
loss is float32, or float64 if its input is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.models.masks import masked_mean

if TYPE_CHECKING:
    from rlhf.recipe.reward import PreferenceTraining


def ranked_loss(
    scores_BK: Tensor,
    ranks_BK: Tensor,
    mask_BK: Tensor,
    *,
    normalizer: float | Tensor | None = None,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    label_noise: float = 0.0,
) -> Tensor:
    """Ranking loss of comparisons: -log sigmoid(d), mean over the pairs, then over the rows.

    scores_BK: higher is better. ranks_BK: smaller is better, equal = tie. mask_BK: True = a real response.
    normalizer: see the module. d = s_better - s_worse - margin * (rank_worse - rank_better); margin is in
    units of the score, for each step of rank.
    label_smoothing e: (1 - e) (-log sigmoid(d)) + e (-log sigmoid(-d)).
    label_noise e: -log((1 - e) sigmoid(d) + e sigmoid(-d)), at most -log e: a wrong label pulls only so far.
    Both in [0, 1), and one at a time, else ValueError.
    A comparison weighs 1 however many responses it has: its pairs are averaged, 1 / C(K, 2) each when no two
    tie. A tie gives no term. To be minimized; log 2 when all scores are equal and the options are off.

    Ouyang et al. 2022 (arXiv 2203.02155), eq. 1. Margin: Touvron et al. 2023 (arXiv 2307.09288), eq. 2, here
    linear in the ranks. Noise: Christiano et al. 2017 (arXiv 1706.03741), section 2.2.3, whose labeler
    answers at random in 10% of the cases, e = 0.05.
    """
    smoothing, noise = label_smoothing, label_noise
    if (smoothing and noise) or not (0 <= smoothing < 1 and 0 <= noise < 1):
        raise ValueError(f"label_smoothing {smoothing} and label_noise {noise}: in [0, 1), and one of them 0")
    scores_BK = _clean(scores_BK, mask_BK)
    pairs_BKK = _untied_pairs(ranks_BK, mask_BK)
    pairs_B = pairs_BKK.sum(dim=(1, 2))
    leads_BKK = _gaps(scores_BK)
    if margin:
        leads_BKK = leads_BKK + margin * _gaps(ranks_BK).to(leads_BKK.dtype)  # - margin * (r_j - r_i)
    losses_BKK = -logsigmoid(leads_BKK)
    if label_smoothing:
        losses_BKK = (1 - label_smoothing) * losses_BKK - label_smoothing * logsigmoid(-leads_BKK)
    if label_noise:
        right_BKK = math.log1p(-label_noise) + logsigmoid(leads_BKK)
        losses_BKK = -torch.logaddexp(right_BKK, math.log(label_noise) + logsigmoid(-leads_BKK))
    terms_BKK = torch.where(pairs_BKK, losses_BKK, 0.0)
    row_loss_B = terms_BKK.sum(dim=(1, 2)) / pairs_B.clamp(min=1)
    return _row_mean(row_loss_B, pairs_B > 0, normalizer)


def plackett_luce_loss(
    scores_BK: Tensor,
    ranks_BK: Tensor,
    mask_BK: Tensor,
    *,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the whole order, per choice made: mean over the choices, then over the rows.

    scores_BK: higher is better. ranks_BK: smaller is better, equal = tie. mask_BK: True = a real response.
    normalizer: see the module.
    Response i is chosen before all that are worse: -log(exp s_i / (exp s_i + sum over worse j of exp s_j)).
    Without ties a row makes K - 1 choices, and K - 1 times its loss is -log P(its order). They are averaged,
    so that a row weighs about as much as in :func:`ranked_loss`, which for K = 2 is the same to the bit.
    The order inside a group of ties is not modeled: each member is chosen against what is worse than the
    group, and the last group makes no choice. To be minimized; log 2 for K = 2 when the scores are equal.

    Luce 1959; Plackett 1975.
    """
    scores_BK = _clean(scores_BK, mask_BK)
    worse_BKK = _untied_pairs(ranks_BK, mask_BK)
    chooses_BK = worse_BKK.any(dim=2)
    # Who makes no choice keeps finite rivals, which are not used: backward through a sum of nothing is NaN.
    absent_BKK = ~worse_BKK & chooses_BK.unsqueeze(2)
    rivals_BK = (-_gaps(scores_BK)).masked_fill(absent_BKK, -math.inf).logsumexp(dim=2)  # [b, i]: less s_i
    terms_BK = torch.where(chooses_BK, -logsigmoid(-rivals_BK), 0.0)
    row_loss_B = terms_BK.sum(dim=1) / chooses_BK.sum(dim=1).clamp(min=1)
    return _row_mean(row_loss_B, chooses_BK.any(dim=1), normalizer)


def binary_loss(
    scores_BK: Tensor,
    ranks_BK: Tensor,
    mask_BK: Tensor,
    *,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Tell good from bad by an absolute label: -log sigmoid(s) of the good, -log sigmoid(-s) of the bad.

    scores_BK: log-odds of being good. ranks_BK: a row's smallest rank (0, where ranks are dense) is good, all
    others are bad. mask_BK: True = a real response. normalizer: see the module.
    Half the mean over the good and half the mean over the bad of a row, so that three bad responses weigh no
    more than one good one; then the mean over the rows. To be minimized; log 2 when all scores are 0.

    The binary task of Askell et al. 2021 (arXiv 2112.00861), section 3, as a loss on one label at a time.
    """
    scores_BK = _clean(scores_BK, mask_BK)
    good_BK, bad_BK = _best_and_rest(ranks_BK, mask_BK)
    row_loss_B = 0.5 * (
        masked_mean(-logsigmoid(scores_BK), good_BK, dim=1)
        + masked_mean(-logsigmoid(-scores_BK), bad_BK, dim=1)
    )
    return _row_mean(row_loss_B, good_BK.any(dim=1), normalizer)


def centering_penalty(
    scores_BK: Tensor,
    ranks_BK: Tensor,
    mask_BK: Tensor,
    *,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """(s_i + s_j)^2, mean over the untied pairs, then over the rows: pulls the scores of a prompt to mean 0.

    scores_BK: higher is better. ranks_BK: smaller is better, equal = tie. mask_BK: True = a real response.
    normalizer: see the module. A ranking fixes scores only up to a constant for each prompt; this chooses it.

    Eisenstein et al. 2023 (arXiv 2312.09244).
    """
    scores_BK = _clean(scores_BK, mask_BK)
    pairs_BKK = _untied_pairs(ranks_BK, mask_BK)
    squares_BKK = (scores_BK.unsqueeze(2) + scores_BK.unsqueeze(1)).square()
    row_loss_B = masked_mean(squares_BKK.flatten(1), pairs_BKK.flatten(1), dim=1)
    return _row_mean(row_loss_B, pairs_BKK.any(dim=2).any(dim=1), normalizer)


def imitation_loss(
    log_probs_BK: Tensor,
    lengths_BK: Tensor,
    ranks_BK: Tensor,
    mask_BK: Tensor,
    *,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Language-model loss on the best: -log p per token, mean over the tied best, then over the rows.

    log_probs_BK: summed log-probability of each response, in nats. lengths_BK: tokens in that sum, 1 or more.
    Both may hold anything, NaN included, where a response is not a best one. ranks_BK: smaller is better.
    mask_BK: True = a real response. normalizer: see the module. A row of ties only is not counted, as in the
    other losses: nothing says that its text is good.

    Askell et al. 2021 (arXiv 2112.00861), section 3 (imitation learning).
    """
    best_BK, _ = _best_and_rest(ranks_BK, mask_BK)
    per_token_BK = _clean(log_probs_BK, best_BK) / torch.where(best_BK, lengths_BK, 1)
    return _row_mean(masked_mean(-per_token_BK, best_BK, dim=1), best_BK.any(dim=1), normalizer)


def pair_accuracy(scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Count, in every comparison, the untied pairs and those that the scores put in the right order.

    scores_BK: higher is better. ranks_BK: smaller is better, equal = tie, no pair. mask_BK: True = a real
    response. Returns float correct_B, in which a pair of EQUAL scores counts 1/2, and long pairs_B.
    """
    pairs_BKK = _untied_pairs(ranks_BK, mask_BK)
    gaps_BKK = _gaps(_clean(scores_BK.detach(), mask_BK))
    credit_BKK = 0.5 * (gaps_BKK.sign() + 1.0)  # 1 right order, 1/2 equal, 0 wrong order
    return torch.where(pairs_BKK, credit_BKK, 0.0).sum(dim=(1, 2)), pairs_BKK.sum(dim=(1, 2))


def head_init_std(d: int) -> float:
    """Standard deviation of a fresh reward head on d hidden units: 1 / sqrt(d + 1), the bias starting at 0.

    Stiennon et al. 2020 (arXiv 2009.01325), official code; Huang et al. 2024 (arXiv 2403.17031), detail 5.
    """
    return 1.0 / math.sqrt(d + 1)


def normalization(scores: Tensor) -> tuple[float, float]:
    """Find (gain, offset) so that gain * scores + offset has mean 0 and population variance 1.

    scores: any shape, every entry counts. Fewer than two different scores, or one that is not finite, is a
    ValueError: no gain can normalize them.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.1 and official code.
    """
    values = scores.detach().double().flatten()
    if not bool(values.isfinite().all()):
        raise ValueError("a score is not finite, so the scores cannot be normalized")
    if values.numel() == 0 or bool((values == values[0]).all()):
        raise ValueError(f"the {values.numel()} scores have zero variance, so they cannot be normalized")
    gain = 1.0 / float(values.std(correction=0))
    return gain, -gain * float(values.mean())


class Signals(NamedTuple):
    """Outputs of a model for a few comparisons."""

    scores_BK: Tensor | None
    """Outputs of the head; None where the objective needs none."""
    log_probs_BK: Tensor | None
    """Summed log-probability of each response, at least of the best ones; None where not needed."""
    lengths_BK: Tensor | None
    """Response tokens behind each of them; 0 = not computed."""
    ranks_BK: Tensor
    """Smaller is better, equal = tie."""
    mask_BK: Tensor
    """True = a real response."""


class ObjectiveLoss(NamedTuple):
    """A loss and what goes into the log."""

    loss: Tensor
    """To be minimized: preference + centering * centering penalty + lm_coef * language."""
    correct: Tensor
    """Sum over the untied pairs of 1 (right order), 1/2 (equal) or 0, by this objective's ranking."""
    pairs: Tensor
    """Their number."""
    parts: dict[str, Tensor]
    """The terms that are on, before their coefficients, detached, divided as the loss is: ``preference``,
    ``centering``, ``language``."""


def needs_language(section: PreferenceTraining) -> bool:
    """Whether the objective needs the log-probability of the best responses."""
    return section.objective == "imitation" or section.lm_coef > 0


def objective_loss(section: PreferenceTraining, signals: Signals, *, normalizer: float) -> ObjectiveLoss:
    """Loss and pair accuracy of a micro-batch, by the recipe's `pmp` or `reward` section.

    normalizer: comparisons of the whole batch, all of which have an untied pair; the losses of its
    micro-batches then add up to the mean of the batch. Candidates are ranked by score, in an imitation by
    mean log-probability; there a pair counts only when both log-probabilities are known. A missing signal is
    a ValueError.
    """
    ranks_BK, mask_BK, scored = signals.ranks_BK, signals.mask_BK, section.objective != "imitation"
    terms: dict[str, tuple[float, Tensor]] = {}  # coefficient, value
    batch: dict[str, Any] = {"ranks_BK": ranks_BK, "mask_BK": mask_BK, "normalizer": normalizer}
    if needs_language(section):
        log_probs_BK = _given(signals.log_probs_BK, "log_probs_BK")
        lengths_BK = _given(signals.lengths_BK, "lengths_BK")
        coefficient = section.lm_coef if scored else 1.0
        terms["language"] = coefficient, imitation_loss(log_probs_BK, lengths_BK, **batch)
    if scored:
        candidates_BK = _given(signals.scores_BK, "scores_BK")
        if section.objective == "binary":
            value = binary_loss(candidates_BK, **batch)
        elif section.likelihood == "plackett_luce":
            value = plackett_luce_loss(candidates_BK, **batch)
        else:
            smoothing, noise = section.label_smoothing, section.label_noise
            batch |= {"margin": section.margin, "label_smoothing": smoothing, "label_noise": noise}
            value = ranked_loss(candidates_BK, **batch)
        terms["preference"] = 1.0, value
        if section.center_rewards_coef:
            penalty = centering_penalty(candidates_BK, ranks_BK, mask_BK, normalizer=normalizer)
            terms["centering"] = section.center_rewards_coef, penalty
    else:
        candidates_BK = candidate_scores(log_probs_BK, lengths_BK, "mean")
        mask_BK = mask_BK & ~candidates_BK.isnan()
    correct_B, pairs_B = pair_accuracy(candidates_BK, ranks_BK, mask_BK)
    loss = torch.stack([coefficient * value for coefficient, value in terms.values()]).sum()
    parts = {name: value.detach() for name, (_, value) in terms.items()}
    return ObjectiveLoss(loss, correct_B.sum(), pairs_B.sum(), parts)


def candidate_scores(log_probs_BK: Tensor, lengths_BK: Tensor, how: Literal["sum", "mean"]) -> Tensor:
    """What a language model ranks candidates by: the log-probability of a response, or its mean per token.

    log_probs_BK: summed log-probabilities. lengths_BK: tokens in each sum; 0 = not computed. Returns float32
    or better, NaN where the log-probability is not known: leave those out of the mask of a comparison.
    """
    sums_BK = log_probs_BK if log_probs_BK.dtype == torch.float64 else log_probs_BK.float()
    known_BK = torch.where(lengths_BK > 0, sums_BK, torch.nan)
    return known_BK if how == "sum" else known_BK / lengths_BK


def _given(signal: Tensor | None, name: str) -> Tensor:
    if signal is None:
        raise ValueError(f"the objective needs {name}")
    return signal


def _row_mean(row_loss_B: Tensor, counted_B: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """Sum of the rows, 0 where not counted, over their number or ``normalizer``."""
    return row_loss_B.sum() / (counted_B.sum().clamp(min=1) if normalizer is None else normalizer)


def _best_and_rest(ranks_BK: Tensor, mask_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The best of each row and the others; both empty in a row without an untied pair."""
    pairs_BKK = _untied_pairs(ranks_BK, mask_BK)
    beats_BK, beaten_BK = pairs_BKK.any(dim=2), pairs_BKK.any(dim=1)
    return beats_BK & ~beaten_BK, beaten_BK


def _clean(scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
    exact = scores_BK if scores_BK.dtype == torch.float64 else scores_BK.float()
    return torch.where(mask_BK, exact, 0.0)


def _gaps(x_BK: Tensor) -> Tensor:
    return x_BK.unsqueeze(2) - x_BK.unsqueeze(1)  # [b, i, j] = x_i - x_j


def _untied_pairs(ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    both_real_BKK = mask_BK.unsqueeze(2) & mask_BK.unsqueeze(1)
    return both_real_BKK & (ranks_BK.unsqueeze(2) < ranks_BK.unsqueeze(1))  # [b, i, j]: i better than j
