"""From token rewards to advantages: one estimator an algorithm, all of one signature.

Suffixes: ``_B`` response, ``_T`` response token. Masks: True = an action, padding on the right only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.models.masks import masked_whiten
from rlhf.recipe.ppo import Algorithm


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    lam_value: float | None = None,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimate of every action, and the return that its value is trained towards.

    rewards_BT; values_BT: the value BEFORE each action; mask_BT: True = an action. Padding may stand on the
    right only (else ValueError): an episode ends with its last action, behind which the value is 0.
    lam: one number, or one a response [B]; lam_value: that of the returns, None = lam.
    A_t = delta_t + gamma * lam * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t. Returns advantages_BT and
    returns_BT = advantages + values, both 0 where the mask is False.

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16; the returns are TD(lambda). Of their own lambda: Yuan et
    al. 2025 (VC-PPO, arXiv 2503.01491), section 3.3.
    """
    if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
        raise ValueError("an action follows padding: advantages need the padding on the right")
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    next_values_BT = torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], dim=1)
    deltas_BT = rewards_BT + gamma * next_values_BT - values_BT
    advantages_BT = _discounted(deltas_BT, gamma * lam)
    towards_BT = advantages_BT if lam_value is None else _discounted(deltas_BT, gamma * lam_value)
    return advantages_BT, towards_BT + values_BT


def _discounted(deltas_BT: Tensor, decay: float | Tensor) -> Tensor:
    """Sum over k of decay^k times the delta k steps later, [B, T]; decay: one number, or one a row [B]."""
    sum_B = torch.zeros_like(deltas_BT[:, 0])
    backwards = []
    for delta_B in reversed(deltas_BT.unbind(dim=1)):
        sum_B = delta_B + decay * sum_B
        backwards.append(sum_B)
    return torch.stack(backwards[::-1], dim=1)


def length_adaptive_lam(mask_BT: Tensor, alpha: float) -> Tensor:
    """Lambda of each response: 1 - 1 / (alpha * length), at least 0, [B].

    mask_BT: True = an action. The sum of the weights lambda^k of an endless response is 1 / (1 - lambda) =
    alpha * length: a share of the response, however long it is. Yue et al. 2025 (VAPO, arXiv 2504.05118),
    eq. 7, where alpha is 0.05 for responses of thousands of tokens.
    """
    lengths_B = mask_BT.sum(dim=-1).clamp(min=1)
    return (1.0 - 1.0 / (alpha * lengths_B)).clamp(min=0.0)


def reinforce(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float | Tensor = 1.0,
    lam_value: float | None = None,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """REINFORCE: the return from each action on, which is GAE with lambda 1 and no value.

    rewards_BT; mask_BT: True = an action; the rest is not used. Returns the returns twice.
    """
    return gae(rewards_BT, torch.zeros_like(values_BT), mask_BT, gamma=gamma, lam=1.0)


def leave_one_out(returns_KG: Tensor) -> Tensor:
    """RLOO: each response's return less the mean return of the other samples of its prompt.

    returns_KG: K >= 2 samples of G prompts, else ValueError. Returns advantages_KG, which sum to 0 over K:
    A = R - mean of the others = K / (K - 1) * (R - mean of all).

    Ahmadian et al. 2024 (arXiv 2402.14740), eq. 8; returns are of whole responses, KL included.
    """
    samples = returns_KG.shape[0]
    if samples < 2:
        raise ValueError("leave-one-out needs at least two samples of a prompt")
    return (returns_KG - returns_KG.mean(dim=0, keepdim=True)) * (samples / (samples - 1))


def rloo(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    lam_value: float | None = None,
    samples: int,
    of_group: Callable[[Tensor], Tensor] = leave_one_out,
) -> tuple[Tensor, Tensor]:
    """RLOO: the return of a whole response less the mean return of the other samples of its prompt.

    rewards_BT; mask_BT: True = an action. samples: responses a prompt; those of one prompt stand B / samples
    rows apart. of_group: advantages_KG from returns_KG. values_BT, gamma and lambdas are not used. Returns
    advantages_BT, one value for all actions of a response, and the responses' returns, both 0 where the mask
    is False.
    """
    returns_B1 = rewards_BT.sum(dim=-1, keepdim=True)
    advantages_B = of_group(returns_B1.view(samples, -1)).flatten()
    return advantages_B[:, None] * mask_BT, returns_B1 * mask_BT


def centered(returns_KG: Tensor) -> Tensor:
    """Dr. GRPO: each response's return less the mean return of its prompt's samples, itself included.

    returns_KG: K samples of G prompts. Liu et al. 2025 (arXiv 2503.20783), section 3.2: GRPO without the
    division, which gives prompts that are easy or hopeless the weight of the others.
    """
    return returns_KG - returns_KG.mean(dim=0, keepdim=True)


def standardized(returns_KG: Tensor) -> Tensor:
    """GRPO: :func:`centered`, divided by the standard deviation of the prompt's samples.

    returns_KG: K >= 2 samples of G prompts. Unbiased deviation plus 1e-4, as trl's GRPOTrainer has it; equal
    returns have no advantage. Shao et al. 2024 (arXiv 2402.03300), section 4.1.2.
    """
    return centered(returns_KG) / (returns_KG.std(dim=0, keepdim=True) + 1e-4)


Estimator = Callable[..., tuple[Tensor, Tensor]]
ADVANTAGE_ESTIMATORS: dict[str, Estimator] = {
    "ppo": gae,
    "rloo": rloo,
    "grpo": functools.partial(rloo, of_group=standardized),
    "dr_grpo": functools.partial(rloo, of_group=centered),
    "reinforce": reinforce,
}
"""Estimators by ``ppo.algorithm``; all have the signature of :func:`gae`."""


def estimate_advantages(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    algorithm: Algorithm,
    gamma: float,
    lam: float,
    samples: int,
    lam_value: float | None = None,
    lam_length: float | None = None,
    whiten: bool,
    all_reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of a rollout, [B, T] each, 0 where the mask is False.

    mask_BT: True = an action. lam_length: alpha of :func:`length_adaptive_lam`, whose lambdas then take the
    place of ``lam`` in the advantages; the returns keep ``lam_value``, or ``lam``. whiten: advantages to mean
    0 and variance 1 over the actions of all processes, whose sums ``all_reduce`` gives.
    """
    estimate = ADVANTAGE_ESTIMATORS[algorithm]
    if lam_value is None and lam_length is not None:
        lam_value = lam
    advantages_BT, returns_BT = estimate(
        rewards_BT,
        values_BT,
        mask_BT,
        gamma=gamma,
        lam=lam if lam_length is None else length_adaptive_lam(mask_BT, lam_length),
        lam_value=lam_value,
        samples=samples,
    )
    if whiten:
        advantages_BT = masked_whiten(advantages_BT, mask_BT, shift_mean=True, all_reduce=all_reduce)
    return advantages_BT, returns_BT
