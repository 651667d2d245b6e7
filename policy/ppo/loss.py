"""The losses of PPO.

All are sums over counted tokens times ``weights``, and so is every statistic except the largest ratio. The
weights of a whole minibatch sum to 1 (:func:`token_weights`), so the values of its micro-batches, and of all
ranks, simply add up to the mean over the minibatch, however unequally the tokens are spread. Where the ranks
AVERAGE their gradients instead of adding them, multiply by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from policy.ppo.kl import ESTIMATORS, k3
from rlhf.models.masks import masked_sum


class PolicyStats(NamedTuple):
    """What a policy update did, as scalar tensors without gradient; :meth:`plus` joins micro-batches."""

    ratio: Tensor  # mean of pi_new / pi_old; sums over micro-batches
    max_ratio_error: Tensor  # largest |ratio - 1|; maximum over micro-batches
    clip_fraction: Tensor  # share of tokens where the clip cut the gradient off; sums
    kl_k3: Tensor  # KL(old || new), unbiased; sums

    def plus(self, other: PolicyStats) -> PolicyStats:
        """Join the statistics of two micro-batches of one minibatch."""
        return PolicyStats(
            ratio=self.ratio + other.ratio,
            max_ratio_error=torch.maximum(self.max_ratio_error, other.max_ratio_error),
            clip_fraction=self.clip_fraction + other.clip_fraction,
            kl_k3=self.kl_k3 + other.kl_k3,
        )


def token_weights(
    mask_BT: Tensor, level: Literal["token", "sequence"], all_sum: Callable[[Tensor], Tensor]
) -> Tensor:
    """What each action of a minibatch counts, so that the weights of all ranks sum to 1.

    mask_BT: this rank's rows of the minibatch, True = an action. level "token": every action alike;
    "sequence": every response alike, its actions sharing its part. all_sum: sums a tensor over ranks. Returns
    weights_BT, 0 where the mask is False. A response without an action counts nothing.
    """
    counts_B1 = mask_BT.sum(dim=-1, keepdim=True)
    if level == "token":
        return mask_BT / all_sum(counts_B1.sum())
    if level == "sequence":
        return mask_BT / (counts_B1.clamp(min=1) * all_sum((counts_B1 > 0).sum()))
    raise ValueError(f"level {level!r} is neither 'token' nor 'sequence'")


def policy_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    weights_BT: Tensor,
    clip: float | None,
    dual_clip: float | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Clipped surrogate: weighted sum over actions of max(-A r, -A clip(r, 1 - clip, 1 + clip)).

    r = exp(logp - old_logp). logp_BT carries the gradient; old_logp_BT and advantages_BT are constants.
    mask_BT: True = an action. clip None: -A r. dual_clip c: where A is negative, no more than -A c, so that
    one action that has become far more probable cannot rule the update. To be minimized. Returns the scalar
    loss and its :class:`PolicyStats`.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, with the sign turned; dual clip: Ye et al. 2020 (arXiv
    1912.09729), eq. 5.
    """
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    plain_BT = -advantages_BT * ratio_BT
    held_BT = plain_BT
    if clip is not None:
        held_BT = torch.maximum(plain_BT, -advantages_BT * ratio_BT.clamp(1.0 - clip, 1.0 + clip))
    if dual_clip is not None:
        bound_BT = -advantages_BT * dual_clip
        held_BT = torch.where(advantages_BT < 0, torch.minimum(held_BT, bound_BT), held_BT)
    loss = masked_sum(held_BT * weights_BT, mask_BT)
    with torch.no_grad():
        old_BT = torch.zeros_like(log_ratio_BT)
        error_BT = (ratio_BT - 1.0).abs()  # 0 outside the mask
        stats = PolicyStats(
            ratio=masked_sum(ratio_BT * weights_BT, mask_BT),
            max_ratio_error=error_BT.max() if error_BT.numel() else error_BT.sum(),
            clip_fraction=masked_sum((held_BT != plain_BT) * weights_BT, mask_BT),
            kl_k3=masked_sum(k3(old_BT, log_ratio_BT) * weights_BT, mask_BT),
        )
    return loss, stats


def kl_loss(
    logp_BT: Tensor,
    ref_logp_BT: Tensor,
    mask_BT: Tensor,
    *,
    weights_BT: Tensor,
    estimator: Literal["k2", "k3"],
) -> Tensor:
    """Weighted sum over actions of an estimate of KL(policy || reference), with its gradient.

    logp_BT carries the gradient; ref_logp_BT is a constant; mask_BT: True = an action. On-policy, k2 has the
    gradient of each token's true KL; k1 as a reward has the same, and prices beside it the KL that a token
    leads to later in its response. k3's is biased; k1's is 0 on average and refused (ValueError). Schulman
    2020; arXiv 2510.01555.
    """
    if estimator not in ("k2", "k3"):
        raise ValueError(f"estimator {estimator!r}: as a loss only k2 and k3 have a useful gradient")
    logp_BT = torch.where(mask_BT, logp_BT, 0.0)  # else NaN outside the mask would reach the gradient
    return masked_sum(ESTIMATORS[estimator](logp_BT, ref_logp_BT) * weights_BT, mask_BT)


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    weights_BT: Tensor,
    clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Clipped value loss: weighted sum over actions of max((v - R)^2, (v' - R)^2) / 2.

    v' = v held within clip of the old value; clip None = the plain squared error. values_BT carries the
    gradient; old_values_BT and returns_BT are constants. mask_BT: True = an action. To be minimized.
    Returns the scalar loss and the share of tokens where the clip cut the gradient off (0 without a clip).

    Ziegler et al. 2019 (arXiv 1909.08593), official code: value clip 0.2, weight 0.1 beside the policy loss.
    """
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    plain_BT = (values_BT - returns_BT).square()
    held_BT = values_BT
    if clip is not None:
        held_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    clipped_BT = (held_BT - returns_BT).square()
    loss = 0.5 * masked_sum(torch.maximum(plain_BT, clipped_BT) * weights_BT, mask_BT)
    with torch.no_grad():
        clip_fraction = masked_sum((clipped_BT > plain_BT) * weights_BT, mask_BT)
    return loss, clip_fraction
