"""Hidden states of the frozen layers below the first adapted one (``lora.layers: top_k``), computed once for
many passes.

They are kept by row (:class:`TrunkCache`), or by what was read, a prompt or a response behind it
(:class:`ResponseStates`), and computed in batches that depend on the data alone, so that a resumed run has
the same ones bit for bit.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.errors import out_of_memory
from rlhf.models.backbone import ALL_ADAPTED, WEIGHTS_SHARDED
from rlhf.models.packing import SHARED, PackedBatch, difference, inputs_of, tolerance
from rlhf.recipe.load import Recipe
from rlhf.recipe.reward import PreferenceTraining
from rlhf.recipe.schema import Distill, Dpo, Ppo
from rlhf.runs.processes import print_once, processes
from rlhf.training.progress import progress

Item = TypeVar("Item")


def trunk_bytes(base: Any, tokens: int) -> int:
    """Memory of the hidden states of so many tokens, in the type of the base's weights."""
    return tokens * int(base.config.get_text_config().hidden_size) * int(base.dtype.itemsize)


def keeps_trunk(
    section: Distill | Dpo | Ppo | PreferenceTraining,
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
    """Hidden states that enter the first adapted layer, for numbered rows that are always read whole and by
    themselves, on the CPU. (Of two rows with the same tokens each has its own.)"""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}  # [T, D] without padding

    def add(self, index_N: Sequence[int], hidden_NTD: Tensor, mask_NT: Tensor) -> None:
        """Keep the rows of a right-padded batch (mask: True = a real token) under their numbers."""
        for index, hidden_TD, length in zip(index_N, hidden_NTD, mask_NT.sum(-1).tolist(), strict=True):
            self.rows[index] = hidden_TD[:length].cpu().clone()

    def states(self, index_N: Sequence[int], ids_NT: Tensor) -> Tensor:
        """The states of a right-padded batch, [N, T, D], 0 at padding, on the device of its ids."""
        first = self.rows[index_N[0]]
        out_NTD = first.new_zeros(*ids_NT.shape, first.shape[-1])
        for n, index in enumerate(index_N):
            kept_TD = self.rows[index]
            out_NTD[n, : len(kept_TD)] = kept_TD
        return out_NTD.to(ids_NT.device)


Piece = tuple[tuple[int, ...], tuple[int, ...] | None]
"""A prompt's ids, and those of a response behind it; None = the prompt itself."""


class ResponseStates:
    """States that enter layer ``cut``, the first adapted one, by the tokens that were read, on the CPU.

    The comparisons of a pool, such as votes over thirty arguments, hold each response a dozen times; its
    states are computed once and laid out for whatever packed rows ask for them, which :class:`TrunkCache`
    cannot. What else was in its row then changes them by rounding only.
    """

    def __init__(self, cut: int) -> None:
        self.cut = cut
        self.pieces: dict[Piece, Tensor] = {}  # [T, D]

    def add(self, packed: PackedBatch, states_NTD: Tensor) -> None:
        """Keep what a packed batch holds and has not been seen; what has been seen stays as it was."""
        for n, piece, begin, end in _pieces(packed):
            if piece not in self.pieces:
                self.pieces[piece] = states_NTD[n, begin:end].cpu().clone()

    def of(self, packed: PackedBatch) -> Tensor:
        """The states of a packed batch, [N, T, D], 0 at padding, on its device.

        Raises:
            KeyError: it holds what was never added.
        """
        first = next(iter(self.pieces.values()))
        out_NTD = first.new_zeros(*packed.ids_NT.shape, first.shape[-1])
        for n, piece, begin, end in _pieces(packed):
            out_NTD[n, begin:end] = self.pieces[piece]
        return out_NTD.to(packed.ids_NT.device)

    def inputs(self, packed: PackedBatch) -> dict[str, Any]:
        """What a model with hidden states (:mod:`rlhf.models.packing`) takes to go on from here."""
        return {"part": "top", "cut": self.cut, "hidden_NTD": self.of(packed)}


def _pieces(packed: PackedBatch) -> Iterator[tuple[int, Piece, int, int]]:
    """Row, piece, and the columns from which to which it stands."""
    for n, (ids, segments) in enumerate(zip(packed.ids_NT.tolist(), packed.segments_NT, strict=True)):
        numbers, sizes = torch.unique_consecutive(segments, return_counts=True)
        begin, prompt = 0, ()
        for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
            end = begin + size
            part = tuple(ids[begin:end])
            if number == SHARED:
                prompt = part
                yield n, (prompt, None), begin, end
            elif number > SHARED:
                yield n, (prompt, part), begin, end
            begin = end


@torch.no_grad()
def response_states(
    recipe: Recipe,
    section: Dpo | PreferenceTraining,
    model: Any,
    tokens: int,
    items: Sequence[Item],
    few: Sequence[Item],
    batches: Callable[[Sequence[Item]], list[list[int]]],
    pack: Callable[[Sequence[Item]], PackedBatch],
) -> ResponseStates | None:
    """Compute the hidden states of prompts with their responses, or print why not.

    None where :func:`keeps_trunk` is false, where ZeRO-3 makes a forward pass a collective call, or where the
    architecture cannot be split.

    Args:
        recipe: says which layers are frozen.
        section: says how much memory there is.
        model: a peft model over one with hidden states.
        tokens: of all distinct prompts and responses.
        items: all that is to be read.
        few: those in which a wrong cut of the model would show; they are read whole, too, and compared.
        batches: the indices of items by batch.
        pack: lays a batch out as rows.
    """
    top_k = recipe.lora.top_k
    base = model.base_model.model
    cut = 0 if top_k is None else max(0, base.config.get_text_config().num_hidden_layers - top_k)
    sharded = cut > 0 and processes() > 1 and recipe.distributed.zero_stage == 3
    cut, why = (0, WEIGHTS_SHARDED) if sharded else (cut, ALL_ADAPTED)
    if not keeps_trunk(section, cut, trunk_bytes(base, tokens), no_trunk=why):
        return None
    trunk, device = ResponseStates(cut), next(model.parameters()).device

    def read(items: Sequence[Item], batch: Sequence[int]) -> PackedBatch:
        packed = pack([items[i] for i in batch]).to(device)
        trunk.add(packed, model(**inputs_of(model, packed), part="trunk", cut=cut))
        return packed

    try:
        gap = 0.0
        for batch in batches(few):
            packed = read(few, batch)
            split, whole = (
                model(**inputs_of(model, packed), **part)[packed.rows_B, packed.columns_B]
                for part in (trunk.inputs(packed), {"part": "all"})
            )
            gap = max(gap, difference(split, whole))
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError) as error:
        if out_of_memory(error):
            raise
        print_once(f"warning: this architecture cannot be split at layer {cut} ({error}): no trunk cache")
        return None
    if not gap <= tolerance(model):
        print_once(f"warning: trunk and top differ from the whole (by {gap:.2g}): no trunk cache")
        return None
    for batch in progress("trunk", batches(items)):
        read(items, batch)
    return trunk
