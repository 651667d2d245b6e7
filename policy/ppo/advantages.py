"""From token rewards to advantages: one estimator an algorithm, all of one signature.

Suffixes: ``_B`` response, ``_T`` response token. Masks: True = an action, padding on the right only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rlhf.models.masks import masked_whiten


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimate of every action, and the return that its value is trained towards.

    rewards_BT; values_BT: the value BEFORE each action; mask_BT: True = an action. Padding may stand on the
    right only (else ValueError): an episode ends with its last action, behind which the value is 0.
    A_t = delta_t + gamma * lam * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t. Returns advantages_BT and
    returns_BT = advantages + values, both 0 where the mask is False.

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16; the returns are TD(lambda).
    """
    if bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
        raise ValueError("an action follows padding: advantages need the padding on the right")
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    next_values_BT = torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], dim=1)
    deltas_BT = rewards_BT + gamma * next_values_BT - values_BT
    advantage_B = torch.zeros_like(deltas_BT[:, 0])
    backwards = []
    for delta_B in reversed(deltas_BT.unbind(dim=1)):
        advantage_B = delta_B + gamma * lam * advantage_B
        backwards.append(advantage_B)
    advantages_BT = torch.stack(backwards[::-1], dim=1)
    return advantages_BT, advantages_BT + values_BT


def reinforce(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """REINFORCE: the return from each action on, which is GAE with lambda 1 and no value.

    rewards_BT; mask_BT: True = an action; values_BT, lam and samples are not used. Returns the returns twice.
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
    lam: float = 1.0,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """RLOO: the return of a whole response less the mean return of the other samples of its prompt.

    rewards_BT; mask_BT: True = an action. samples: responses a prompt; those of one prompt stand B / samples
    rows apart. values_BT, gamma and lam are not used. Returns advantages_BT, one value for all actions of a
    response, and the responses' returns, both 0 where the mask is False.
    """
    returns_B1 = rewards_BT.sum(dim=-1, keepdim=True)
    advantages_B = leave_one_out(returns_B1.view(samples, -1)).flatten()
    return advantages_B[:, None] * mask_BT, returns_B1 * mask_BT


Estimator = Callable[..., tuple[Tensor, Tensor]]
ADVANTAGE_ESTIMATORS: dict[str, Estimator] = {"ppo": gae, "rloo": rloo, "reinforce": reinforce}
"""Estimators by ``ppo.algorithm``; all have the signature of :func:`gae`."""


def estimate_advantages(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    algorithm: Literal["ppo", "rloo", "reinforce"],
    gamma: float,
    lam: float,
    samples: int,
    whiten: bool,
    all_reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of a rollout, [B, T] each, 0 where the mask is False.

    mask_BT: True = an action. whiten: advantages to mean 0 and variance 1 over the actions of all processes,
    whose sums ``all_reduce`` gives.
    """
    estimate = ADVANTAGE_ESTIMATORS[algorithm]
    advantages_BT, returns_BT = estimate(
        rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, samples=samples
    )
    if whiten:
        advantages_BT = masked_whiten(advantages_BT, mask_BT, shift_mean=True, all_reduce=all_reduce)
    return advantages_BT, returns_BT
