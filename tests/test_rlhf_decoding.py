"""The parts of fast decoding against transformers' cache and torch's linear map."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.cache_utils import DynamicLayer

from rlhf.backbone import Backbone
from rlhf.decoding import RoomyLayer, distinct, new_cache, thin_products
from rlhf.merged import folded_weights
from rlhf.schema import Lora
from rlhf.tiny import tiny_model

ROOM = 40
OPERATIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 4)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 50), min_size=1, max_size=4)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 50), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
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
            if kind == "reorder":
                layer.reorder_cache(torch.tensor(value) % rows)
            if kind == "repeat":
                layer.batch_repeat_interleave(value)
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


@pytest.mark.parametrize("shape", [(24, 6), (6, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_thin_products_are_the_maps_they_stand_for(shape, bias):
    layer = nn.Linear(*shape, bias=bias)
    for rows in (1, 2, 4, 5, 64, 65):
        x = torch.randn(rows, 1, shape[0])
        expected = F.linear(x, layer.weight, layer.bias)
        with torch.no_grad(), thin_products(layer):
            assert "forward" in layer.__dict__
            got = layer(x)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_thin_products_run_with_the_folded_adapter_and_leave_nothing_behind():
    base = tiny_model(259).requires_grad_(False).eval()
    model = Backbone(base, Lora(rank=4, layers="top_2"), adapters=["policy", "other"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    x = torch.randn(2, 1, 32)
    adapted = model.base.model.layers[2].mlp.up_proj
    said = {}
    with torch.no_grad():
        for role in ("policy", "other", "reference"):
            model.activate(role)
            said[role] = adapted(x)
        with model.folded("policy"):
            inside = adapted.__dict__["forward"]
            for role, expected in said.items():
                model.activate(role)
                assert (folded_weights(adapted) is not None) == (role == "policy")
                with thin_products(model.base):
                    assert (adapted.__dict__["forward"] is not inside) == (role == "policy")
                    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-5)
                assert adapted.__dict__["forward"] is inside
        with pytest.raises(ZeroDivisionError), thin_products(model.base):
            raise ZeroDivisionError
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_maps_in_half_precision_are_left_alone():
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    with thin_products(layer):
        assert "forward" not in layer.__dict__
