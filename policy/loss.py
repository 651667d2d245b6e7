"""The two losses of PPO.

Both are sums over counted tokens divided by ``normaliser``, and so is every statistic except the largest
ratio. With the normaliser = all counted tokens of a minibatch, the values of its micro-batches (and of all
ranks) simply add up to the mean over the minibatch, however unequally the tokens are spread. Where the ranks
AVERAGE their gradients instead of adding them, divide the normaliser by the number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policy.kl import k2, k3
from rlhf.sequences import masked_sum


class PolicyStats(NamedTuple):
    """What a policy update did, as scalar tensors without gradient; :meth:`plus` joins micro-batches."""

    ratio: Tensor  # mean of pi_new / pi_old; sums over micro-batches
    max_ratio_error: Tensor  # largest |ratio - 1|; maximum over micro-batches
    clip_fraction: Tensor  # share of tokens where the clip cut the gradient off; sums
    kl_k3: Tensor  # KL(old || new), unbiased; sums
    kl_k2: Tensor  # half the mean squared log ratio, "approxkl" in older code; sums

    def plus(self, other: PolicyStats) -> PolicyStats:
        """Join the statistics of two micro-batches that were given the same normaliser."""
        return PolicyStats(
            ratio=self.ratio + other.ratio,
            max_ratio_error=torch.maximum(self.max_ratio_error, other.max_ratio_error),
            clip_fraction=self.clip_fraction + other.clip_fraction,
            kl_k3=self.kl_k3 + other.kl_k3,
            kl_k2=self.kl_k2 + other.kl_k2,
        )


def policy_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float,
    normaliser: float | Tensor,
) -> tuple[Tensor, PolicyStats]:
    """Clipped surrogate: sum over actions of max(-A r, -A clip(r, 1 - clip, 1 + clip)) / normaliser.

    r = exp(logp - old_logp). logp_BT carries the gradient; old_logp_BT and advantages_BT are constants.
    mask_BT: True = an action. To be minimised. Returns the scalar loss and its :class:`PolicyStats`.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, with the sign turned.
    """
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1.0 - clip, 1.0 + clip)
    loss = masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT) / normaliser
    with torch.no_grad():
        old_BT = torch.zeros_like(log_ratio_BT)
        error_BT = (ratio_BT - 1.0).abs()  # 0 outside the mask
        stats = PolicyStats(
            ratio=masked_sum(ratio_BT, mask_BT) / normaliser,
            max_ratio_error=error_BT.max() if error_BT.numel() else error_BT.sum(),
            clip_fraction=masked_sum(clipped_BT > plain_BT, mask_BT) / normaliser,
            kl_k3=masked_sum(k3(old_BT, log_ratio_BT), mask_BT) / normaliser,
            kl_k2=masked_sum(k2(old_BT, log_ratio_BT), mask_BT) / normaliser,
        )
    return loss, stats


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float | None,
    normaliser: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Clipped value loss: sum over actions of max((v - R)^2, (v' - R)^2) / 2 / normaliser.

    v' = v held within clip of the old value; clip None = the plain squared error. values_BT carries the
    gradient; old_values_BT and returns_BT are constants. mask_BT: True = an action. To be minimised.
    Returns the scalar loss and the share of tokens where the clip cut the gradient off (0 without a clip).

    Ziegler et al. 2019 (arXiv 1909.08593), official code: value clip 0.2, weight 0.1 beside the policy loss.
    """
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    plain_BT = (values_BT - returns_BT).square()
    held_BT = values_BT
    if clip is not None:
        held_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    clipped_BT = (held_BT - returns_BT).square()
    loss = 0.5 * masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT) / normaliser
    with torch.no_grad():
        clip_fraction = masked_sum(clipped_BT > plain_BT, mask_BT) / normaliser
    return loss, clip_fraction
