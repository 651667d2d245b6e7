"""Metrics of a rollout, over all processes: the reward, and the numbers that show when it is gamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from policy.ppo.kl import forward_kl, k3, sequence_kl
from policy.ppo.rollout import Rollout
from rlhf.training.runtime import Runtime


def rollout_metrics(
    runtime: Runtime, rollout: Rollout, rewards_BR: Tensor, returns_BR: Tensor, batch_size: int
) -> dict[str, float]:
    """Means over the whole batch; every process must call it.

    Args:
        runtime: the processes.
        rollout: this process's share.
        rewards_BR: token rewards, the KL penalty subtracted.
        returns_BR: what the value is trained towards.
        batch_size: responses of the rollout over all processes.

    Returns:
        Figures by name. KL is the tensor that is penalized (k1, summed over a response, nats); ``k3`` is the
        same by another estimator, ``forward_kl`` that of the other direction; a rising reward with a falling
        ``distinct_2`` or entropy is a collapse.
        The explained variance is 1 - Var(returns - values) / Var(returns) over the response tokens, NaN where
        all returns are equal.
    """
    actions = rollout.actions_BR
    log_ratio = (rollout.log_probs_BR, rollout.reference_log_probs_BR)
    per_row = {
        "objective/score": rollout.scores_B,
        "objective/kl": sequence_kl(*log_ratio, actions),
        "objective/kl_k3": (k3(*log_ratio) * actions).sum(-1),
        "objective/forward_kl": forward_kl(*log_ratio, actions),
        "objective/reward": rewards_BR.sum(-1),
        "response/length": actions.sum(-1).float(),
        "response/eos_rate": rollout.ended_B.float(),
    }
    per_token = {
        "policy/entropy": rollout.entropy_BR,
        "value/mean": rollout.values_BR,
        "value/error": (rollout.values_BR - returns_BR).square(),
    }
    moments = (rollout.values_BR - returns_BR, returns_BR, returns_BR.square())
    rows = torch.stack([tensor.sum() for tensor in per_row.values()])
    tokens = torch.stack([(tensor * actions).sum() for tensor in (*per_token.values(), *moments)])
    rows = runtime.all_sum(rows) / batch_size
    tokens = runtime.all_sum(tokens) / runtime.all_sum(actions.sum())
    texts = [text for part in runtime.gather(rollout.texts) for text in part]
    *means, error, mean, square = tokens.tolist()
    left, spread = means[-1] - error**2, square - mean**2
    return {
        **dict(zip(per_row, rows.tolist(), strict=True)),
        **dict(zip(per_token, means, strict=True)),
        "value/explained_variance": 1 - left / spread if spread > 0 else float("nan"),
        "response/distinct_2": distinct_n(texts, 2),
    }


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all n-grams of the texts (Li 2016, "distinct-n"), 0 to 1.

    NaN where no text has n words.
    """
    grams = [
        tuple(words[i : i + n]) for words in (t.split() for t in texts) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else float("nan")


def tokens_per_second(found: Mapping[str, float], responses: int) -> dict[str, float]:
    """Response tokens a second, each counted once: while sampling, while updating (all epochs), and in all.

    Args:
        found: ``response/length``, and ``time/generate``, ``time/rollout``, ``time/update`` in seconds.
        responses: of the step, over all processes.
    """
    tokens, update = found["response/length"] * responses, found["time/update"]
    seconds = {"generated_": found["time/generate"], "updated_": update, "": found["time/rollout"] + update}
    return {f"time/{part}tokens_per_second": tokens / max(s, 1e-9) for part, s in seconds.items()}
