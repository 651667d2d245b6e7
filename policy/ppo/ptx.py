"""PPO-ptx: plain text mixed into the updates, so that the policy does not forget how to write it.

Ouyang et al. 2022 (arXiv 2203.02155), eq. 2: the objective gains gamma * E[log pi(x)], x from the pretraining
distribution.

Shape suffixes: ``_B`` text of this process, ``_T`` token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from policy.ppo.batching import own_rows
from rlhf.data.readers.files import origins
from rlhf.errors import UserError
from rlhf.models.masks import right_pad
from rlhf.recipe.schema import Ppo
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.runtime import Runtime

_TEXTS = 3  # sets the random numbers of this purpose apart


class Texts(NamedTuple):
    """Texts laid out as the backbone wants them: from the second token on, all of them are wanted."""

    ids_BT: Tensor
    mask_BT: Tensor
    wanted_BR: Tensor
    """True = a token whose log-prob is wanted."""
    total: Tensor
    """Wanted tokens of all processes."""


def read_texts(specs: Sequence[str], dialogue: Dialogue, max_tokens: int) -> list[list[int]]:
    """Token ids of the pieces of plain texts.

    Args:
        specs: files or ``hub:`` names; a row is a line of a .txt file, or has a ``text`` field.
        dialogue: the tokenizer.
        max_tokens: longer texts are cut into pieces of this length.

    Raises:
        UserError: a row without text (file and line), or nothing usable.
    """
    pieces: list[list[int]] = []
    for origin in origins(specs, key="ppo.ptx_texts"):
        for number, row in origin.rows:
            text = row.get("text") if isinstance(row, Mapping) else row
            if not isinstance(text, str):
                raise UserError(
                    f"{origin.where(number)}: no text; ppo.ptx_texts wants lines or a `text` field"
                )
            ids = dialogue.tokenizer(text, add_special_tokens=False)["input_ids"]
            pieces += [ids[i : i + max_tokens] for i in range(0, len(ids), max_tokens)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # the first token has nothing before it
    if not pieces:
        raise UserError(f"ppo.ptx_texts: no text of two tokens or more in {', '.join(specs)}")
    return pieces


class PtxBatches:
    """Draws texts for every optimiser step, as a function of its number alone.

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
        """This process's texts of an optimiser step, counted from 0 over the whole run."""
        available = len(self.pieces)
        chosen: list[list[int]] = []
        for row in own_rows(self._size, self._runtime.rank, self._runtime.world):
            position = number * self._size + row
            order = np.random.default_rng([self._seed % 2**63, _TEXTS, position // available])
            chosen.append(self.pieces[int(order.permutation(available)[position % available])])
        ids_BT, mask_BT = (
            torch.cat([part, part.new_full((len(part), 1), empty)], dim=1).to(self._runtime.device)
            for part, empty in zip(right_pad(chosen, self._pad_id), (self._pad_id, False), strict=True)
        )
        wanted_BR = mask_BT[:, 1:-1]
        return Texts(ids_BT, mask_BT, wanted_BR, self._runtime.all_sum(wanted_BR.sum()))
