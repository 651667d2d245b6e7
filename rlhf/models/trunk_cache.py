"""Hidden states of the frozen layers below the first adapted one (``lora.layers: top_k``), computed once for
many passes.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rlhf.recipe.reward import PreferenceTraining
from rlhf.recipe.schema import Distill, Ppo
from rlhf.runs.processes import print_once

ALL_ADAPTED = "no layers are frozen (lora.layers adapts all of them)"


def trunk_bytes(base: Any, tokens: int) -> int:
    """Memory of the hidden states of so many tokens, in the type of the base's weights."""
    return tokens * int(base.config.get_text_config().hidden_size) * int(base.dtype.itemsize)


def keeps_trunk(
    section: Distill | Ppo | PreferenceTraining,
    frozen_layers: int,
    needed: int,
    any_process: Callable[[bool], bool] = bool,
    *,
    no_trunk: str = ALL_ADAPTED,
) -> bool:
    """Whether there are frozen layers, and the ``needed`` bytes of their hidden states (:func:`trunk_bytes`)
    fit into ``trunk_gigabytes`` on every process; where not, a line says so. ``no_trunk``: why there are
    none."""
    key, limit = f"{type(section).__name__.lower()}.trunk_gigabytes", section.trunk_gigabytes
    if frozen_layers and not any_process(needed > limit * 1e9):
        return True
    if frozen_layers:
        print_once(
            f"{key}: the hidden states of the frozen layers need more than {limit:g} GB a process, "
            "so every pass computes them anew"
        )
    elif "trunk_gigabytes" in section.model_fields_set:
        print_once(f"{key} has no effect: {no_trunk}")
    return False


class TrunkCache:
    """Hidden states that enter layer ``cut``, the first adapted one, for all examples, on the CPU."""

    def __init__(self, cut: int) -> None:
        self.cut = cut
        self.rows: dict[int, list[Tensor]] = {}  # of each example, [T, D] without padding, by its index

    def add(self, index_N: Sequence[int], hidden_NTD: Tensor, mask_NT: Tensor) -> None:
        """Keep the rows of a right-padded batch (mask: True = a real token), ``index_N`` the example of each,
        in place of those that the examples had; the rows of an example stand together."""
        self.rows.update({index: [] for index in index_N})
        for index, hidden_TD, length in zip(index_N, hidden_NTD, mask_NT.sum(-1).tolist(), strict=True):
            self.rows[index].append(hidden_TD[:length].cpu().clone())

    def states(self, index_N: Sequence[int], ids_NT: Tensor) -> Tensor:
        """The states of a right-padded batch, [N, T, D], 0 at padding, on the device of its ids."""
        first = self.rows[index_N[0]][0]
        out_NTD = first.new_zeros(*ids_NT.shape, first.shape[-1])
        before, row = None, 0
        for n, index in enumerate(index_N):
            row = row + 1 if index == before else 0
            before = index
            kept_TD = self.rows[index][row % len(self.rows[index])]
            out_NTD[n, : len(kept_TD)] = kept_TD
        return out_NTD.to(ids_NT.device)
