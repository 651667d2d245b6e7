"""The parts of fast decoding against transformers' cache."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from rlhf.generation.kv_cache import RoomyLayer, distinct, new_cache
from rlhf.models.tiny import tiny_model

ROOM = 40
OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 4)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 50), min_size=1, max_size=4)),
    st.tuples(st.just("crop"), st.just(1)),
)


@settings(max_examples=40)
@given(rows=st.integers(1, 3), operations=st.lists(OPERATIONS, min_size=1, max_size=8))
def test_a_layer_with_room_holds_what_a_growing_one_holds(rows, operations):
    generator = torch.Generator().manual_seed(0)
    mine, theirs = RoomyLayer(ROOM), DynamicLayer()
    for kind, value in [("update", 3), *operations]:
        if kind == "update":
            states = [torch.randn(rows, 2, value, 4, generator=generator) for _ in range(2)]
            for got, expected in zip(mine.update(*states), theirs.update(*states), strict=True):
                assert torch.equal(got, expected)
        for layer in (mine, theirs):
            if kind == "select":
                layer.batch_select_indices(torch.tensor(value) % rows)
            if kind == "crop" and layer.get_seq_length() > 1:
                layer.crop(-1)
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        rows = len(mine.keys)


def test_a_layer_with_room_starts_anew_after_a_reset():
    layer = new_cache(tiny_model(20).config, 5).layers[0]
    states = torch.ones(2, 2, 5, 4)
    layer.update(states, states)
    layer.reset()
    assert layer.get_seq_length() == 0
    keys, _ = layer.update(2 * states[:1], states[:1])
    assert torch.equal(keys, 2 * states[:1])


def test_distinct_rows_keep_their_order():
    assert distinct([[2, 1], [1], [2, 1], [], [1], [2]]) == ([[2, 1], [1], [], [2]], [0, 1, 0, 2, 1, 3])
