"""Gradient checkpointing: a layer that trains keeps its input alone, and runs again in the backward pass.

One more forward pass of those layers for the memory of their activations (Chen 2016, arXiv 1604.06174). The
same operations on the same numbers, so gradients are equal bit for bit where the kernels are deterministic,
as on a CPU. Hugging Face's own switch works in training mode only; here PPO and distillation train a model in
evaluation mode.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf.models.backbone import stack_of
from rlhf.models.lora import Switches


class _Checkpointed:
    """Stands in the place of a layer's own ``forward``."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.compiled: Any = layer.__dict__.get("forward")  # rlhf.models.kernels.compiled

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The layer's output; with its activations kept where nothing would be saved by leaving them."""
        plain = self.compiled or functools.partial(type(self.layer).forward, self.layer)
        if not self._trains(args) or options.get("past_key_values") is not None:  # a second run would add
            return plain(*args, **options)
        switches = Switches(self.layer)
        return checkpoint(
            plain,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), switches),
            **options,
        )

    def _trains(self, inputs: tuple[Any, ...]) -> bool:
        """Whether a gradient flows through the layer; below the first one that learns none does."""
        return torch.is_grad_enabled() and (
            any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
            or any(p.requires_grad for p in self.layer.parameters())
        )


def checkpoint_layers(decoder: nn.Module) -> None:
    """Have every layer of a decoder checkpointed from now on in passes in which it trains.

    Passes without gradients, a frozen trunk's and those with a key-value cache run as ever.
    """
    for layer in getattr(decoder, stack_of(decoder)):
        layer.__dict__["forward"] = _Checkpointed(layer)
