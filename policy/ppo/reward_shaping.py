"""From the scores of a rollout to what the update aims at; holds what that remembers from step to step.

Order (each part optional): normalise and clip the scores, penalise missing ends and length, charge the KL,
whiten token rewards, estimate advantages, whiten them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from policy.ppo.advantages import gae, leave_one_out, penalise_length, penalise_missing_eos, token_rewards
from policy.ppo.kl import adapt, sequence_kl
from policy.ppo.rollout import Rollout
from rlhf.models.masks import masked_whiten
from rlhf.recipe.schema import Ppo
from rlhf.training.runtime import Runtime


class Targets(NamedTuple):
    """What the update aims at."""

    rewards_BR: Tensor
    """Of every action: the score at the end, less the price of the KL."""
    advantages_BR: Tensor
    returns_BR: Tensor
    """What the value is trained towards."""
    total_actions: Tensor
    """Actions of the whole batch, over all processes."""


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


class Aim:
    """Shapes rewards and estimates advantages; remembers the KL coefficient and the scores' moments.

    Args:
        section: the recipe's ``ppo`` section.
        runtime: the processes.
    """

    def __init__(self, section: Ppo, runtime: Runtime) -> None:
        self.section, self.runtime = section, runtime
        self.kl_coef = section.kl_coef
        self.moments = Moments()

    def __call__(self, rollout: Rollout) -> Targets:
        """Targets of a rollout; every process must call it, once a step."""
        section, actions = self.section, rollout.actions_BR
        rewards_BR = token_rewards(
            self.scores(rollout),
            rollout.log_probs_BR,
            rollout.reference_log_probs_BR,
            actions,
            kl_coef=self.kl_coef if section.kl_in == "reward" else 0.0,
            estimator=section.kl_estimator,
        )
        if section.whiten_rewards:
            rewards_BR = masked_whiten(rewards_BR, actions, shift_mean=False, all_reduce=self.runtime.all_sum)
        advantages_BR, returns_BR = self._estimate(rollout, rewards_BR)
        if section.whitens_advantages:
            advantages_BR = masked_whiten(
                advantages_BR, actions, shift_mean=True, all_reduce=self.runtime.all_sum
            )
        return Targets(rewards_BR, advantages_BR, returns_BR, self.runtime.all_sum(actions.sum()))

    def scores(self, rollout: Rollout) -> Tensor:
        """Scores [B] as they enter the reward."""
        section, scores_B = self.section, rollout.scores_B
        if section.score_normalisation == "running":
            self.moments = self.moments.joined(self._moments_of(scores_B))
            scores_B = (scores_B - self.moments.mean) / self.moments.deviation
        if section.score_clip is not None:
            scores_B = scores_B.clamp(-section.score_clip, section.score_clip)
        if section.missing_eos != "ignore":
            scores_B = penalise_missing_eos(
                scores_B, rollout.ended_B, penalty=section.missing_eos_penalty, mode=section.missing_eos
            )
        if section.length_penalty:
            lengths_B = rollout.actions_BR.sum(dim=-1)
            scores_B = penalise_length(
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

    def _estimate(self, rollout: Rollout, rewards_BR: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns."""
        section, actions = self.section, rollout.actions_BR
        if section.algorithm == "ppo":
            return gae(rewards_BR, rollout.values_BR, actions, gamma=section.gamma, lam=section.lam)
        if section.algorithm == "reinforce":  # the return to go is GAE without a value
            nothing_BR = torch.zeros_like(rewards_BR)
            return gae(rewards_BR, nothing_BR, actions, gamma=section.gamma, lam=1.0)
        # the samples of a prompt stand batch_size / samples rows apart, so on one process
        groups_KG = rewards_BR.sum(dim=-1).view(section.samples, -1)
        advantages_B = leave_one_out(groups_KG).flatten()
        advantages_BR = advantages_B[:, None] * actions
        return advantages_BR, rewards_BR.sum(dim=-1, keepdim=True) * actions

    def follow(self, rollout: Rollout) -> None:
        """Let an adaptive KL coefficient follow the KL of a rollout; every process must call it."""
        section = self.section
        if section.kl_control == "fixed":
            return
        kl_B = sequence_kl(rollout.log_probs_BR, rollout.reference_log_probs_BR, rollout.actions_BR)
        self.kl_coef = adapt(
            self.kl_coef,
            float(self.runtime.all_sum(kl_B.sum())) / section.batch_size,
            target=section.kl_target,
            horizon=section.kl_horizon,
            n=section.batch_size,
        )

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps; numbers survive JSON exactly."""
        return {"kl_coef": self.kl_coef, "score_moments": list(self.moments)}

    def restore(self, state: dict[str, object]) -> None:
        """Go on from :meth:`state`."""
        self.kl_coef = float(state["kl_coef"])  # type: ignore[arg-type]
        self.moments = Moments(*state["score_moments"])  # type: ignore[misc]
