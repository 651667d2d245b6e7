"""Matrix products with a constant float32 matrix on a CPU, by oneDNN where torch has it.

For ``x W^T`` in float32 torch calls the BLAS that it was built with. oneDNN, which torch brings along for
other types, does the same product in the same precision faster on many processors, most of all with few rows
or a wide output such as a vocabulary (figures: docs/benchmarks.md). Its operator is one that torch's own
compiler emits, so whether it is there and right is checked once against the plain product; everything else,
and every machine without it, goes the plain way.

Shape suffixes: ``_O`` output feature, ``_I`` input feature.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_TOLERANCE = 1e-4  # between the two products, in units of the result's size


@functools.cache
def _operators() -> tuple[Any, Any] | None:
    """oneDNN's product and the operator that reorders a matrix for it; None where they are not to be had."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        product, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
        x, weight, bias = (torch.linspace(-1, 1, n).sin() for n in (6 * 48, 32 * 48, 32))
        x, weight = x.view(2, 3, 48), weight.view(32, 48)
        expected = F.linear(x, weight, bias)
        for matrix in (weight, reorder(weight, 6)):
            if not torch.allclose(product(x, matrix, bias, "none", [], ""), expected, atol=_TOLERANCE):
                return None
    except (AttributeError, RuntimeError, TypeError):
        return None
    return product, reorder


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and _operators() is not None
    )


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., I] to [..., O], without gradients. ``weight_OI`` may be a transposed view."""
    found = _operators() if _suits(x, weight_OI) else None
    if found is None:
        return F.linear(x, weight_OI, bias_O)
    return found[0](x, weight_OI, bias_O, "none", [], "")


class _Constant(torch.autograd.Function):
    """x W^T + b with the gradient of x; W and b are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return linear(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight_OI,) = ctx.saved_tensors
        return linear(grad, weight_OI.T), None, None


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """The forward pass of a linear map, by oneDNN as long as nothing but its input has a gradient."""
    weight, bias = layer.weight, layer.bias
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not _suits(x, weight) or hasattr(weight, "ds_id"):
        return F.linear(x, weight, bias)
    if not (torch.is_grad_enabled() and (learns or x.requires_grad)):
        return linear(x, weight, bias)
    return F.linear(x, weight, bias) if learns else _Constant.apply(x, weight, bias)


def use_onednn(module: nn.Module) -> None:
    """Have every plain linear map inside a module computed by :func:`linear` from now on."""
    for layer in module.modules():
        if type(layer) is nn.Linear and "forward" not in layer.__dict__:
            layer.__dict__["forward"] = partial(_forward, layer)


Weights = Callable[[nn.Module], tuple[Tensor, Tensor | None] | None]


@contextlib.contextmanager
def packed_weights(module: nn.Module, rows: int, folded: Weights = lambda _: None) -> Iterator[None]:
    """Have linear maps computed from copies of their weights that are in the order oneDNN likes.

    For many passes of few rows without gradient, such as decoding; the copies are as large as the weights.

    Args:
        module: whose maps; plain ones with whole float32 weights on the CPU.
        rows: rows of a pass, about; others work too.
        folded: weight and bias that a layer of another kind runs with just now; None for any other layer.
    """
    found = _operators()
    before: list[tuple[nn.Module, Any]] = []
    try:
        inside = "-"  # names of the parts of the last folded layer, which do not run
        for name, layer in module.named_modules() if found else ():
            of_folded = folded(layer)
            if of_folded is not None:
                inside = f"{name}."
            weights = of_folded or (None if name.startswith(inside) else _plain(layer))
            if found is None or weights is None or not _suits(weights[0], weights[0]):
                continue
            before.append((layer, layer.__dict__.get("forward")))
            weight = found[1](weights[0].detach(), rows)
            layer.__dict__["forward"] = partial(_reordered, found[0], weight, weights[1])
        yield
    finally:
        for layer, forward in before:
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward


def _plain(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    if type(layer) is not nn.Linear or hasattr(layer.weight, "ds_id"):
        return None
    forward = layer.__dict__.get("forward")
    ours = forward is None or (isinstance(forward, partial) and forward.func is _forward)
    return (layer.weight, layer.bias) if ours else None


def _reordered(operator: Any, weight: Tensor, bias_O: Tensor | None, x: Tensor) -> Tensor:
    return operator(x, weight, bias_O, "none", [], "")
