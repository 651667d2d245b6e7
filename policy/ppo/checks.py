"""What must hold on every run, checked while it runs; each failure names its usual cause.

These are the bugs that users of other frameworks met: a wrong reference, stale weights in the sampler, a
shifted mask, a lost head. All of them train on silently.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from policy.ppo.rollout import Responses, RewardFn
from rlhf.errors import USER_ERROR_STATUS, UserError, lost_process, out_of_memory
from rlhf.models.masks import last_true_index
from rlhf.runs.processes import print_once

_EXACT = 1e-5  # nats; policy and reference run the same operations at step 0
_RATIO = 1e-2  # of the first minibatch: the same operations in other batches
_LEAST_BOUND = 0.05  # nats a token; what a correct sampler of a base in float32 is far below
_TIMES_THE_FLOOR = 4.0  # the policy moves on, and its rounding with it
# mean gaps in nats a token beyond what rounding makes of a sampler that is right: over SmolLM2-135M it made
# 0.00001 in float32 and in nf4 over it, 0.005 in float16, 0.04 in bfloat16, 0.15 in int8
_BEYOND_ROUNDING = {"float32": _LEAST_BOUND, "float16": _LEAST_BOUND, "bfloat16": 0.25, "int8": 0.75}


class InvariantError(UserError):
    """A run that would train on something other than its recipe."""


def _must(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(f"ppo: {message}")


def check_reference(log_probs_BR: Tensor, reference_BR: Tensor, actions_BR: Tensor) -> None:
    """Before the first update the policy is the reference, so the log-probs of both must agree.

    actions_BR: True = an action.

    Raises:
        InvariantError: they differ.
    """
    gap = float((log_probs_BR - reference_BR)[actions_BR].abs().max())
    _must(
        gap <= _EXACT,
        f"at step 0 policy and reference differ by {gap:.3g} nats on a token, and must not: "
        "the reference is not the model that the policy starts from",
    )


def check_first_ratio(max_error: Tensor) -> None:
    """Before the first step of an update the ratio of new to old probabilities is 1, else InvariantError."""
    _must(
        float(max_error) <= _RATIO,
        f"the first ratio of a step is off 1 by {float(max_error):.3g}: the old log-probs were not "
        "computed by the model and the batch that is trained",
    )


def check_closed(ids_BT: Tensor, mask_BT: Tensor, eos_id: int) -> None:
    """The last real token of every sequence is EOS, because the reward is read there, else InvariantError.

    mask_BT: True = a real token.
    """
    last_B1 = last_true_index(mask_BT)[:, None]
    closed = bool((ids_BT.gather(-1, last_B1) == eos_id).all())
    _must(closed, "a sequence does not end in EOS, so its reward would be read elsewhere")


def check_scores(scores_B: Tensor, expected: int) -> None:
    """A reward function must return one finite number a response, else InvariantError."""
    shape, bad = tuple(scores_B.shape), int((~scores_B.isfinite()).sum())
    _must(shape == (expected,), f"the reward function returned shape {shape} for {expected} responses")
    _must(not bad, f"{bad} of {expected} scores are not finite; look at the reward model")


class GuardedScore:
    """Calls a reward function and checks what it does.

    Args:
        reward_fn: the function; one with ``running`` says what it is at, for the message about the time.
        minutes: how long one call may take.
        weights: what is trained, which it must leave as it is.
    """

    def __init__(self, reward_fn: RewardFn, minutes: float, weights: Iterable[Tensor] = ()) -> None:
        self.reward_fn, self.minutes, self.weights = reward_fn, minutes, list(weights)
        self.whole_rollout = bool(getattr(reward_fn, "whole_rollout", False))

    def __call__(self, responses: Responses) -> Tensor:
        """Scores, [B].

        Raises:
            UserError: the function raised, returned no finite number a response, or wrote to the model.
        """
        before = _traces(self.weights)
        with time_limit(60 * self.minutes, self._late):
            try:
                scores_B = self.reward_fn(responses)
            except UserError:
                raise
            except Exception as error:
                if lost_process(error) or out_of_memory(error):  # a model of our own scores on this device,
                    raise  # and a sharded one on all processes together
                reason = (str(error).splitlines() or [""])[0]
                raise UserError(
                    f"ppo: the reward function failed on {len(responses.texts)} responses "
                    f"({type(error).__name__}: {reason}); correct it and run again; the run resumes"
                ) from error
        if not isinstance(scores_B, Tensor):
            raise UserError(
                f"ppo: the reward function returned a {type(scores_B).__name__}, not a tensor with one "
                "finite number a response; correct it and run again, the run goes on where it was"
            )
        if _traces(self.weights) != before:
            raise UserError(
                "ppo: the reward function wrote to the weights that are trained; let it work on a copy, and "
                "run again: the run goes on from its last checkpoint"
            )
        scores_B = scores_B.to(responses.ids_BT.device)
        check_scores(scores_B, len(responses.texts))
        return scores_B

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the function."""
        return dict(self.reward_fn.state()) if hasattr(self.reward_fn, "state") else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if hasattr(self.reward_fn, "restore"):
            self.reward_fn.restore(state)

    def _late(self) -> str:
        what = getattr(self.reward_fn, "running", "the reward function")
        return (
            f"ppo: {what} has not answered for {self.minutes:g} minutes "
            "(ppo.score_timeout_minutes); the last checkpoint is whole"
        )


