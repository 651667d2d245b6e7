"""Decoding a batch one token at a time: a cache with room, rows that come and go, thin matrix products.

None of it changes a token, beyond rounding. Shape suffixes: ``_B`` row of the batch, ``_L`` row still in
it, ``_P`` prompt token, ``_T`` token so far, ``_N`` position, ``_D`` hidden unit, ``_I`` input feature,
``_O`` output feature.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf.models.backbone import stack_of
from rlhf.models.masks import positions_from_mask

PrefixStates = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of every layer for a text before the prompts, [1, head, T, D] each."""

_READY_MADE = ("sdpa", "eager")  # attention that takes an additive mask


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room for all tokens to come, so that none is copied when another is added.

    Args:
        room: tokens that fit in, prompt included.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._all: list[Tensor] = []  # keys and values, [B, head, room, D] each

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room in the shape of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._all = [s.new_empty(*s.shape[:2], self._room, s.shape[3]) for s in (key_states, value_states)]
        self._show(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> Any:
        """Add the states of new tokens; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.get_seq_length()
        for whole, new in zip(self._all, (key_states, value_states), strict=True):
            whole[:, :, first : first + new.shape[2]] = new
        self._show(first + key_states.shape[2])
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let the rows be those of these numbers; a number may come more than once."""
        if self.is_initialized:
            length = self.get_seq_length()
            self._all = [whole.index_select(0, indices.to(whole.device)) for whole in self._all]
            self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (whole[:, :, :length] for whole in self._all)


class PrefixLayer(DynamicLayer):
    """A text's keys and values in one layer, [1, head, T, D], before those of the rows of any one pass.

    Rows leave nothing behind, so the same layer serves the next ones.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> Any:
        """The text's states and the rows' own."""
        return tuple(
            torch.cat([own.expand(len(new), -1, -1, -1), new], dim=-2)  # type: ignore[union-attr]
            for own, new in ((self.keys, key_states), (self.values, value_states))
        )


def prefix_cache(config: Any, states: PrefixStates) -> Any:
    """A cache that holds a text before every row of a pass."""
    cache = DynamicCache(config=config)
    cache.layers = [PrefixLayer(keys, values) for keys, values in states]
    return cache


def before_rows(config: Any, text: Any, rows: int) -> Any:
    """A cache for one pass of so many rows, from that of a text [1, T] that stands before each of them."""
    if all(type(layer) is DynamicLayer for layer in text.layers):
        return prefix_cache(config, [(layer.keys, layer.values) for layer in text.layers])
    cache = copy.deepcopy(text)  # of a kind that changes while it is used
    cache.batch_repeat_interleave(rows)
    return cache


def new_cache(config: Any, room: int) -> Any:
    """An empty cache: with room where all layers attend to everything, else the kind the model asks for."""
    cache = DynamicCache(config=config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [RoomyLayer(room) for _ in cache.layers]
    return cache


class Decoding:
    """Rows that are decoded together. Each knows its own mask and position; rows can leave or be repeated.

    Args:
        decoder: the model without its vocabulary head.
        config: the configuration of the text model.
        room: tokens of a row, prompt included, that will be fed at most.
        prefix: keys and values of a text before every prompt; empty = none.
        additive_mask: whether the decoder takes an attention mask that is added to the scores, where its
            attention does.

    Raises:
        ValueError: there is a prefix, and not every layer looks back at all of it.
    """

    def __init__(
        self,
        decoder: nn.Module,
        config: Any,
        room: int,
        prefix: PrefixStates = (),
        *,
        additive_mask: bool = True,
    ) -> None:
        self._decoder, self._prefix = decoder, prefix
        self._length = prefix[0][0].shape[2] if prefix else 0
        self._cache = new_cache(config, self._length + room)
        self.plain = all(type(layer) is RoomyLayer for layer in self._cache.layers)
        if prefix and not self.plain:  # windows count columns, and padding stands between text and prompt
            raise ValueError("no text can stand before prompts where layers look back at a window only")
        self._ready_made = self.plain and additive_mask and config._attn_implementation in _READY_MADE

    def start(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        """Feed left-padded prompts (mask: True = a real token); returns hidden states [B, P, D]."""
        rows = len(ids_BP)
        if self._prefix:
            for layer, (keys, values) in zip(self._cache.layers, self._prefix, strict=True):
                layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        self._mask_BT = torch.cat([mask_BP.new_ones(rows, self._length), mask_BP], dim=1)
        self._position_B = self._length + mask_BP.sum(-1)
        return self._run(ids_BP, self._mask_BT.long(), self._length + positions_from_mask(mask_BP))

    def step(self, token_B: Tensor) -> Tensor:
        """Feed one more token a row; returns its hidden states [B, D]."""
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._mask_BT[:, :1])], dim=1)
        hidden_B1D = self._run(token_B[:, None], self._attention(), self._position_B[:, None])
        self._position_B = self._position_B + 1
        return hidden_B1D[:, 0]

    def select(self, rows: Tensor) -> None:
        """Let the batch consist of these of its rows; a row may come more than once."""
        self._cache.batch_select_indices(rows)
        self._mask_BT, self._position_B = self._mask_BT[rows], self._position_B[rows]

    def _run(self, ids_BN: Tensor, attention: Tensor | None, positions_BN: Tensor) -> Tensor:
        hidden: Tensor = self._decoder(
            input_ids=ids_BN,
            attention_mask=attention,
            position_ids=positions_BN,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        self._dtype = hidden.dtype
        return hidden

    def _attention(self) -> Tensor | None:
        """The mask of one new token a row: None where nothing is padding, else 0 or the lowest number to add.

        Handed over ready-made, [B, 1, 1, T], because the attention kernel would otherwise convert it anew in
        every layer.
        """
        if bool(self._mask_BT.all()):
            return None
        if not self._ready_made:
            return self._mask_BT.long()
        zeros_BT = torch.zeros(self._mask_BT.shape, dtype=self._dtype, device=self._mask_BT.device)
        return zeros_BT.masked_fill_(~self._mask_BT, torch.finfo(self._dtype).min)[:, None, None]


def distinct(rows: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """The different rows in the order they come up, and for each row the number of its like among them."""
    numbers: dict[tuple[int, ...], int] = {}
    of = [numbers.setdefault(tuple(row), len(numbers)) for row in rows]
    return [list(row) for row in numbers], of


class TrunkRecord:
    """Hidden states below layer ``cut``, written down while a batch is decoded inside this context.

    Args:
        decoder: the model without its vocabulary head.
        cut: number of layers of the trunk; with 0 nothing is recorded.
    """

    def __init__(self, decoder: Any, cut: int) -> None:
        self.states_BTD: Tensor | None = None
        self._layer: Any = getattr(decoder, stack_of(decoder))[cut - 1] if cut else None
        self._last: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> TrunkRecord:
        if self._layer is not None:
            self._hook = self._layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _keep(self, _layer: Any, _inputs: Any, output: Any) -> None:
        self._last = output[0] if isinstance(output, tuple) else output

    def start(self, prompt_B: Tensor, columns: int) -> None:
        """Write down the prompts that have just been read; ``prompt_B`` tells which belongs to each row."""
        if self._last is not None:
            _, width, features = self._last.shape
            self.states_BTD = self._last.new_zeros(len(prompt_B), columns, features)
            self.states_BTD[:, :width] = self._last[prompt_B]

    def note(self, row_L: Tensor, column: int) -> None:
        """Write down the token that has just been fed to these rows."""
        if self.states_BTD is not None and self._last is not None:
            self.states_BTD[row_L, column] = self._last[:, 0]
