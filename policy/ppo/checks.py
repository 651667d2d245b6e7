"""What must hold on every run, checked while it runs; each failure names its usual cause.

These are the bugs that users of other frameworks met: a wrong reference, stale weights in the sampler, a
shifted mask, a lost head. All of them train on silently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.masks import masked_mean

_EXACT = 1e-5  # nats; policy and reference run the same operations at step 0
_RATIO = 1e-2  # of the first minibatch: the same operations in other batches


class InvariantError(UserError):
    """A run that would train on something other than what it says."""


def check_reference(log_probs_BR: Tensor, reference_BR: Tensor, actions_BR: Tensor) -> None:
    """Before the first update the policy is the reference, so every log-prob must agree.

    Args:
        log_probs_BR: of the policy.
        reference_BR: of the reference.
        actions_BR: True = an action.

    Raises:
        InvariantError: they differ.
    """
    gap = float((log_probs_BR - reference_BR)[actions_BR].abs().max())
    if not gap <= _EXACT:
        raise InvariantError(
            f"ppo: at step 0 policy and reference differ by {gap:.3g} nats on a token, and must not: "
            "the reference is not the model that the policy starts from"
        )


def check_sampler(sampled_BR: Tensor, log_probs_BR: Tensor, actions_BR: Tensor, *, bound: float) -> float:
    """The sampler and the training forward pass must be the same model.

    Args:
        sampled_BR: log-probs while sampling.
        log_probs_BR: log-probs of the same tokens in the training forward pass.
        actions_BR: True = an action.
        bound: largest accepted mean gap, nats a token.

    Returns:
        The mean gap.

    Raises:
        InvariantError: it is above the bound.
    """
    gap = float(masked_mean((sampled_BR - log_probs_BR).abs(), actions_BR))
    if not gap <= bound:
        raise InvariantError(
            f"ppo: log-probs of sampling and of training differ by {gap:.3g} nats a token on average "
            f"(ppo.max_log_prob_gap is {bound:g}): the sampler runs other weights, another temperature or "
            "another mask than the update"
        )
    return gap


def check_first_ratio(max_error: Tensor) -> None:
    """Before the first step of an update the ratio of new to old probabilities is 1.

    Raises:
        InvariantError: it is not.
    """
    if not float(max_error) <= _RATIO:
        raise InvariantError(
            f"ppo: the first ratio of a step is off 1 by {float(max_error):.3g}: the old log-probs were not "
            "computed by the model and the batch that is trained"
        )


def check_closed(ids_BT: Tensor, mask_BT: Tensor, eos_id: int) -> None:
    """The last real token of every sequence is EOS, because the reward is read there.

    Raises:
        InvariantError: some row ends otherwise.
    """
    last_B = mask_BT.shape[1] - 1 - mask_BT.flip(-1).float().argmax(-1)
    rows = torch.arange(len(ids_BT), device=ids_BT.device)
    if not bool((ids_BT[rows, last_B] == eos_id).all()):
        raise InvariantError("ppo: a sequence does not end in EOS, so its reward would be read elsewhere")


def check_scores(scores_B: Tensor, expected: int) -> None:
    """A reward function must return one finite number a response.

    Raises:
        InvariantError: the wrong number of scores, or one that is not finite.
    """
    if scores_B.shape != (expected,):
        raise InvariantError(
            f"ppo: the reward function returned shape {tuple(scores_B.shape)} for {expected} responses"
        )
    if not bool(scores_B.isfinite().all()):
        bad = int((~scores_B.isfinite()).sum())
        raise InvariantError(f"ppo: {bad} of {expected} scores are not finite; look at the reward model")
