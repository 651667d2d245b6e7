"""From the scores of a rollout to one reward a token.

Order (each part optional): shape or normalize the scores, clip them, penalize missing EOS and length,
subtract the KL penalty, whiten the token rewards.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.ppo.kl import ESTIMATORS
from policy.ppo.rollout import Rollout
from rlhf.models.masks import last_true_index, masked_whiten
from rlhf.recipe.schema import Ppo
from rlhf.training.runtime import Runtime


def shape_scores(scores_B: Tensor, baseline_BM: Tensor, kind: Literal["sigmoid", "log_sigmoid"]) -> Tensor:
    """Scores as what they gain on the reference, squashed, so that a single score cannot be all of a reward.

    scores_B; baseline_BM: scores of M responses of the reference to the same prompt. Returns the mean over M
    of sigmoid(r - r_m), in (0, 1): under Bradley-Terry the chance to be preferred to the reference's response
    (PAR: Fu et al. 2025, arXiv 2502.18770, section 3); or of log sigmoid(r - r_m), below 0, which grows where
    a response is worse and levels off where it is better (Wang et al. 2024, arXiv 2402.00742, eq. 4, there
    with one reference value a prompt).
    """
    gain_BM = scores_B[:, None] - baseline_BM
    squash = {"sigmoid": torch.sigmoid, "log_sigmoid": F.logsigmoid}[kind]
    return squash(gain_BM).mean(dim=-1)


def penalize_missing_eos(
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


def penalize_length(scores_B: Tensor, lengths_B: Tensor, *, penalty: float, target: int) -> Tensor:
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


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of all scores so far (Chan 1979)."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def joined(self, other: Moments) -> Moments:
        """Of both sets together."""
        number = self.number + other.number
        if not number:
            return self
        gap = other.mean - self.mean
        return Moments(
            number,
            self.mean + gap * other.number / number,
            self.squares + other.squares + gap * gap * self.number * other.number / number,
        )

    @property
    def deviation(self) -> float:
        """Population standard deviation; 1 where all scores are equal, so that dividing by it is harmless."""
        return math.sqrt(self.squares / self.number) or 1.0 if self.number else 1.0


class RewardShaper:
    """From the scores of a rollout to one reward a token; remembers the running moments of the scores.

    Args:
        section: the recipe's ``ppo`` section.
        runtime: the processes.
    """

    def __init__(self, section: Ppo, runtime: Runtime) -> None:
        self.section, self.runtime, self.moments = section, runtime, Moments()

    def __call__(self, rollout: Rollout, kl_coef: float) -> Tensor:
        """Rewards [B, R]: the score on the last action, less ``kl_coef`` times the KL estimate on each.

        Every process must call it, once a step. With ``kl_in: loss`` the KL is no part of the reward.
        """
        section, actions = self.section, rollout.actions_BR
        rewards_BR = token_rewards(
            self.scores(rollout),
            rollout.log_probs_BR,
            rollout.reference_log_probs_BR,
            actions,
            kl_coef=kl_coef if section.kl_in == "reward" else 0.0,
            estimator=section.kl_estimator,
        )
        if section.whiten_rewards:
            rewards_BR = masked_whiten(rewards_BR, actions, shift_mean=False, all_reduce=self.runtime.all_sum)
        return rewards_BR

    def shaped(self, rollout: Rollout) -> Tensor:
        """Scores [B] as gains on the reference, squashed, where the recipe has a score shape."""
        if self.section.score_shape == "none":
            return rollout.scores_B
        assert rollout.baseline_BM is not None, "collected with the same section"
        return shape_scores(rollout.scores_B, rollout.baseline_BM, self.section.score_shape)

    def scores(self, rollout: Rollout) -> Tensor:
        """Scores [B] as they enter the reward."""
        section, scores_B = self.section, self.shaped(rollout)
        if section.score_normalization == "running":
            self.moments = self.moments.joined(self._moments_of(scores_B))
            scores_B = (scores_B - self.moments.mean) / self.moments.deviation
        if section.score_clip is not None:
            scores_B = scores_B.clamp(-section.score_clip, section.score_clip)
        if section.missing_eos != "ignore":
            scores_B = penalize_missing_eos(
                scores_B, rollout.ended_B, penalty=section.missing_eos_penalty, mode=section.missing_eos
            )
        if section.length_penalty:
            lengths_B = rollout.actions_BR.sum(dim=-1)
            scores_B = penalize_length(
                scores_B, lengths_B, penalty=section.length_penalty, target=section.length_target
            )
        return scores_B

    def _moments_of(self, scores_B: Tensor) -> Moments:
        """Of the scores of all processes."""
        wide_B = scores_B.double()
        count, total = self.runtime.all_sum(
            torch.stack([torch.full_like(wide_B, 1.0).sum(), wide_B.sum()])
        ).tolist()
        squares = float(self.runtime.all_sum((wide_B - total / count).square().sum()))
        return Moments(count, total / count, squares)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; numbers survive JSON exactly."""
        return {"score_moments": list(self.moments)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.moments = Moments(*state["score_moments"])
