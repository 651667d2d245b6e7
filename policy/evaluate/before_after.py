"""Before against after on held-out prompts: the same prompts, the same random numbers, paired figures.

Before is the reference (adapter off), after is the trained policy. A figure of one response is averaged over
the samples of its prompt first, so that the prompt is the unit of every interval.

Shape suffixes: ``_B`` response row, ``_T`` token, ``_R`` response token.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policy.ppo.kl import k3, sequence_kl
from policy.ppo.metrics import distinct_n
from policy.ppo.rollout import Responses, RewardFn, close, window
from rlhf.collect.judges import Judge
from rlhf.data.comparisons import Prompt
from rlhf.generation import sampling
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.masks import ended, masked_mean
from rlhf.stats.intervals import mean_interval, paired_difference, student95, win_rate
from rlhf.stats.length_control import length_controlled
from rlhf.stats.overoptimization import gap_of
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.shares import own, together


class SampledBatch(NamedTuple):
    """One batch of responses, as reward functions read them and as the sampler gave them."""

    responses: Responses
    sampled: sampling.Sampled
    actions_BR: Tensor
    """True = a sampled token, EOS included."""
    start: int
    """First response column of ``responses.ids_BT``."""


class EvaluatedResponses(NamedTuple):
    """One model's responses to the held-out prompts; every list has one entry a response."""

    texts: list[str]
    scores: dict[str, list[float]]
    """By the name of the reward function."""
    length: list[float]
    """Tokens, EOS included."""
    ended: list[float]
    """1 = the model ended the response itself."""
    entropy: list[float]
    """Mean over the tokens, nats."""
    kl: list[float]
    """From the model that it is held against, k1 summed over the tokens, nats."""
    kl_k3: list[float]
    """The same by the k3 estimator."""


def reward_fn_of(judge: Judge) -> RewardFn:
    """A judge as a reward function; its scores are kept in double precision."""
    return lambda responses: torch.tensor(judge(responses.prompts, responses.texts), dtype=torch.float64)


@torch.no_grad()
def sample(
    backbone: Backbone,
    role: str,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    uniform_BR: Tensor,
    *,
    temperature: float,
) -> SampledBatch:
    """Sample one response to every prompt of a batch.

    Args:
        backbone: the model.
        role: ``policy`` or ``reference``.
        dialogue: the token contract.
        prompts: one row each.
        uniform_BR: random numbers in [0, 1), one a token.
        temperature: of sampling.
    """
    sampled = sampling.sample(
        backbone,
        role,
        [dialogue.encode_prompt(p) for p in prompts],
        uniform_BR,
        eos_id=dialogue.end_ids,
        pad_id=dialogue.pad_id,
        temperature=temperature,
    )
    start = sampled.prompt_ids_BP.shape[1]
    ids_BT, mask_BT, actions_BR = close(sampled, start, eos_id=dialogue.end_ids, pad_id=dialogue.pad_id)
    hidden_BTD = backbone.trunk(ids_BT, mask_BT)
    part = window(ids_BT, mask_BT, hidden_BTD, start, torch.arange(len(prompts)))
    texts = [dialogue.decode(ids) for ids in sampled.response_ids_BR.tolist()]
    return SampledBatch(Responses(list(prompts), texts, *part[:4]), sampled, actions_BR, part.start)


@torch.no_grad()
def sample_and_score(
    backbone: Backbone,
    role: str,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    reward_fns: Mapping[str, RewardFn],
    *,
    seed: int,
    temperature: float,
    batch_size: int,
    against: str = REFERENCE,
    progress: Callable[[int], Any] = int,
) -> EvaluatedResponses:
    """Sample one response to every prompt and measure it.

    Args:
        backbone: the model.
        role: ``policy`` or ``reference``.
        dialogue: the token contract.
        prompts: one row each; repeat a prompt for several samples.
        reward_fns: reward functions by name.
        seed: of the random numbers, which depend on the row and not on the role.
        temperature: of sampling; log-probs and entropy are taken at it too.
        batch_size: rows at once.
        against: role that the KL is taken from; of the reference's responses and ``policy`` it is the forward
            KL, KL(reference || policy).
        progress: called with the number of rows done.
    """
    parts, done = [], 0
    for first in own(range(0, len(prompts), batch_size)):
        batch = list(prompts[first : first + batch_size])
        rows = range(first, first + len(batch))
        uniform_BR = sampling.uniforms(seed, "evaluate", 0, rows, dialogue.max_response_tokens)
        responses, sampled, actions_BR, start = sample(
            backbone, role, dialogue, batch, uniform_BR, temperature=temperature
        )
        tokens = (responses.ids_BT, responses.mask_BT, responses.hidden_BTD)
        (log_probs_BR, entropy_BR), (others_BR, _) = (
            backbone(r, *tokens, start=start, temperature=temperature, targets_mask_BR=actions_BR)
            for r in (role, against)
        )
        parts.append(
            EvaluatedResponses(
                responses.texts,
                {name: reward_fn(responses).tolist() for name, reward_fn in reward_fns.items()},
                length=actions_BR.sum(-1).float().tolist(),
                ended=ended(sampled.response_ids_BR, dialogue.end_ids).float().tolist(),
                entropy=masked_mean(entropy_BR, actions_BR, dim=-1).tolist(),
                kl=sequence_kl(log_probs_BR, others_BR, actions_BR).tolist(),
                kl_k3=(k3(log_probs_BR, others_BR) * actions_BR).sum(-1).tolist(),
            )
        )
        progress(len(batch))
        done += len(batch)
    texts, scores, *figures = zip(*together(parts), strict=True)
    progress(len(prompts) - done)  # what the other processes have done
    return EvaluatedResponses(
        _joined(texts), {name: _joined(part[name] for part in scores) for name in reward_fns},
        *map(_joined, figures),
    )  # fmt: skip


