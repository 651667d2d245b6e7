"""An adapter folded into the weights below it for a while, and trained as if it were not.

peft adds the low-rank update in every forward pass: three more operations on full-width activations a linear
map. Folded in once, W' = W + s·B·A costs one multiplication of the small matrices, and every pass until
the weights change is a plain matrix product, backwards too. The gradients of A and B need only the input and
the gradient of the output, and are the same to rounding (Hu 2021, eq. 3, differentiated).

W itself is never written to, so nothing drifts: W' stands in buffers of its own. Only float32 weights are
folded, since half precision would round small updates away. Beside a bfloat16 matrix on the CPU the update
stays apart and runs in bfloat16 itself, as autocast would run it: peft takes float32 copies of all
activations there. Only whole matrices (not quantized, not sharded) are taken; every other layer goes on as
peft has it.

Shape suffixes: ``_O`` output feature, ``_I`` input feature, ``_N`` token, ``_r`` rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rlhf.models.kernels.compiled import is_compiled
from rlhf.models.kernels.onednn import Forward, Weights, linear


class _Folded(torch.autograd.Function):
    """x W'^T + b, with the gradients of x, A and B; W' and b are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, folded_OI: Tensor, bias_O: Tensor | None, a_rI: Tensor, b_Or: Tensor, s: float
    ) -> Tensor:
        ctx.save_for_backward(x, folded_OI, a_rI, b_Or)
        ctx.scaling = s
        return linear(x, folded_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, folded_OI, a_rI, b_Or = ctx.saved_tensors
        grad_x = linear(grad, folded_OI.T) if ctx.needs_input_grad[0] else None
        grad_a = grad_b = None
        grad_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[3]:
            grad_a = ctx.scaling * ((grad_NO @ b_Or).T @ x_NI)
        if ctx.needs_input_grad[4]:
            grad_b = ctx.scaling * (grad_NO.T @ (x_NI @ a_rI.T))
        return grad_x, None, None, grad_a, grad_b, None


class _Beside(torch.autograd.Function):
    """x W^T + b + s·(x A^T) B^T in the type of x and W, with the gradients of x, A and B; W and b are
    constants, A and B float32 with copies in that type, ``sb_Or`` that of s·B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_rI: Tensor,
        b_Or: Tensor,
        half_a_rI: Tensor,
        sb_Or: Tensor,
        s: float,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        low_Nr = x_NI @ half_a_rI.T
        ctx.save_for_backward(x_NI, low_Nr, weight_OI, half_a_rI, sb_Or)
        ctx.scaling = s
        out_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(low_Nr, sb_Or.T)
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x_NI, low_Nr, weight_OI, half_a_rI, sb_Or = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        back_Nr = grad_NO @ sb_Or
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight_OI).addmm_(back_Nr, half_a_rI).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            grad_a = (back_Nr.T @ x_NI).float()
        if ctx.needs_input_grad[4]:
            grad_b = ctx.scaling * (low_Nr.T @ grad_NO).float().T
        return grad_x, None, None, grad_a, grad_b, None, None, None


class Folding:
    """Folds adapters of a module into buffers that all adapters share, one adapter at a time.

    Args:
        module: holds peft's LoRA layers; which of them can be folded is looked up at each use, none in
            compiled blocks.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = () if is_compiled(module) else module.modules()
        self._layers = [m for m in layers if isinstance(m, LoraLinear)]
        self._buffers: dict[LoraLinear, Tensor] = {}
        self._inside: str | None = None

    @contextlib.contextmanager
    def folded(self, adapter: str) -> Iterator[None]:
        """Have one adapter folded in wherever it is the active one; other adapters run as ever.

        Its weights must not change inside: leave before the optimizer steps. Entering again for the same
        adapter does nothing.

        Raises:
            RuntimeError: another adapter is folded in.
        """
        if self._inside is not None:
            if self._inside != adapter:
                raise RuntimeError(f"`{self._inside}` is folded in: leave it before folding `{adapter}`")
            yield
            return
        self._inside = adapter
        layers = [layer for layer in self._layers if _can_fold(layer, adapter)]
        try:
            for layer in layers:
                layer.__dict__["forward"] = self._fold(layer, adapter)
            yield
        finally:
            self._inside = None
            for layer in layers:
                layer.__dict__.pop("forward", None)

    @torch.no_grad()
    def _fold(self, layer: LoraLinear, adapter: str) -> Forward:
        base: Any = layer.base_layer
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        if weight.dtype != torch.float32:
            return _BesideForward(layer, adapter, weight)
        forward = _FoldedForward(layer, adapter)
        buffer = self._buffers.get(layer)
        if buffer is None or buffer.device != weight.device:
            buffer = self._buffers[layer] = torch.empty_like(weight, memory_format=torch.contiguous_format)
        torch.addmm(weight, forward.b_Or, forward.a_rI, alpha=forward.scaling, out=buffer)
        forward.folded_OI = buffer
        return forward


class _AdapterForward(Forward):
    """The forward pass of a LoRA layer inside :meth:`Folding.folded`."""

    def __init__(self, layer: LoraLinear, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        lora: Any = layer
        self.bias_O: Tensor | None = lora.base_layer.bias
        self.a_rI, self.b_Or = lora.lora_A[adapter].weight, lora.lora_B[adapter].weight
        self.scaling = float(lora.scaling[adapter])

    def active(self) -> bool:
        """Whether this adapter, and no other, is what the layer is to add."""
        lora: Any = self.layer
        return not lora.disable_adapters and lora.active_adapters == [self.adapter]


class _FoldedForward(_AdapterForward):
    """One product with W'."""

    folded_OI: Tensor

    def plain(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if args or options or not self.active():
            return type(self.layer).forward(self.layer, x, *args, **options)
        folded: Tensor = _Folded.apply(x, self.folded_OI, self.bias_O, self.a_rI, self.b_Or, self.scaling)
        return folded

    def weights(self) -> Weights | None:
        return (self.folded_OI, self.bias_O) if self.active() else None


class _BesideForward(_AdapterForward):
    """The product with W, and the update in the same type."""

    def __init__(self, layer: LoraLinear, adapter: str, weight_OI: Tensor) -> None:
        super().__init__(layer, adapter)
        self.weight_OI = weight_OI
        self.half_a_rI = self.a_rI.to(weight_OI.dtype)
        self.sb_Or = (self.scaling * self.b_Or).to(weight_OI.dtype)

    def plain(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        if args or options or x.dtype != self.weight_OI.dtype or not self.active():
            return type(self.layer).forward(self.layer, x, *args, **options)
        copies = self.half_a_rI, self.sb_Or
        constant = self.weight_OI, self.bias_O
        out: Tensor = _Beside.apply(x, *constant, self.a_rI, self.b_Or, *copies, self.scaling)
        return out

    def by_packed(self, x: Tensor) -> Tensor:
        out: Tensor = super().by_packed(x)
        x_NI, out_NO = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        out_NO.addmm_(x_NI @ self.half_a_rI.T, self.sb_Or.T)
        return out

    def weights(self) -> Weights | None:
        return (self.weight_OI, self.bias_O) if self.active() else None


def _can_fold(layer: LoraLinear, adapter: str) -> bool:
    """Whether an adapter of a layer is a plain update of a whole matrix, float32 or bfloat16 on the CPU."""
    base: Any = layer.base_layer
    if adapter not in layer.lora_A or type(base) not in (nn.Linear, Conv1D) or hasattr(base.weight, "ds_id"):
        return False
    as_it_is = layer.fan_in_fan_out == isinstance(base, Conv1D)
    plain = as_it_is and not (layer.merged or adapter in layer.lora_variant)
    plain = plain and not layer.lora_bias.get(adapter, False)
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
    kind, own = base.weight.dtype, layer.lora_A[adapter].weight.dtype
    beside = kind == torch.bfloat16 and own == torch.float32 and base.weight.device.type == "cpu"
    return plain and dropout == 0.0 and (kind == torch.float32 or beside)
