"""The frozen-feature linear probe: what a reward model has to beat.

Logistic regression on the base model's last hidden state at the closing EOS. No weight of the base moves, so
a trained reward model that is no better has learned nothing that was not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reward.loss import pair_accuracy, ranked_loss
from reward.model.batch import Example, layout
from reward.model.forward import read_examples
from rlhf.models.trunk_cache import TrunkCache
from rlhf.stats.intervals import Estimate, cluster_mean_interval

_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)  # of L2; the best on a fifth of the training part is kept


def features(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    *,
    share: bool = False,
    trunk: TrunkCache | None = None,
) -> Tensor:
    """Last hidden state at the closing token of each response, flat and in order, [sum of K, D] float32."""
    return read_examples(
        model,
        examples,
        pad_id,
        lambda packed, hidden_NTD, _: hidden_NTD[packed.rows_B, packed.columns_B],
        share=share,
        trunk=trunk,
        name="probe",
    )


def _fit(x_ND: Tensor, where: tuple[Tensor, Tensor, Tensor], penalty: float) -> Tensor:
    """Weights that minimise the ranked loss plus an L2 penalty."""
    rows_BK, ranks_BK, mask_BK = where
    weights = torch.zeros(x_ND.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = ranked_loss((x_ND @ weights)[rows_BK], ranks_BK, mask_BK)
        loss = loss + penalty * weights.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weights.detach()


def _accuracy(weights: Tensor, x_ND: Tensor, where: tuple[Tensor, Tensor, Tensor]) -> Estimate:
    rows_BK, ranks_BK, mask_BK = where
    correct, pairs = pair_accuracy((x_ND @ weights)[rows_BK], ranks_BK, mask_BK)
    return cluster_mean_interval(correct.numpy(), pairs.numpy())


class Probe(NamedTuple):
    """A fitted probe."""

    weights_D: Tensor
    """Of a bias-free head on the unscaled features."""
    accuracy: Estimate
    """Held-out pair accuracy, its interval clustered by comparison."""


def fit_probe(
    model: nn.Module,
    train: Sequence[Example],
    held_out: Sequence[Example],
    pad_id: int,
    *,
    share: bool = False,
    trunk: TrunkCache | None = None,
) -> Probe:
    """Fit the linear probe and judge it.

    Args:
        model: a reward model whose adapter changes nothing yet.
        train: encoded comparisons to fit on; a fifth of them chooses the penalty.
        held_out: encoded comparisons to judge on.
        pad_id: padding token.
        share: pack the responses of a prompt behind one copy of it.
        trunk: states of all examples, where they have been computed.
    """
    x_ND = features(model, train, pad_id, share=share, trunk=trunk)
    y_ND = features(model, held_out, pad_id, share=share, trunk=trunk)
    mean, spread = x_ND.mean(0), x_ND.std(0).clamp_min(1e-6)
    x_ND, y_ND = (x_ND - mean) / spread, (y_ND - mean) / spread
    whole = layout(train)
    cut = max(1, len(train) * 4 // 5)
    fit, choose = tuple(t[:cut] for t in whole), tuple(t[cut:] for t in whole)
    best = _PENALTIES[2]
    if len(choose[0]):
        best = max(_PENALTIES, key=lambda p: _accuracy(_fit(x_ND, fit, p), x_ND, choose).mean)  # type: ignore[arg-type]
    weights_D = _fit(x_ND, whole, best)
    # the mean of the features changes no comparison, so only their spread has to be undone
    return Probe(weights_D / spread, _accuracy(weights_D, y_ND, layout(held_out)))
