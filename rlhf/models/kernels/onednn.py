"""Matrix products with a constant float32 matrix on a CPU, by oneDNN where torch has it.

For ``x W^T`` in float32 torch calls the BLAS that it was built with. oneDNN, which torch brings along for
other types, does the same product in the same precision faster on many processors, most of all with few rows
or a wide output such as a vocabulary (figures: docs/benchmarks.md). Its operator is one that torch's own
compiler emits, so whether it is there and right is checked once against the plain product; everything else,
and every machine without it, goes the plain way.

In bfloat16 torch's products are oneDNN's already, but put the matrix in order in every call: for the few rows
of decoding that takes longer than the product. Its fused attention sets up small products for each row and
head: over short sequences that takes most of its time, and :func:`attention` goes another way.

Shape suffixes: ``_O`` output feature, ``_I`` input feature; ``_B`` row, ``_H`` head, ``_Q`` query, ``_K``
key, ``_D`` hidden unit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

_SHORT = 128  # queries or keys; above, the fused kernel's work outweighs its setting up
_TOLERANCE = 1e-4  # between the two products, in units of the result's size
_TOLERANCE_HALF = 0.1  # the same in bfloat16


@functools.cache
def _operators() -> tuple[Any, Any] | None:
    """oneDNN's product and the operator that reorders a matrix for it; None where they are not to be had."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        product, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
        exact = _is_right(product, reorder, torch.float32, _TOLERANCE)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return (product, reorder) if exact else None


def _is_right(product: Any, reorder: Any, dtype: torch.dtype, tolerance: float) -> bool:
    """Whether a product agrees with the plain one, with a matrix as it is and in its own order."""
    x, weight, bias = (torch.linspace(-1, 1, n).sin().to(dtype) for n in (6 * 48, 32 * 48, 32))
    x, weight = x.view(2, 3, 48), weight.view(32, 48)
    expected = F.linear(x, weight, bias)
    found = [product(x, matrix, bias, "none", [], "") for matrix in (weight, reorder(weight, 6))]
    return all(torch.allclose(y, expected, atol=tolerance) for y in found)


@functools.cache
def _packs_half() -> bool:
    """Whether the same operators do bfloat16 here."""
    try:
        return (found := _operators()) is not None and _is_right(*found, torch.bfloat16, _TOLERANCE_HALF)
    except RuntimeError:
        return False


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and _operators() is not None
    )


