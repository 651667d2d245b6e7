"""Folded adapters against peft's own layers: same outputs, same gradients, nothing left behind."""

import contextlib
import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from rlhf.models.base import load_base
from rlhf.models.folding import Folding, _Folded
from rlhf.models.tiny import write_tiny_model
from rlhf.recipe.schema import Model

NAMES = ("policy", "value")
LINEAR = LoraLinear.forward


class Chain(nn.Module):
    """Three linear maps in a row, with and without bias, and one that is not adapted."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(10, 16, dtype=dtype)
        self.second = nn.Linear(16, 12, bias=False, dtype=dtype)
        self.plain = nn.Linear(12, 12, dtype=dtype)
        self.third = nn.Linear(12, 7, dtype=dtype)

    def forward(self, x):
        for layer in (self.first, self.second, self.plain):
            x = torch.tanh(layer(x))
        return self.third(x)


def adapted(base=None, targets=("first", "second", "third"), autocast_adapter_dtype=True, **options):
    """The base under two adapters, both far from zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **options)
    kind = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = get_peft_model(base or Chain(), config, adapter_name=NAMES[0], **kind)
    model.add_adapter(NAMES[1], config, **kind)
    stir(model, 1)
    model.set_adapter(NAMES[0])
    return model


@torch.no_grad()
def stir(model, seed):
    """Other adapter weights, written in place as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def run(model, x):
    """Output, and gradients of the input and of all learning parameters, of a loss that is not symmetric."""
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    out = model(x)
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), x.grad, grads


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def is_folded(layer):
    return "forward" in vars(layer)


@pytest.fixture
def model():
    return adapted()


@pytest.mark.parametrize("shape", [(5, 10), (2, 6, 10), (10,), (2, 3, 4, 10)])
def test_outputs_and_gradients_are_pefts(model, shape):
    x = inputs(*shape)
    out, grad_x, grads = run(model, x)
    with Folding(model).folded("policy"):
        assert [is_folded(layer) for layer in lora_layers(model)] == [True] * 3
        folded_out, folded_x, folded_grads = run(model, x)
    assert float((folded_out - out).abs().max()) < 1e-6
    assert relative(folded_x, grad_x) < 1e-5
    assert len(grads) == 6
    assert set(folded_grads) == set(grads)
    assert all(relative(folded_grads[name], grads[name]) < 1e-5 for name in grads)
    assert all(bool(gradient.any()) for gradient in grads.values())
    model.disable_adapter_layers()
    assert float((model(x) - out).abs().max()) > 0.1  # the adapter says something


def test_the_derivative_is_that_of_the_plain_formula_in_float64(model):
    layer = lora_layers(model)[0]
    a, b = (part["policy"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    weight, bias = (tensor.detach().double() for tensor in (layer.base_layer.weight, layer.base_layer.bias))

    def folded(x, a, b):
        return _Folded.apply(x, (weight + 1.5 * b @ a).detach(), bias, a, b, 1.5)

    def plain(x, a, b):
        return x @ (weight + 1.5 * b @ a).T + bias

    at = (inputs(3, 10).double(), a, b)
    found, expected = (torch.autograd.functional.jacobian(function, at) for function in (folded, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_only_what_learns_gets_a_gradient(model):
    x = inputs(5, 10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name and ".policy." in name)
    expected = run(model, x)[2]
    with Folding(model).folded("policy"):
        found = run(model, x)[2]
        model.requires_grad_(False)
        assert not model(x).requires_grad
    assert set(found) == set(expected)
    assert {name.split(".")[-3] for name in found} == {"lora_A"}
    assert all(relative(found[name], expected[name]) < 1e-5 for name in expected)


@pytest.mark.parametrize("late", [False, True])
def test_gradients_add_up_over_passes_also_of_a_backward_pass_after_leaving(model, late):
    parts = inputs(8, 10).split(3)

    def gradients(folded):
        model.zero_grad()
        with folded:
            losses = [model(part).square().sum() for part in parts]
            if not late:
                sum(losses).backward()
        if late:
            sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(contextlib.nullcontext())
    found = gradients(Folding(model).folded("policy"))
    assert len(found) == 6
    assert all(relative(found[name], expected[name]) < 1e-5 for name in expected)


# ---- beside bfloat16


@pytest.mark.parametrize("shape", [(5, 10), (2, 6, 10), (10,)])
def test_beside_bfloat16_outputs_and_gradients_are_those_of_float64_but_for_rounding(shape):
    model = adapted(Chain(torch.bfloat16))
    x = inputs(*shape).bfloat16()
    with Folding(model).folded("policy"):
        assert [is_folded(layer) for layer in lora_layers(model)] == [True] * 3
        out, grad_x, grads = run(model, x)
    assert out.dtype == grad_x.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in grads.values()} == {torch.float32}
    exact_out, exact_x, exact = run(copy.deepcopy(model).double(), x.double())
    assert relative(out, exact_out) < 0.03
    assert relative(grad_x, exact_x) < 0.03
    assert len(grads) == 6
    assert all(relative(grads[name], exact[name]) < 0.03 for name in exact)


def test_beside_bfloat16_an_update_too_small_for_the_matrix_still_counts():
    base = nn.Linear(10, 6, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(base.weight)
    model = adapted(nn.Sequential(base), ("0",))
    layer = lora_layers(model)[0]
    with torch.no_grad():
        layer.lora_B["policy"].weight.mul_(1e-3)
    x = torch.tensor([1.0, -1.0] * 5, dtype=torch.bfloat16)  # the matrix alone maps it to 0
    update = (
        layer.scaling["policy"] * layer.lora_B["policy"].weight @ (layer.lora_A["policy"].weight @ x.float())
    )
    assert torch.equal((base.weight + 1e-3).bfloat16(), base.weight)
    with Folding(model).folded("policy"):
        assert relative(model(x).detach(), update.detach()) < 0.02
        model.set_adapter("value")
        assert float(model(x).abs().max()) > 0.1
        with model.disable_adapter():
            assert not model(x).any()


# ---- who else is there


def test_other_adapters_and_the_reference_run_as_ever(model):
    x = inputs(5, 10)
    model.set_adapter("value")
    value = run(model, x)
    with model.disable_adapter():
        reference = model(x)
    model.set_adapter("policy")
    policy = model(x)
    with Folding(model).folded("policy"):
        model.set_adapter("value")
        out, grad_x, grads = run(model, x)
        assert torch.equal(out, value[0])
        assert torch.equal(grad_x, value[1])
        assert all(torch.equal(grads[name], value[2][name]) for name in value[2])
        assert {name.split(".")[-2] for name in grads} == {"value"}
        with model.disable_adapter():
            assert torch.equal(model(x), reference)
        model.set_adapter("policy")
        assert float((model(x) - policy).detach().abs().max()) < 1e-6
    differ = [float((a - b).detach().abs().max()) for a, b in ((value[0], policy), (reference, policy))]
    assert min(differ) > 0.1


def test_two_adapters_at_once_are_left_to_peft(model):
    x = inputs(5, 10)
    model.base_model.set_adapter(list(NAMES))
    both = model(x)
    with Folding(model).folded("policy"):
        assert torch.equal(model(x), both)


def test_a_second_adapter_inside_raises_and_the_same_does_nothing(model):
    folding = Folding(model)
    with folding.folded("policy"):
        refused = pytest.raises(RuntimeError, match="`policy` is folded in: leave it before folding `value`")
        with refused, folding.folded("value"):
            pytest.fail("entered")
        with folding.folded("policy"):
            pass
        assert all(map(is_folded, lora_layers(model)))  # leaving the inner one has not unfolded
    assert not any(map(is_folded, lora_layers(model)))


# ---- leaving


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_the_class_s_forward(model, fails):
    x, folding = inputs(5, 10), Folding(model)
    before = model(x)
    try:
        with folding.folded("policy"):
            assert all(map(is_folded, lora_layers(model)))
            if fails:
                raise KeyError("a mistake of the caller")
    except KeyError:
        assert fails
    for layer in lora_layers(model):
        assert not is_folded(layer)
        assert layer.forward.__func__ is LINEAR
    assert torch.equal(model(x), before)
    with folding.folded("value"):  # and another adapter may come in
        pass


def test_a_failure_half_way_in_leaves_nothing_folded(model, monkeypatch):
    folding = Folding(model)
    fold, seen = folding._fold, []

    def second_fails(layer, adapter):
        seen.append(layer)
        if len(seen) == 2:
            raise MemoryError
        return fold(layer, adapter)

    monkeypatch.setattr(folding, "_fold", second_fails)
    with pytest.raises(MemoryError), folding.folded("policy"):
        pytest.fail("entered")
    assert not any(map(is_folded, lora_layers(model)))
    monkeypatch.undo()
    with folding.folded("value"):
        assert all(map(is_folded, lora_layers(model)))


def test_weights_that_changed_are_picked_up_in_shared_buffers_and_nothing_drifts(model):
    x, folding = inputs(5, 10), Folding(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}
    names, outs, buffers = set(model.state_dict()), [], set()
    for step in range(50):
        stir(model, step)
        model.set_adapter(NAMES[step % 2])
        outs.append(model(x).detach())
        with folding.folded(NAMES[step % 2]):
            assert float((model(x) - outs[-1]).detach().abs().max()) < 1e-6
            assert set(model.state_dict()) == names
        buffers |= {id(buffer) for buffer in folding._buffers.values()}
    assert min(float((one - other).abs().max()) for one, other in itertools.pairwise(outs)) > 0.1
    assert len(buffers) == 3
    assert len(before) == 7
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())


@pytest.mark.parametrize("change", ["in place", "behind autograd's back", "another adapter"])
def test_a_backward_pass_with_other_weights_than_the_forward_pass_raises(model, change):
    x, folding = inputs(5, 10).requires_grad_(True), Folding(model)
    with folding.folded("policy"):
        late = model(x).sum()
    if change == "in place":
        stir(model, 7)
    elif change == "behind autograd's back":  # as some optimizers write
        for layer in lora_layers(model):
            layer.lora_A["policy"].weight.data.mul_(2)
    refused = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with folding.folded("value" if change == "another adapter" else "policy"), refused:
        late.backward()
    assert x.grad is None


# ---- what is left to peft


def merged():
    model = adapted()
    model.merge_adapter(["policy"])
    return model


@pytest.mark.parametrize(
    "make",
    [
        merged,
        *(lambda dtype=dtype: adapted(Chain(dtype)) for dtype in (torch.float16, torch.float64)),
        lambda: adapted(Chain(torch.bfloat16), autocast_adapter_dtype=False),
        *(lambda o=o: adapted(**{o: 0.5}).eval() for o in ("lora_dropout", "use_dora", "lora_bias")),
    ],
)
def test_what_is_no_plain_update_of_a_float32_matrix_is_left_to_peft(make):
    model = make()
    x = inputs(5, 10).to(next(model.parameters()).dtype)
    before = model(x)
    with Folding(model).folded("policy"):
        assert [is_folded(layer) for layer in lora_layers(model)] == [False] * 3
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_layers_are_left_to_peft(tmp_path, quantization):
    write_tiny_model(tmp_path)
    base = load_base(Model(path=str(tmp_path), quantization=quantization))
    model = adapted(base, ("q_proj", "down_proj"), task_type="CAUSAL_LM")
    ids = torch.arange(10, 20)[None]
    folding = Folding(model)
    before = model(input_ids=ids).logits
    with folding.folded("policy"):
        assert torch.equal(model(input_ids=ids).logits, before)
        assert not any(map(is_folded, lora_layers(model)))
    assert not folding._buffers
    with model.disable_adapter():
        assert float((model(input_ids=ids).logits - before).detach().abs().max()) > 1e-3


def test_a_layer_without_the_adapter_stays_as_it_is():
    torch.manual_seed(0)
    model = get_peft_model(Chain(), LoraConfig(r=4, target_modules=["first"]), adapter_name="policy")
    model.add_adapter("value", LoraConfig(r=2, target_modules=["second"]))
    stir(model, 1)
    x = inputs(5, 10)
    model.set_adapter("value")
    expected = model(x)
    with Folding(model).folded("value"):
        assert [is_folded(layer) for layer in lora_layers(model)] == [False, True]
        assert float((model(x) - expected).detach().abs().max()) < 1e-6
