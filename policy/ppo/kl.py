"""How far two policies have drifted apart: Monte-Carlo estimates of KL, and the controller of the KL
coefficient.

Every estimator takes the log-probabilities of the same tokens under two policies. The tokens were drawn
from the first one (q), and the estimate is of KL(q || p) = E_q[log q - log p]. For the drift from the
reference, q is the policy that wrote the response and p the reference; for the drift within an update, q is
the old policy and p the new one. Check numbers: J. Schulman, "Approximating KL Divergence" (2020).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.models.masks import masked_sum

if TYPE_CHECKING:
    from policy.ppo.rollout import Rollout
    from rlhf.recipe.schema import Ppo
    from rlhf.training.runtime import Runtime

MAX_RELATIVE_ERROR = 0.2  # the adaptive controller sees no larger error (Ziegler et al. 2019, official code)


def k1(logq: Tensor, logp: Tensor) -> Tensor:
    """Per sample log q - log p: unbiased for KL(q || p), of high variance, may be negative.

    logq, logp: any one shape, samples from q. No mask, no reduction. Schulman 2020, k1 = -log r, r = p / q.
    """
    return logq - logp


def k2(logq: Tensor, logp: Tensor) -> Tensor:
    """Per sample (log q - log p)^2 / 2: slightly biased for KL(q || p), of low variance, never negative.

    logq, logp: any one shape, samples from q. No mask, no reduction. Schulman 2020, k2 = (log r)^2 / 2.
    """
    return 0.5 * (logq - logp).square()


def k3(logq: Tensor, logp: Tensor) -> Tensor:
    """Per sample (r - 1) - log r with r = p / q: unbiased for KL(q || p), of low variance, never negative.

    logq, logp: any one shape, samples from q. No mask, no reduction. Schulman 2020, k3. As a loss its
    gradient is biased; it is meant to be read, not to be descended (arXiv 2510.01555).
    """
    log_r = logp - logq
    return torch.expm1(log_r) - log_r


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def sequence_kl(logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """KL of whole responses from the reference: the sum of k1 over the actions of each.

    logp_BT: the policy that wrote the responses; ref_logp_BT: the reference; mask_BT: True = an action.
    Returns kl_B in nats, positive where the policy prefers its response more than the reference does.
    Ziegler et al. 2019 (arXiv 1909.08593), the logged KL of the official code.
    """
    return masked_sum(k1(logp_BT, ref_logp_BT), mask_BT, dim=-1)


def forward_kl(logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """KL(reference || policy) of whole responses that the policy wrote, by importance weights.

    With w_t = the product of reference / policy over the actions up to t, and r_t the last factor:
    sum_t (w_t log r_t) - (w_T - 1), which is a sum of w_{t-1} (r_t log r_t - r_t + 1), never negative, and
    unbiased for E_reference[log reference - log policy]. Its variance grows without bound as the two part:
    what the reference says and the policy hardly ever does is missing from nearly every batch, so that a
    single one says too little. Of the direction: Shenfeld 2025 (arXiv 2509.04259).

    logp_BT, ref_logp_BT, mask_BT: as in :func:`sequence_kl`. Returns kl_B in nats; log w is cut at 50.
    """
    ratio_BT = torch.where(mask_BT, ref_logp_BT - logp_BT, 0.0).double()
    weight_BT = ratio_BT.cumsum(-1).clamp(max=50.0).exp()
    return ((weight_BT * ratio_BT).sum(-1) - weight_BT[:, -1] + 1.0).to(logp_BT.dtype)


def adapt(beta: float, kl: float, *, target: float, horizon: float, n: int) -> float:
    """Move the KL coefficient so that the KL of a sequence approaches its target.

    beta' = beta * (1 + e * n / horizon) with e = clip(kl / target - 1, -0.2, 0.2): a KL above the target
    raises the coefficient. kl: mean over the batch of :func:`sequence_kl`; n: episodes in the batch;
    horizon: in episodes. A fixed coefficient is one that is never adapted.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2, eq. for log-space proportional control, in the form
    of the official code (target 6, beta 0.15 at the start, horizon 10,000).
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"KL target {target} and horizon {horizon} must be positive")
    if not math.isfinite(kl):
        raise ValueError(f"the KL is {kl}: the coefficient cannot follow it")
    error = min(max(kl / target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return beta * (1.0 + error * n / horizon)


class KLController:
    """The KL coefficient: fixed, or adapted to the KL of whole responses (:func:`adapt`).

    Args:
        section: the recipe's ``ppo`` section.
        runtime: the processes.
    """

    def __init__(self, section: Ppo, runtime: Runtime) -> None:
        self.section, self.runtime, self.coef = section, runtime, section.kl_coef

    def update(self, rollout: Rollout) -> None:
        """Adapt the coefficient to the KL of a rollout, where it is adaptive; every process must call it."""
        section = self.section
        if section.kl_controller == "fixed":
            return
        kl_B = sequence_kl(rollout.log_probs_BR, rollout.reference_log_probs_BR, rollout.actions_BR)
        self.coef = adapt(
            self.coef,
            float(self.runtime.all_sum(kl_B.sum())) / section.batch_size,
            target=section.kl_controller_target,
            horizon=section.kl_controller_horizon,
            n=section.batch_size,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; numbers survive JSON exactly."""
        return {"kl_coef": self.coef}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.coef = float(state["kl_coef"])
