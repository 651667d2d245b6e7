"""Several rewards as one: each scored, guarded by its name, normalized on request, weighted and added up.

Shape suffix: ``_B`` response row of this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policy.ppo.reward_shaping import Moments
from policy.ppo.rollout import Responses, RewardFn, of_rows
from rlhf.collect.functions import RewardFunction
from rlhf.collect.judges import Judge
from rlhf.errors import UserError

MOMENTS = "reward_moments"  # key of the moments of normalized parts, in a checkpoint and in the results


def _nothing(responses: Responses) -> Tensor:
    return torch.zeros(len(responses.texts))


class WeightedReward(NamedTuple):
    """One of the rewards."""

    name: str
    """In the log."""
    weight: float = 1.0
    normalize: bool = False
    score: RewardFn = _nothing
    """Scores [B]."""
    together: bool = False
    """Whether it wants all responses of a rollout in one call, not a micro-batch of them; then NaN = does not
    apply, and adds nothing. NaN of a model is a fault."""
    function: RewardFunction | None = None
    """The one behind it that is told where the training is, and may log figures of its own."""
    figures: Callable[[Callable[[Tensor], Tensor], torch.device], dict[str, float]] | None = None
    """More for the log."""


def text_reward(judge: Judge | RewardFunction) -> RewardFn:
    """A judge of texts as a reward function; a function of a file gets the token ids of the responses too."""

    def score(responses: Responses) -> Tensor:
        more: dict[str, Any] = {}
        if isinstance(judge, RewardFunction):
            ids_BR, mask_BR = (t[:, responses.start :] for t in (responses.ids_BT, responses.mask_BT))
            more["completion_ids"] = [row[m].tolist() for row, m in zip(ids_BR, mask_BR, strict=True)]
        return torch.tensor(judge(responses.prompts, responses.texts, **more), dtype=torch.float64)

    return score


class RewardMixture:
    """The weighted sum of several rewards, a reward function that sees a whole rollout at once.

    Args:
        parts: the rewards.
        micro_batch_size: responses in memory at once, for those that are models.
        steps: of the training, which functions are told.
        all_sum: the sum of a tensor over all processes.
        moments: by name, of the scores so far, for those that are normalized, of a training that is over;
            neither they nor the step move. None = a training.
    """

    whole_rollout = True

    def __init__(
        self,
        parts: Sequence[WeightedReward],
        *,
        micro_batch_size: int,
        steps: int = 0,
        all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        moments: Mapping[str, Moments] | None = None,
    ) -> None:
        self.parts, self.micro_batch_size, self.all_sum = parts, micro_batch_size, all_sum
        self.running = "the reward function"
        """What is being computed, for the message about a call that does not end."""
        self._fixed = moments is not None
        self.moments = {p.name: (moments or {}).get(p.name, Moments()) for p in parts if p.normalize}
        self._calls = steps if self._fixed else 0
        self._sums: dict[str, list[float]] = {}
        for part in parts:
            if part.function is not None:
                part.function.trainer_state.max_steps = steps

    def __call__(self, responses: Responses) -> Tensor:
        """Scores, [B]; every process must call it where a part is normalized."""
        total_B = torch.zeros(len(responses.texts), dtype=torch.float64, device=responses.ids_BT.device)
        for part in self.parts:
            self.running = f"the reward {part.name}"
            if part.function is not None:
                part.function.trainer_state.global_step = self._calls
            scores_B = self._scores(part, responses).to(total_B)
            applies_B = ~scores_B.isnan() if part.together else torch.ones_like(scores_B, dtype=torch.bool)
            if scores_B.shape != total_B.shape or not bool(scores_B[applies_B].isfinite().all()):
                raise UserError(
                    f"ppo.rewards: {part.name} gave {tuple(scores_B.shape)} scores, not all finite, for "
                    f"{len(total_B)} responses; look at it, or remove it"
                )
            if responses.logged:
                self._note(part.name, scores_B[applies_B], len(scores_B))
            if part.normalize:
                scores_B = self._normalized(part.name, scores_B, applies_B, moves=responses.logged)
            total_B += part.weight * torch.where(applies_B, scores_B, 0.0)
        self._calls += responses.logged and not self._fixed
        return total_B.float()

    def figures(self, all_sum: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Each reward's mean over the responses it applied to since the last call, and the share of those
        where it is not all; what functions logged; then start anew. Every process must call it.

        all_sum: the sum of a tensor over all processes. device: where they sum.
        """
        found: dict[str, float] = {}
        for part in self.parts:
            sums = torch.tensor(self._sums.get(part.name, [0.0] * 3), dtype=torch.float64, device=device)
            total, number, rows = all_sum(sums).tolist()
            if number:
                found[f"reward/{part.name}"] = total / number
            if number < rows:
                found[f"reward/{part.name}/applies"] = number / rows
            if part.figures is not None:
                found |= part.figures(all_sum, device)
            if part.function is not None:
                for name, values in part.function.metrics.items():
                    found[f"reward/{part.name}/{name}"] = sum(values) / len(values)
                part.function.metrics.clear()
        self._sums = {}
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; numbers survive JSON exactly."""
        moments = {name: list(moments) for name, moments in self.moments.items()}
        return {"reward_calls": self._calls, MOMENTS: moments}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._calls = int(state["reward_calls"])
        self.moments = {name: Moments(*values) for name, values in state[MOMENTS].items()}

    def _scores(self, part: WeightedReward, responses: Responses) -> Tensor:
        if part.together:
            return part.score(responses)
        rows = torch.arange(len(responses.texts))
        score = functools.partial(of_rows, responses)
        return torch.cat([part.score(score(micro)) for micro in rows.split(self.micro_batch_size)])

    def _note(self, name: str, scores_B: Tensor, rows: int) -> None:
        sums = self._sums.setdefault(name, [0.0, 0.0, 0.0])
        for place, value in enumerate((float(scores_B.sum()), len(scores_B), rows)):
            sums[place] += value

    def _normalized(self, name: str, scores_B: Tensor, applies_B: Tensor, *, moves: bool) -> Tensor:
        """By the moments of all scores so far, on all processes; these included where they move them."""
        if moves and not self._fixed:
            known_N = scores_B[applies_B]
            count, total = self.all_sum(torch.stack([applies_B.double().sum(), known_N.sum()])).tolist()
            if count:
                squares = float(self.all_sum((known_N - total / count).square().sum()))
                self.moments[name] = self.moments[name].joined(Moments(count, total / count, squares))
        moments = self.moments[name]
        return (scores_B - moments.mean) / moments.deviation
