"""Which rows go where: prompts of a step, rows of a process, of a minibatch, of a micro-batch; texts of
PPO-ptx.

All are pure functions of (seed, step), so that a resumed run, and a run on another number of processes, goes
through the same data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.data.readers.files import origins
from rlhf.errors import UserError
from rlhf.models.masks import right_pad
from rlhf.recipe.schema import Ppo
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.runtime import Runtime

_PROMPTS, _MINIBATCHES, _TEXTS = 1, 2, 3  # set the random numbers of the purposes apart


def _drawn(seed: int, purpose: int, positions: Sequence[int], available: int) -> list[int]:
    """Items at some positions of endless passes over all of them, each pass in an order of its own."""
    orders = {
        number: np.random.default_rng([seed % 2**63, purpose, number]).permutation(available)
        for number in {position // available for position in positions}
    }
    return [int(orders[position // available][position % available]) for position in positions]


def prompt_indices(seed: int, step: int, batch_size: int, available: int) -> list[int]:
    """Prompts of a step (counted from 0)."""
    return _drawn(seed, _PROMPTS, range(step * batch_size, (step + 1) * batch_size), available)


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
            f"ppo.batch_size / ppo.samples_per_prompt: {batch_size} / {samples} = {different} prompts a "
            f"rollout do not divide into {world} processes, which own whole prompts; choose a "
            f"batch_size that is a multiple of {samples * world}"
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


def first_pass(
    section: Ppo, lengths_B: Tensor, *, seed: int, step: int, rank: int, world: int
) -> list[Tensor]:
    """The micro-batches of an update's first pass over a rollout, in their order.

    What is computed in these very batches before the update comes out the same in it, bit for bit, also where
    a row's outputs depend on the other rows and on the padding, as over a base that is not float32.
    """
    batches = minibatch_rows(
        section.batch_size, section.minibatches, seed=seed, step=step, epoch=0, rank=rank, world=world
    )
    return [m for rows in batches for m in micro_batches(rows, lengths_B, section.micro_batch_size)]


class Texts(NamedTuple):
    """Texts laid out as the backbone wants them: from the second token on, all of them are wanted."""

    ids_BT: Tensor
    mask_BT: Tensor
    wanted_BR: Tensor
    """True = a token whose log-prob is wanted."""
    total: Tensor
    """Wanted tokens of all processes."""


def read_texts(
    specs: Sequence[str], dialogue: Dialogue, max_tokens: int, *, key: str = "ppo.ptx_texts"
) -> list[list[int]]:
    """Token ids of the pieces of plain texts.

    Args:
        specs: files or ``hub:`` names; a row is a line of a .txt file, or has a ``text`` field.
        dialogue: the tokenizer.
        max_tokens: longer texts are cut into pieces of this length.
        key: of the recipe, for messages.

    Raises:
        UserError: a row without text (file and line), or nothing usable.
    """
    pieces: list[list[int]] = []
    for origin in origins(specs, key=key):
        for number, row in origin.rows:
            text = row.get("text") if isinstance(row, Mapping) else row
            if not isinstance(text, str):
                raise UserError(f"{origin.where(number)}: no text; {key} wants lines or a `text` field")
            ids = dialogue.tokenizer(text, add_special_tokens=False)["input_ids"]
            pieces += [ids[i : i + max_tokens] for i in range(0, len(ids), max_tokens)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # the first token has nothing before it
    if not pieces:
        raise UserError(f"{key}: no text of two tokens or more in {', '.join(specs)}")
    return pieces


class PtxBatches:
    """PPO-ptx: draws plain texts for every optimizer step, as a function of its number alone.

    Ouyang 2022 (arXiv 2203.02155), eq. 2: the objective gains gamma * E[log pi(x)], x from the pretraining
    distribution, so that the policy does not forget how to write it.

    Args:
        section: the recipe's ``ppo`` section.
        dialogue: the tokenizer.
        runtime: the processes.
        seed: the recipe's seed.
    """

    def __init__(self, section: Ppo, dialogue: Dialogue, runtime: Runtime, seed: int) -> None:
        if section.ptx_batch_size % runtime.world:
            raise UserError(
                f"ppo.ptx_batch_size {section.ptx_batch_size} does not divide into {runtime.world} processes"
            )
        self.pieces = read_texts(section.ptx_texts, dialogue, section.ptx_max_tokens)
        self._size, self._runtime, self._seed = section.ptx_batch_size, runtime, seed
        self._pad_id = dialogue.pad_id

    def __call__(self, number: int) -> Texts:
        """This process's texts of an optimizer step, counted from 0 over the whole run."""
        rows = own_rows(self._size, self._runtime.rank, self._runtime.world)
        positions = [number * self._size + row for row in rows]
        chosen = [self.pieces[i] for i in _drawn(self._seed, _TEXTS, positions, len(self.pieces))]
        ids_BT, mask_BT = (
            torch.cat([part, part.new_full((len(part), 1), empty)], dim=1).to(self._runtime.device)
            for part, empty in zip(right_pad(chosen, self._pad_id), (self._pad_id, False), strict=True)
        )
        wanted_BR = mask_BT[:, 1:-1]
        return Texts(ids_BT, mask_BT, wanted_BR, self._runtime.all_sum(wanted_BR.sum()))
