"""Best of n: the baseline that PPO has to beat, from the reference alone and without training.

Draw n responses from the reference and keep the one that the proxy scores highest. N samples a prompt give an
unbiased estimate for every n <= N at once, so the curve of the true score over n costs one set of samples.

Shape suffixes: ``_P`` prompt, ``_N`` sample of a prompt, sorted ascending by proxy where noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from policy.evaluate.before_after import sample
from policy.ppo.checks import InvariantError
from policy.ppo.rollout import RewardFn
from rlhf.data.comparisons import Prompt
from rlhf.generation.sampling import uniforms
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.stats.intervals import mean_interval, win_rate
from rlhf.stats.length_control import length_controlled
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.shares import own, together

Floats = NDArray[np.float64]


def kl_bound(n: int) -> float:
    """KL(best of n || reference) = log n - (n - 1) / n, nats a response.

    Exact for continuous scores without ties, an upper bound in general (Beirami, 2401.01879).

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"best of {n} responses")
    return math.log(n) - (n - 1) / n


def win_rate_bound(n: int) -> float:
    """Highest share of wins of best-of-n over one response of the reference, n / (n + 1), a tie counting 1/2.

    Reached where the judge chooses too and has no ties: of n + 1 equal draws the best is among the first n
    with that probability. Any other judge gives less.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"best of {n} responses")
    return n / (n + 1)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to ``limit``."""
    return [2**k for k in range(limit.bit_length())]