def _joined(parts: Iterable[Iterable[Any]]) -> list[Any]:
    return [*itertools.chain.from_iterable(parts)]


def per_prompt(values: Sequence[float], samples: int) -> NDArray[np.float64]:
    """Mean of the samples of each prompt; the samples of a prompt stand together."""
    return np.asarray(values, dtype=np.float64).reshape(-1, samples).mean(axis=1)


def paired_jackknife(
    before: Sequence[str], after: Sequence[str], statistic: Callable[[Sequence[str]], float]
) -> dict[str, Any]:
    """Change of a figure of a whole set of texts, with a 95% interval from leaving out one prompt at a time.

    diff +- t se, se^2 = (n - 1) / n * sum (d_(i) - mean d_(.))^2 (Tukey 1958), the same row left out on both
    sides. Not a bootstrap: a resampled set repeats texts, which lowers every distinct-n. What is not known
    (NaN) becomes None.
    """
    x, y = statistic(before), statistic(after)
    changes = np.array(
        [
            statistic([*after[:i], *after[i + 1 :]]) - statistic([*before[:i], *before[i + 1 :]])
            for i in range(len(before))
        ]
    )
    known = changes[~np.isnan(changes)]  # without its only long text a set has no n-gram
    ci95 = None
    if known.size > 1 and not math.isnan(y - x):
        half = student95(known.size - 1) * math.sqrt((known.size - 1) * float(known.var()))
        ci95 = [y - x - half, y - x + half]
    figures = {"before": x, "after": y, "diff": y - x}
    return {
        **{name: None if math.isnan(value) else value for name, value in figures.items()},
        "ci95": ci95,
        "n": len(before),
    }


def compare(before: EvaluatedResponses, after: EvaluatedResponses, *, samples: int) -> dict[str, Any]:
    """Every figure of the two with its interval, as it goes into ``summary.json``."""
    pairs = {name: (before.scores[name], after.scores[name]) for name in before.scores}
    pairs["response_length"] = (before.length, after.length)
    pairs["eos_rate"] = (before.ended, after.ended)
    pairs["entropy"] = (before.entropy, after.entropy)
    figures: dict[str, Any] = {}
    prompt_N = np.arange(len(before.length)) // samples
    for name, values in pairs.items():
        x, y = (per_prompt(side, samples) for side in values)
        figures[name] = paired_difference(x, y)
        if name in before.scores:
            figures[f"{name}_win_rate"] = win_rate(x, y).as_dict()
            lengths = before.length, after.length
            figures[f"{name}_length_controlled"] = length_controlled(*values, *lengths, prompt_N)
    if "test" in before.scores:
        two = (
            [per_prompt(side.scores[name], samples) for side in (before, after)]
            for name in ("reward", "test")
        )
        figures["gap"] = gap_of(*two).as_dict()
    for n in (1, 2):
        figures[f"distinct_{n}"] = paired_jackknife(
            before.texts, after.texts, functools.partial(distinct_n, n=n)
        )
    figures["kl"] = mean_interval(per_prompt(after.kl, samples)).as_dict()
    figures["kl_k3"] = mean_interval(per_prompt(after.kl_k3, samples)).as_dict()
    figures["forward_kl"] = mean_interval(per_prompt(before.kl, samples)).as_dict()
    return figures


def response_rows(
    prompts: Sequence[Prompt], before: EvaluatedResponses, after: EvaluatedResponses
) -> list[dict[str, Any]]:
    """Every prompt with both responses and their scores {name: [before, after]}."""
    return [
        {
            "prompt": prompt[-1].content,
            "before": before.texts[row],
            "after": after.texts[row],
            "scores": {name: [before.scores[name][row], after.scores[name][row]] for name in before.scores},
        }
        for row, prompt in enumerate(prompts)
    ]


def spread(rows: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """A few rows, evenly spread over the set."""
    number = min(number, len(rows))
    chosen = np.linspace(0, len(rows) - 1, number).astype(int).tolist() if number else []
    return [rows[row] for row in chosen]
