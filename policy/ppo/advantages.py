"""From one score per response to one advantage per token.

Suffixes: ``_B`` response, ``_T`` response token. Masks: True = an action, padding on the right only.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from policy.ppo.kl import ESTIMATORS
from rlhf.models.masks import last_true_index


def penalise_missing_eos(
    scores_B: Tensor,
    ended_B: Tensor,
    *,
    penalty: float,
    mode: Literal["replace", "subtract"] = "replace",
) -> Tensor:
    """Lower the score of every response that was cut off before it ended.

    scores_B; ended_B: True = the response has an EOS and keeps its score. penalty: positive number.
    mode "replace" (default): the score becomes -penalty, whatever it was; the EOS trick of Huang et al. 2024
    (arXiv 2403.17031, detail 13, penalty 1). mode "subtract": the score falls by penalty, as TRL's
    ``missing_eos_penalty`` does. Returns scores_B.
    """
    if penalty < 0:
        raise ValueError(f"penalty {penalty} would reward a missing EOS: give it as a positive number")
    if mode == "replace":
        return torch.where(ended_B, scores_B, -penalty)
    if mode == "subtract":
        return torch.where(ended_B, scores_B, scores_B - penalty)
    raise ValueError(f"mode {mode!r} is neither 'replace' nor 'subtract'")


def penalise_length(scores_B: Tensor, lengths_B: Tensor, *, penalty: float, target: int) -> Tensor:
    """Lower a score by ``penalty`` for every token of its response beyond ``target``.

    scores_B; lengths_B: actions of each response. Returns scores_B. A linear penalty is the simplest of those
    that keep a reward model's taste for length in check (Singhal 2023, arXiv 2310.03716).
    """
    return scores_B - penalty * (lengths_B - target).clamp(min=0).to(scores_B.dtype)


def token_rewards(
    scores_B: Tensor,
    logp_BT: Tensor,
    ref_logp_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl_coef: float,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> Tensor:
    """Spread a score over the actions: -kl_coef * KL estimate on each, plus the score on the last.

    scores_B: one per response. logp_BT: the policy that wrote the response; ref_logp_BT: the reference.
    mask_BT: True = an action, EOS included. Returns rewards_BT, 0 where the mask is False; higher is better;
    with k1 the sum over T is score - kl_coef * sequence KL. A row without an action is a ValueError.

    Ouyang et al. 2022 (arXiv 2203.02155), eq. 2 with gamma 0; Huang et al. 2024 (arXiv 2403.17031), details
    14 and 15.
    """
    rewards_BT = torch.where(mask_BT, -kl_coef * ESTIMATORS[estimator](logp_BT, ref_logp_BT), 0.0)
    last_B1 = last_true_index(mask_BT).unsqueeze(-1)
    return rewards_BT.scatter_add(-1, last_B1, scores_B.to(rewards_BT.dtype).unsqueeze(-1))


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimate of every action, and the return that its value is trained towards.

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
