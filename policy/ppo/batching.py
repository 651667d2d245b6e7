"""Which rows go where: prompts of a step, rows of a process, rows of a minibatch, rows in memory at once.

All are pure functions of (seed, step), so that a resumed run, and a run on another number of processes, goes
through the same data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import UserError

_PROMPTS, _MINIBATCHES = 1, 2  # set the random numbers of the two purposes apart


def prompt_indices(seed: int, step: int, batch_size: int, available: int) -> list[int]:
    """Prompts of a step (counted from 0): each pass over the prompts has an order of its own."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        order = np.random.default_rng([seed % 2**63, _PROMPTS, position // available]).permutation(available)
        indices.append(int(order[position % available]))
    return indices


def own_rows(batch_size: int, rank: int, world: int) -> list[int]:
    """Rows of the global batch that a process owns."""
    return list(range(rank, batch_size, world))


def prompt_of_row(batch_size: int, samples: int, world: int) -> list[int]:
    """Which of the rollout's prompts each row of the global batch answers, [batch_size].

    The samples of a prompt stand batch_size / samples rows apart, and so on one process.

    Raises:
        UserError: they would be on several.
    """
    different = batch_size // samples
    if samples > 1 and different % world:
        raise UserError(
            f"ppo.batch_size / ppo.samples: {batch_size} / {samples} = {different} prompts a rollout do not "
            f"divide into {world} processes, which own whole prompts; choose a batch_size that is a multiple "
            f"of {samples * world}"
        )
    return [row % different for row in range(batch_size)]


def minibatch_rows(
    batch_size: int, minibatches: int, *, seed: int, step: int, epoch: int, rank: int, world: int
) -> list[list[int]]:
    """Each minibatch of an epoch as indices into this process's own rows.

    Row i of the batch belongs to stratum i mod (batch_size / minibatches); every minibatch takes one row of
    each stratum, in an order drawn for the stratum. A process owns whole strata, so the union over the
    processes is the same minibatch for any number of processes that divides its size.
    """
    size = batch_size // minibatches
    batches: list[list[int]] = [[] for _ in range(minibatches)]
    for stratum in range(rank, size, world):
        rng = np.random.default_rng([seed % 2**63, _MINIBATCHES, step, epoch, stratum])
        for batch, member in zip(batches, rng.permutation(minibatches), strict=True):
            batch.append((stratum + size * int(member) - rank) // world)
    return batches


def micro_batches(rows: Sequence[int], lengths: Tensor, size: int) -> list[Tensor]:
    """Rows of similar prompt length together, ``size`` at a time; the order does not change the result."""
    order = sorted(rows, key=lambda row: (int(lengths[row]), row))
    return [torch.tensor(order[i : i + size]) for i in range(0, len(order), size)]
