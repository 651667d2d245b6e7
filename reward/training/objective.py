"""What a model is trained to do with comparisons: one object that turns its outputs into a loss.

The formulas are in :mod:`reward.loss`; here a recipe's section chooses among them and adds them up. Suffixes,
ranks and masks are those of :mod:`reward.loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reward.loss import (
    binary_loss,
    centring_penalty,
    imitation_loss,
    pair_accuracy,
    plackett_luce_loss,
    ranked_loss,
)
from rlhf.recipe.schema import PreferenceTraining


class Signals(NamedTuple):
    """What a model says about a few comparisons."""

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


class Outcome(NamedTuple):
    """A loss and what goes into the log."""

    loss: Tensor
    """To be minimised: preference + centring * centring penalty + lm_coef * language."""
    correct: Tensor
    """Sum over the untied pairs of 1 (right order), 1/2 (equal) or 0, by this objective's ranking."""
    pairs: Tensor
    """Their number."""
    parts: dict[str, Tensor]
    """The terms that are on, before their coefficients, detached, divided as the loss is: ``preference``,
    ``centring``, ``language``."""


@dataclass(frozen=True)
class Objective:
    """The loss that a section asks for, and how it ranks candidates."""

    section: PreferenceTraining

    @property
    def needs_scores(self) -> bool:
        """Whether the head's score of every response is needed."""
        return self.section.objective != "imitation"

    @property
    def needs_language(self) -> bool:
        """Whether the log-probability of the best responses is needed."""
        return self.section.objective == "imitation" or self.section.lm_coef > 0

    def __call__(self, signals: Signals, *, normaliser: float) -> Outcome:
        """Loss and pair accuracy of a micro-batch.

        normaliser: comparisons of the whole batch, all of which have an untied pair; the losses of its
        micro-batches then add up to the mean of the batch.
        Candidates are ranked by score, in an imitation by mean log-probability; there a pair counts only
        when both log-probabilities are known. A missing signal is a ValueError.
        """
        section, ranks_BK, mask_BK = self.section, signals.ranks_BK, signals.mask_BK
        terms: dict[str, tuple[float, Tensor]] = {}  # coefficient, value
        if self.needs_language:
            log_probs_BK = _given(signals.log_probs_BK, "log_probs_BK")
            lengths_BK = _given(signals.lengths_BK, "lengths_BK")
            value = imitation_loss(log_probs_BK, lengths_BK, ranks_BK, mask_BK, normaliser=normaliser)
            terms["language"] = section.lm_coef if self.needs_scores else 1.0, value
        if self.needs_scores:
            candidates_BK = _given(signals.scores_BK, "scores_BK")
            value = self._preference(candidates_BK, ranks_BK, mask_BK, normaliser)
            terms["preference"] = 1.0, value
            if section.centring:
                value = centring_penalty(candidates_BK, ranks_BK, mask_BK, normaliser=normaliser)
                terms["centring"] = section.centring, value
        else:
            candidates_BK = candidate_scores(log_probs_BK, lengths_BK, "mean")
            mask_BK = mask_BK & ~candidates_BK.isnan()
        correct_B, pairs_B = pair_accuracy(candidates_BK, ranks_BK, mask_BK)
        loss = torch.stack([coefficient * value for coefficient, value in terms.values()]).sum()
        parts = {name: value.detach() for name, (_, value) in terms.items()}
        return Outcome(loss, correct_B.sum(), pairs_B.sum(), parts)

    def _preference(self, scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor, normaliser: float) -> Tensor:
        section = self.section
        if section.objective == "binary":
            return binary_loss(scores_BK, ranks_BK, mask_BK, normaliser=normaliser)
        if section.likelihood == "plackett_luce":
            return plackett_luce_loss(scores_BK, ranks_BK, mask_BK, normaliser=normaliser)
        loss, _, _ = ranked_loss(
            scores_BK,
            ranks_BK,
            mask_BK,
            normaliser=normaliser,
            margin=section.margin,
            label_smoothing=section.label_smoothing,
            label_noise=section.label_noise,
        )
        return loss


def objective(section: PreferenceTraining) -> Objective:
    """The objective of a recipe's `pmp` or `reward` section."""
    return Objective(section)


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
