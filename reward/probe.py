"""The frozen-feature linear probe: what a reward model has to beat.

Logistic regression on the base model's last hidden state at the closing EOS. No weight of the base moves, so
a trained reward model that is no better has learned nothing that was not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reward.batches import layout, token_batches
from reward.loss import pair_accuracy, ranked_loss
from rlhf.intervals import Estimate, cluster_mean_interval
from rlhf.sequences import last_true_index, positions_from_mask, right_pad

_TOKENS_AT_ONCE = 4096
_PENALTIES = (
    1.0,
    0.3,
    0.1,
    0.03,
    0.01,
)  # L2 strengths tried; the best on a fifth of the training part is kept


@torch.no_grad()
def features(decoder: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Last hidden state at the last token of each row, [N, D] float32."""
    device = next(decoder.parameters()).device
    parts: dict[int, Tensor] = {}
    for batch in token_batches(rows, _TOKENS_AT_ONCE):
        ids_NT, mask_NT = (t.to(device) for t in right_pad([rows[i] for i in batch], pad_id))
        hidden = decoder(
            input_ids=ids_NT,
            attention_mask=mask_NT.long(),
            position_ids=positions_from_mask(mask_NT),
            use_cache=False,
        ).last_hidden_state
        last = hidden[torch.arange(len(batch), device=device), last_true_index(mask_NT)]
        parts.update(zip(batch, last.float().cpu(), strict=True))
    return torch.stack([parts[i] for i in range(len(rows))])


def _fit(x_ND: Tensor, where: tuple[Tensor, Tensor, Tensor], penalty: float) -> Tensor:
    """Weights that minimise the ranked loss plus an L2 penalty."""
    rows_BK, ranks_BK, mask_BK = where
    weights = torch.zeros(x_ND.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss, _, _ = ranked_loss((x_ND @ weights)[rows_BK], ranks_BK, mask_BK)
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
    decoder: nn.Module, train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], pad_id: int
) -> Probe:
    """Fit the linear probe and judge it.

    Args:
        decoder: the frozen base without its vocabulary head.
        train: encoded comparisons to fit on; a fifth of them chooses the penalty.
        held_out: encoded comparisons to judge on.
        pad_id: padding token.
    """
    x_ND = features(decoder, [r for e in train for r in e["responses"]], pad_id)
    y_ND = features(decoder, [r for e in held_out for r in e["responses"]], pad_id)
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