def _traces(weights: Sequence[Tensor]) -> tuple[int, float]:
    """How often the tensors were written to, and their norm, since a write to ``.data`` is not counted."""
    with torch.no_grad():
        return sum(weight._version for weight in weights), float(get_total_norm(weights)) if weights else 0.0


class SamplerGap:
    """The sampler and the training forward pass must be the same model: how far their log-probs may differ.

    What rounding makes of them is measured on the first rollout, before any update: the floor of this base in
    this precision, over all processes. The bound is four times its mean, unless the recipe gives a number.

    Args:
        bound: ``ppo.max_log_prob_gap``: largest accepted mean gap, nats a token; None = from the floor.
        precision: of the base (:func:`rlhf.models.base.precision_of`).
        gather: the values of all processes.
    """

    def __init__(
        self, bound: float | None, precision: str, gather: Callable[[Tensor], Sequence[Tensor]]
    ) -> None:
        self.fixed, self.precision, self.gather = bound, precision, gather
        self.floor: tuple[float, float] | None = None
        """Mean and 99th percentile before the first update."""

    def __call__(self, sampled_BR: Tensor, log_probs_BR: Tensor, actions_BR: Tensor) -> dict[str, float]:
        """Check a rollout; every process must call it.

        Args:
            sampled_BR: log-probs while sampling.
            log_probs_BR: log-probs of the same tokens in the training forward pass.
            actions_BR: True = an action.

        Returns:
            Mean and 99th percentile of the gaps over all processes, by their names in the log.

        Raises:
            InvariantError: the mean is above the bound.
        """
        gaps_N = torch.cat(list(self.gather((sampled_BR - log_probs_BR)[actions_BR].abs().cpu())))
        mean, high = float(gaps_N.mean()), float(gaps_N.kthvalue(math.ceil(0.99 * len(gaps_N))).values)
        first = self.floor is None
        bound = self.fixed or (_BEYOND_ROUNDING[self.precision] if first else self.bound)
        why = "ppo.max_log_prob_gap"
        if not self.fixed:
            why = f"beyond the rounding of {self.precision}; ppo.max_log_prob_gap sets another bound"
        _must(
            mean <= bound,
            f"log-probs of sampling and of training differ by {mean:.3g} nats a token on average, above "
            f"{bound:.3g} ({why}): the sampler runs other weights, another temperature or another mask than "
            "the update",
        )
        if first:
            self.floor = mean, high
            print_once(
                f"ppo: before the first update sampling and training differ by {mean:.2g} nats a token "
                f"(99th percentile {high:.2g}), the rounding of {self.precision}; on average they may by "
                f"{self.bound:.2g}"
            )
        return {"policy/sampler_gap": mean, "policy/sampler_gap_p99": high}

    @property
    def bound(self) -> float:
        """Largest accepted mean gap behind the first rollout, nats a token."""
        assert self.floor is not None, "the first rollout has been checked"
        return self.fixed or max(_LEAST_BOUND, _TIMES_THE_FLOOR * self.floor[0])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; numbers survive JSON exactly."""
        return {"sampler_floor": self.floor}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; a checkpoint of an earlier version has none, and it is measured next."""
        kept = state.get("sampler_floor")
        self.floor = None if kept is None else (float(kept[0]), float(kept[1]))


@contextlib.contextmanager
def time_limit(seconds: float, message: str | Callable[[], str]) -> Iterator[None]:
    """End the whole process with one line and the status of a user's error unless the block ends in time.

    A call that hangs in foreign code cannot be interrupted, so the process ends at once; what it keeps on
    disk is written atomically and stays whole.
    """
    watch = threading.Timer(seconds, _end, (message,))
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _end(message: str | Callable[[], str]) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"error: {message if isinstance(message, str) else message()}\n")
    sys.stderr.flush()
    os._exit(USER_ERROR_STATUS)
