"""The score of the test model beside the reward, which it never enters.

Shape suffix: ``_N`` response of this process, of all calls since the last figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policy.ppo.rollout import Responses, RewardFn, of_rows
from rlhf.data.comparisons import Prompt
from rlhf.errors import UserError
from rlhf.stats.overoptimization import SIDES

AllSum = Callable[[Tensor], Tensor]


class Units(NamedTuple):
    """Mean and population standard deviation of both scores on the first rollout, the reference's."""

    proxy: float
    proxy_deviation: float
    test: float
    test_deviation: float


class AuditedScore:
    """A reward function whose responses a test model scores too; what it returns is the function's own.

    Args:
        reward_fn: what PPO is rewarded by.
        test_fn: scores by the test model.
        micro_batch_size: responses that the test model reads at once.
    """

    def __init__(self, reward_fn: RewardFn, test_fn: RewardFn, micro_batch_size: int) -> None:
        self.reward_fn, self.test_fn, self.micro_batch_size = reward_fn, test_fn, micro_batch_size
        self.whole_rollout = bool(getattr(reward_fn, "whole_rollout", False))
        self.units: Units | None = None
        self._seen: list[tuple[list[Prompt], Tensor, Tensor]] = []

    @property
    def running(self) -> str:
        """What is being computed, for the message about a call that does not end."""
        return str(getattr(self.reward_fn, "running", "the reward function or the test model"))

    def __call__(self, responses: Responses) -> Tensor:
        """Scores of the reward function, [B], untouched.

        Raises:
            UserError: a score of the test model is not finite.
        """
        scores_B = self.reward_fn(responses)
        if not responses.logged:
            return scores_B
        rows = torch.arange(len(responses.texts)).split(self.micro_batch_size)
        with torch.no_grad():
            tests_B = torch.cat([self.test_fn(of_rows(responses, micro)) for micro in rows])
        if not bool(tests_B.isfinite().all()):
            raise UserError("ppo: scores of the test model are not finite; look at it, or leave it out")
        self._seen.append((responses.prompts, scores_B.detach().cpu().double(), tests_B.cpu().double()))
        return scores_B

    def figures(self, all_sum: AllSum, device: torch.device) -> dict[str, float]:
        """What the reward function logs, and of the responses since the last call, over all processes:
        ``audit/score``, the test model's mean; ``audit/proxy``, ``audit/test`` and ``audit/gap``, both scores
        less those of the first rollout, in standard deviations there, and their difference; each with its
        standard error, the samples of a prompt taken together. Every process must call it.

        all_sum: the sum of a tensor over all processes. device: where they sum.
        """
        more = getattr(self.reward_fn, "figures", None)
        found: dict[str, float] = more(all_sum, device) if more else {}
        prompts = [prompt for part in self._seen for prompt in part[0]]
        proxy_N = torch.cat([proxy for _, proxy, _ in self._seen])
        test_N = torch.cat([test for *_, test in self._seen])
        self._seen = []

        def sums(*values: Tensor) -> list[float]:
            return all_sum(torch.stack([v.sum() for v in values]).to(device)).tolist()

        if self.units is None:
            number, *totals = sums(torch.ones_like(test_N), proxy_N, test_N)
            means = [total / number for total in totals]
            squares = sums((proxy_N - means[0]).square(), (test_N - means[1]).square())
            spread = [math.sqrt(square / number) or 1.0 for square in squares]
            self.units = Units(means[0], spread[0], means[1], spread[1])
        units = self.units
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        cluster_N = torch.tensor([places[prompt] for prompt in prompts])
        rises = [
            (proxy_N - units.proxy) / units.proxy_deviation,
            (test_N - units.test) / units.test_deviation,
        ]
        rises.append(rises[0] - rises[1])
        number, clusters, *totals = sums(torch.ones_like(test_N), torch.ones(len(places)).double(), *rises)
        for name, value_N, total in zip(SIDES, rises, totals, strict=True):
            mean = total / number
            left_G = torch.zeros(len(places)).double().index_add(0, cluster_N, value_N - mean)
            square = sums(left_G.square())[0]
            error = math.sqrt(clusters / (clusters - 1) * square) / number if clusters > 1 else math.nan
            found |= {f"audit/{name}": mean, f"audit/{name}_error": error}
        found["audit/score"] = found["audit/test"] * units.test_deviation + units.test
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; numbers survive JSON exactly."""
        own = self.reward_fn.state() if hasattr(self.reward_fn, "state") else {}
        return {**own, "audit_units": self.units}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        if hasattr(self.reward_fn, "restore"):
            self.reward_fn.restore(state)
        kept = state.get("audit_units")
        self.units = None if kept is None else Units(*kept)