def _can_pack(weight: Tensor) -> bool:
    """Whether a matrix can be put into oneDNN's order."""
    return _suits(weight, weight) or (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.numel() > 0
        and _packs_half()
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


Weights = tuple[Tensor, Tensor | None]
"""Weight [O, I] and bias of a linear map."""


class Forward:
    """What stands in the place of a linear map's own ``forward``; nothing else is ever put there."""

    packed: Weights | None = None
    """The weight in the order oneDNN likes, and the bias, inside :func:`packed_weights`."""

    def __call__(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The output of the map."""
        return self.plain(x, *args, **options) if self.packed is None else self.by_packed(x)

    def by_packed(self, x: Tensor) -> Tensor:
        """The output by the packed copy, without gradients."""
        operators: Any = _operators()
        product: Tensor = operators[0](x, *self.packed, "none", [], "")  # type: ignore[misc]
        return product

    def plain(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The same without a packed copy."""
        raise NotImplementedError

    def weights(self) -> Weights | None:
        """The whole matrix that the map multiplies with just now; None where there is none."""
        raise NotImplementedError


class _ByOneDnn(Forward):
    """A plain linear map, by oneDNN as long as nothing but its input has a gradient."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def plain(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        if not _suits(x, weight) or hasattr(weight, "ds_id"):
            return F.linear(x, weight, bias)
        if not (torch.is_grad_enabled() and (learns or x.requires_grad)):
            return linear(x, weight, bias)
        return F.linear(x, weight, bias) if learns else _Constant.apply(x, weight, bias)

    def weights(self) -> Weights | None:
        return None if hasattr(self.layer.weight, "ds_id") else (self.layer.weight, self.layer.bias)


def use_onednn(module: nn.Module) -> None:
    """Have every plain linear map inside a module computed by :func:`linear` from now on."""
    for layer in module.modules():
        if type(layer) is nn.Linear and "forward" not in layer.__dict__:
            layer.__dict__["forward"] = _ByOneDnn(layer)


def leave_onednn(module: nn.Module) -> None:
    """Have every linear map inside a module computed as torch does again."""
    for layer in module.modules():
        if isinstance(layer.__dict__.get("forward"), Forward):
            del layer.__dict__["forward"]


@contextlib.contextmanager
def packed_weights(module: nn.Module, rows: int) -> Iterator[None]:
    """Have linear maps computed from copies of their weights that are in the order oneDNN likes.

    For many passes of few rows without gradient, such as decoding; the copies are as large as the weights.

    Args:
        module: whose maps; those with a :class:`Forward` and whole float32 or bfloat16 weights on the CPU.
        rows: rows of a pass, about; others work too.
    """
    found = _operators()
    packed: list[Forward] = []
    inside = "-"  # names of the parts of the last packed layer, which do not run
    try:
        for name, layer in module.named_modules() if found else ():
            forward = layer.__dict__.get("forward")
            weights = None
            if isinstance(forward, Forward) and not name.startswith(inside):
                weights = forward.weights()
            if found is not None and weights is not None and _can_pack(weights[0]):
                forward.packed = found[1](weights[0].detach(), rows), weights[1]
                packed.append(forward)
                inside = f"{name}."
        yield
    finally:
        for forward in packed:
            forward.packed = None


# ---------------------------------------------------------------- attention


class _ShortAttention(torch.autograd.Function):
    """softmax(s Q K^T + mask) V by the fused kernel; its gradients by products over all rows and heads
    (Dao 2022, arXiv 2205.14135, algorithm 4, without tiles)."""

    @staticmethod
    def forward(
        ctx: Any, q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_B1QK: Tensor, scale: float
    ) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_BHQD, _ = fused(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask_B1QK, scale=scale)
        ctx.save_for_backward(q_BHQD, k_BHKD, v_BHKD, mask_B1QK, out_BHQD)
        ctx.scale = scale
        return out_BHQD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQD: Tensor) -> Any:
        q_BHQD, k_BHKD, v_BHKD, mask_B1QK, out_BHQD = ctx.saved_tensors
        within_BHQ1 = torch.linalg.vecdot(grad_BHQD.float(), out_BHQD.float())[..., None]
        # by softmax, not by the kept logsumexp: a plain exp of what is masked underflows, slowly on some CPUs
        p_BHQK = (q_BHQD @ k_BHKD.mT).float().mul_(ctx.scale).add_(mask_B1QK).softmax(-1)
        slope_BHQK = (grad_BHQD @ v_BHKD.mT).float().sub_(within_BHQ1).mul_(p_BHQK).mul_(ctx.scale)
        slope_BHQK, p_BHQK = slope_BHQK.to(q_BHQD.dtype), p_BHQK.to(q_BHQD.dtype)
        return slope_BHQK @ k_BHKD, slope_BHQK.mT @ q_BHQD, p_BHQK.mT @ grad_BHQD, None, None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``sdpa`` of transformers, and its arguments; short sequences in bfloat16 on a CPU go another way, as
    does one query in decoding."""
    same: Any = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **options}
    if not _is_short(query, key, value, dropout, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **same)
    if query.shape[2] == 1:  # under a mask, transformers groups the heads by the keys that they share
        mask = query.new_zeros(1, 1, 1, key.shape[2]) if attention_mask is None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, **same)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None:
        shape = query.shape[2], key.shape[2]
        may = query.new_ones(shape, dtype=torch.bool)
        attention_mask = (may.tril() if causal else may)[None, None]
    if attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = query.new_zeros(attention_mask.shape).masked_fill_(~attention_mask, lowest)
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inputs = query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask
    out_BHQD: Tensor = _ShortAttention.apply(*inputs, scale)
    return out_BHQD.transpose(1, 2).contiguous(), None


def _is_short(query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]) -> bool:
    """Whether attention is what :func:`attention` does itself."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == torch.bfloat16
        and (query.shape[2] == 1 or query.shape[2] == key.shape[2] <= _SHORT)
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and dropout == 0.0
        and all(options.get(name) is None for name in ("position_bias", "cache", "softcap"))
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


def use_short_attention() -> None:
    """Let every model of transformers that attends by ``sdpa`` do so by :func:`attention` from now on."""
    AttentionInterface.register("sdpa", attention)
