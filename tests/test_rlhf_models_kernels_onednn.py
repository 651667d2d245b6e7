"""Products by oneDNN against torch's own linear map and its autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf.models.backbone import Backbone
from rlhf.models.kernels import onednn as products
from rlhf.models.kernels.onednn import attention, linear, packed_weights, use_onednn
from rlhf.models.tiny import tiny_model
from rlhf.recipe.schema import Lora

here = pytest.mark.skipif(products._operators() is None, reason="this torch has no oneDNN product")
half_here = pytest.mark.skipif(not products._packs_half(), reason="oneDNN has no bfloat16 product here")


@pytest.fixture
def calls(monkeypatch):
    """Counts the products that oneDNN does."""
    counted = []
    operator, reorder = products._operators() or (F.linear, None)

    def count(x, *rest):
        counted.append(tuple(x.shape))
        return operator(x, *rest)

    monkeypatch.setattr(products, "_operators", lambda: (count, reorder))
    return counted


@here
@pytest.mark.parametrize("shape", [(24, 6), (6, 24), (48, 700)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3), (2, 1, 64)])
def test_a_product_is_the_linear_map_also_of_a_transposed_view(shape, bias, leading, calls):
    torch.manual_seed(0)
    weight, b = torch.randn(shape[1], shape[0]), torch.randn(shape[1]) if bias else None
    x, back = torch.randn(*leading, shape[0]), torch.randn(*leading, shape[1])
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), rtol=0, atol=1e-4)
    torch.testing.assert_close(linear(back, weight.T), back @ weight, rtol=1e-5, atol=1e-4)
    rows = x.transpose(0, -2)  # not contiguous
    torch.testing.assert_close(linear(rows, weight, b), F.linear(rows, weight, b), rtol=0, atol=1e-4)
    assert len(calls) == 3


@here
def test_what_onednn_is_not_for_goes_the_plain_way(calls):
    weight = torch.randn(4, 8)
    for x, w in (
        (torch.randn(3, 8, dtype=torch.float64), weight.double()),
        (torch.randn(3, 8, dtype=torch.bfloat16), weight.bfloat16()),
        (torch.randn(0, 8), weight),
    ):
        assert torch.equal(linear(x, w), F.linear(x, w))
    assert not calls


def test_a_machine_without_the_operator_has_the_same_result(monkeypatch):
    monkeypatch.setattr(products, "_operators", lambda: None)
    layer, x = nn.Linear(8, 4).requires_grad_(False), torch.randn(3, 8)
    expected = F.linear(x, layer.weight, layer.bias)
    use_onednn(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(linear(x, layer.weight, layer.bias), expected)
    with packed_weights(layer, 3):
        assert torch.equal(layer(x), expected)


def test_an_operator_that_computes_something_else_is_not_used(monkeypatch):
    class Wrong:
        def _linear_pointwise(self, x, weight, bias, *rest):
            return F.linear(x, weight, bias) + 0.01

        def _reorder_linear_weight(self, weight, rows):
            return weight

    monkeypatch.setattr(torch.ops, "mkldnn", Wrong(), raising=False)
    products._operators.cache_clear()
    try:
        assert products._operators() is None
    finally:
        monkeypatch.undo()
        products._operators.cache_clear()


@here
@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_through_a_constant_map_is_autograds(bias, calls):
    layer = nn.Linear(8, 5, bias=bias).requires_grad_(False)
    x = torch.randn(2, 3, 8, requires_grad=True)
    torch.autograd.backward(F.linear(x, layer.weight, layer.bias).sin().sum())
    expected, x.grad = x.grad, None
    use_onednn(layer)
    layer(x).sin().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-5)
    assert calls == [(2, 3, 8), (2, 3, 5)]  # there and back


@here
def test_a_map_that_learns_keeps_its_gradient(calls):
    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    use_onednn(layer)
    layer(x).sum().backward()
    assert not calls
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(5, 8))
    with torch.no_grad():
        layer(x)
    assert len(calls) == 1


@here
@pytest.mark.parametrize("shape", [(24, 6), (6, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_maps_are_the_maps_they_stand_for(shape, bias):
    layer = nn.Linear(*shape, bias=bias).requires_grad_(False)
    use_onednn(layer)
    for rows in (1, 2, 5, 64):
        x = torch.randn(rows, 1, shape[0])
        expected = F.linear(x, layer.weight, layer.bias)
        with torch.no_grad(), packed_weights(layer, 2):
            assert layer.forward.packed
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    assert layer.forward.packed is None


@here
def test_packed_maps_run_with_the_folded_adapter_and_leave_nothing_behind():
    base = tiny_model(259).requires_grad_(False).eval()
    use_onednn(base)
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
            for role, expected in said.items():
                model.activate(role)
                folded = role == "policy"
                assert (adapted.forward.weights() is not None) == folded
                with packed_weights(model.base, 2):
                    assert (adapted.forward.packed is not None) == folded
                    # what does not run while it is folded has no copy
                    assert (adapted.base_layer.forward.packed is not None) != folded
                    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=1e-5)
                assert adapted.forward.packed is None
        with pytest.raises(ZeroDivisionError), packed_weights(model.base, 2):
            raise ZeroDivisionError
    assert "forward" not in vars(adapted)
    assert not any(getattr(module.forward, "packed", None) for module in model.modules())


@half_here
def test_packed_maps_in_bfloat16_are_the_maps_they_stand_for():
    layer = nn.Linear(24, 6, dtype=torch.bfloat16).requires_grad_(False)
    use_onednn(layer)
    for rows in (1, 2, 5, 64):
        x = torch.randn(rows, 1, 24, dtype=torch.bfloat16)
        expected = F.linear(x, layer.weight, layer.bias)
        with torch.no_grad(), packed_weights(layer, 2):
            assert layer.forward.packed
            torch.testing.assert_close(layer(x), expected, rtol=0.01, atol=0.01)


@half_here
def test_packed_maps_in_bfloat16_add_the_adapter_beside_them():
    base = tiny_model(259).to(torch.bfloat16).requires_grad_(False).eval()
    use_onednn(base)
    model = Backbone(base, Lora(rank=4, layers="top_2"), adapters=["policy"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted = model.base.model.layers[2].mlp.up_proj
    x = torch.randn(2, 1, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        for role in ("policy", "reference"):
            model.activate(role)
            with model.folded("policy"):
                expected = adapted(x)
                with packed_weights(model.base, 2):
                    assert (adapted.forward.packed is not None) == (role == "policy")
                    torch.testing.assert_close(adapted(x), expected, rtol=0.01, atol=0.01)
    model.activate("policy")
    with torch.no_grad(), model.folded("policy"), packed_weights(model.base, 2):
        assert not torch.allclose(adapted(x), F.linear(x, adapted.base_layer.weight), atol=0.05)


@here
def test_what_cannot_be_packed_is_left_alone():
    half, learned, foreign = nn.Linear(4, 4, dtype=torch.float16), nn.Linear(4, 4), nn.Linear(4, 4)
    foreign.forward = lambda x: x
    use_onednn(nn.ModuleList([half, learned, foreign]))
    with packed_weights(nn.ModuleList([half, learned, foreign]), 2):
        assert half.forward.packed is None
        assert learned.forward.packed is not None
        assert foreign(3) == 3


# ---- attention


def attended(how, dtype, mask, *, queries=12, keys=12):
    """Output and gradients of six heads over two heads of keys, from the same numbers in any type."""
    drawn = torch.Generator().manual_seed(3)
    shapes = (3, 6, queries, 16), (3, 2, keys, 16), (3, 2, keys, 16)
    inputs = [torch.randn(shape, generator=drawn).bfloat16().to(dtype).requires_grad_() for shape in shapes]
    module = nn.Module()
    module.num_key_value_groups = 3
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    out, _ = how(module, *inputs, mask, scaling=0.3)
    out.backward(torch.randn(out.shape, generator=drawn).bfloat16().to(dtype))
    made_by, names = out.grad_fn, []
    while made_by:
        names.append(made_by.name())
        made_by = made_by.next_functions[0][0] if made_by.next_functions else None
    return [out.detach(), *(x.grad for x in inputs)], "_ShortAttentionBackward" in names


def masks_of(queries, keys):
    """As models give them: nothing, True = may look, numbers to add."""
    may = torch.ones(3, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    may[1, ..., 1] = may[2, ..., 2:5] = False
    return {"none": None, "bool": may, "added": torch.zeros(may.shape).masked_fill(~may, -1e30)}


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("queries", [12, 1])
def test_short_attention_in_bfloat16_is_that_of_float64_but_for_rounding(kind, queries):
    mask = masks_of(queries, 12)[kind]
    found, own = attended(attention, torch.bfloat16, mask, queries=queries)
    wanted, _ = attended(sdpa_attention_forward, torch.float64, mask, queries=queries)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs).norm() < 0.01 * theirs.norm()
    assert own == (queries > 1)


def test_all_other_attention_is_what_it_was():
    for dtype, keys in ((torch.float32, 12), (torch.bfloat16, 129)):
        found, own = attended(attention, dtype, None, queries=keys, keys=keys)
        wanted, _ = attended(sdpa_attention_forward, dtype, None, queries=keys, keys=keys)
        assert all(map(torch.equal, found, wanted))
        assert not own