def rank_weights(samples: int, n: int) -> Floats:
    """Probability that sample i of N, ascending by proxy, is the best of n drawn without replacement, [N].

    C(i - 1, n - 1) / C(N, n) for i = 1..N, 0 for i < n (Nakano 2021; Gao 2022). By whole numbers, so that
    nothing overflows.

    Args:
        samples: N.
        n: size of the draw.

    Raises:
        ValueError: n is not in 1..N.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"best of {n} out of {samples} samples")
    draws = math.comb(samples, n)
    return np.array([math.comb(i - 1, n - 1) / draws for i in range(1, samples + 1)])


def ranked(proxy_N: ArrayLike, values_N: ArrayLike) -> Floats:
    """Values ascending by proxy, [N]; samples with equal proxies all get the mean of their values.

    With ties broken at random, each tied sample takes each of their ranks equally often. The estimate is
    linear in the values, so its average over all orders of the tied is the one with their mean at each of
    those ranks.
    """
    proxy, values = np.asarray(proxy_N, dtype=np.float64), np.asarray(values_N, dtype=np.float64)
    _, group_N, sizes = np.unique(proxy, return_inverse=True, return_counts=True)
    means = np.bincount(group_N, weights=values) / sizes
    return np.repeat(means, sizes)


def best_of_n(proxy_PN: ArrayLike, values_PN: ArrayLike, n: int) -> Floats:
    """Expected value of the response with the highest proxy among n of the N samples, for each prompt, [P].

    E_n = sum_{i=n}^{N} C(i - 1, n - 1) / C(N, n) values_(i), i in ascending order of the proxy: the mean over
    all subsets of n samples, and so unbiased for n fresh samples (Nakano 2021; Gao 2022). Ties in the proxy
    are averaged over their orders, see :func:`ranked`.

    Args:
        proxy_PN: scores that choose, finite, higher is better.
        values_PN: what the chosen response is worth, in any unit: the gold score, or the proxy itself.
        n: responses to choose from, 1..N.

    Raises:
        ValueError: the shapes differ, or n is not in 1..N.
    """
    proxy, values = np.asarray(proxy_PN, dtype=np.float64), np.asarray(values_PN, dtype=np.float64)
    if proxy.shape != values.shape or proxy.ndim != 2:
        raise ValueError(f"proxies of shape {proxy.shape} and values of shape {values.shape}")
    weights_N = rank_weights(proxy.shape[1], n)
    return np.array([ranked(p, v) @ weights_N for p, v in zip(proxy, values, strict=True)])


def chosen_weights(proxy_PN: ArrayLike, n: int) -> Floats:
    """Probability that each sample is the best of n, [P, N]; samples with equal proxies share theirs.

    The weights of :func:`rank_weights` in the samples' own order: a prompt's sum to 1.
    """
    proxy = np.asarray(proxy_PN, dtype=np.float64)
    weights_N = rank_weights(proxy.shape[1], n)
    rows = []
    for proxy_N in proxy:
        _, group_N, sizes = np.unique(proxy_N, return_inverse=True, return_counts=True)
        ends = np.cumsum(sizes)
        sums = np.add.reduceat(weights_N, ends - sizes)
        rows.append((sums / sizes)[group_N])
    return np.array(rows)


def tied_share(proxy_PN: ArrayLike) -> float:
    """Share of samples whose proxy another sample of the same prompt has too, 0 to 1."""
    rows = np.asarray(proxy_PN, dtype=np.float64)
    sizes = [np.unique(row, return_counts=True)[1] for row in rows]
    return float(sum(s[s > 1].sum() for s in sizes) / rows.size)


@torch.no_grad()
def draw(
    backbone: Backbone,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    reward_fns: Mapping[str, RewardFn],
    *,
    samples: int,
    seed: int,
    temperature: float,
    batch_size: int,
    progress: Callable[[int], Any] = int,
) -> tuple[dict[str, Floats], Floats]:
    """Sample each prompt several times from the reference and let every reward function score.

    Returns the scores by the name of the reward function and the lengths (tokens, EOS included), [P, N] each.

    The random numbers depend on the prompt's position and the sample's number alone: more samples or prompts
    leave the first ones as they were, and no other figure of the evaluation shares them.

    Args:
        backbone: the model; its reference answers.
        dialogue: the token contract.
        prompts: each once.
        reward_fns: reward functions by name.
        samples: N, responses a prompt.
        seed: of the random numbers.
        temperature: of sampling.
        batch_size: responses at once; those of a prompt stand next to each other.
        progress: called with the number of responses done.

    Raises:
        InvariantError: a score is not finite, so nothing can be ranked.
    """
    parts, done = [], 0
    rows = [(prompt, number) for prompt in range(len(prompts)) for number in range(samples)]
    for first in own(range(0, len(rows), batch_size)):
        batch = rows[first : first + batch_size]
        uniform_BR = torch.cat(
            [uniforms(seed, "best_of", p, [s], dialogue.max_response_tokens) for p, s in batch]
        )
        drawn = sample(
            backbone, REFERENCE, dialogue, [prompts[p] for p, _ in batch], uniform_BR, temperature=temperature
        )
        parts.append(
            (
                {name: reward_fn(drawn.responses).tolist() for name, reward_fn in reward_fns.items()},
                drawn.actions_BR.sum(-1).float().tolist(),
            )
        )
        progress(len(batch))
        done += len(batch)
    every = together(parts)
    progress(len(rows) - done)  # what the other processes have done
    scores = {name: [score for part, _ in every for score in part[name]] for name in reward_fns}
    for name, values in scores.items():
        bad = sum(not math.isfinite(value) for value in values)
        if bad:
            raise InvariantError(
                f"evaluate.best_of: {bad} of {len(values)} scores by {name} are not finite, so the best "
                "response is not known; look at that model, or set evaluate.best_of to 0"
            )
    shape = len(prompts), samples
    by_judge = {name: np.array(values).reshape(shape) for name, values in scores.items()}
    return by_judge, np.array([length for _, part in every for length in part]).reshape(shape)


def best_of_figures(
    scores: Mapping[str, Floats],
    before: Mapping[str, Floats],
    after: Mapping[str, Floats],
    kl_P: Floats,
    *,
    proxy: str,
    judge: str,
    lengths: tuple[Floats, Floats] | None = None,
) -> dict[str, Any]:
    """The curve of best-of-n beside the policy, as it goes into ``summary.json``; prompts are the units.

    Args:
        scores: of the samples of the reference by judge, [P, N] each.
        before: mean score of the reference's own responses by judge, [P] each, the same prompts.
        after: the same of the policy.
        kl_P: KL of the policy from the reference, nats a response.
        proxy: the judge that chooses.
        judge: the judge that decides; may be the proxy.
        lengths: tokens of the samples, [P, N], and of the reference's own responses, [P]; with them a row
            says what the chosen response gains over the reference's own by ``judge``, length-controlled.

    Returns:
        samples and prompts (N and P), tied (:func:`tied_share` of the proxy), the policy's figures, a row for
        n = 1, 2, 4, ... (``over_policy``: best-of-n less the policy by ``judge``, paired by prompt), and
        ``reaches``: the smallest of these n at which the estimate by ``judge`` is at least the policy's, or
        None.
    """
    prompts, samples = scores[proxy].shape
    rows: list[dict[str, Any]] = []
    for n in powers_of_two(samples):
        best = {name: best_of_n(scores[proxy], values, n) for name, values in scores.items()}
        row: dict[str, Any] = {
            "n": n,
            "kl_bound": kl_bound(n),
            "win_rate_bound": win_rate_bound(n),
            "scores": {name: mean_interval(values).as_dict() for name, values in best.items()},
            "over_policy": mean_interval(best[judge] - after[judge]).as_dict(),
        }
        if lengths:
            weights_PN = chosen_weights(scores[proxy], n)
            row["length"] = mean_interval(np.sum(weights_PN * lengths[0], axis=1)).as_dict()
            row["length_controlled"] = length_controlled(
                np.repeat(before[judge], samples),
                scores[judge],
                np.repeat(lengths[1], samples),
                lengths[0],
                np.repeat(np.arange(prompts), samples),
                weights_PN,
            )
        rows.append(row)
    return {
        "samples": samples,
        "prompts": prompts,
        "proxy": proxy,
        "judge": judge,
        "tied": tied_share(scores[proxy]),
        "policy": {
            "kl": mean_interval(kl_P).as_dict(),
            "win_rate": win_rate(before[judge], after[judge]).as_dict(),
            "scores": {name: mean_interval(after[name]).as_dict() for name in scores},
        },
        "rows": rows,
        "reaches": next((row["n"] for row in rows if row["over_policy"]["mean"] >= 0), None),
    }
