"""A base's decoder blocks by ``torch.compile`` (Ansel 2024, doi 10.1145/3620665.3640366). Not run on a GPU.

All blocks of a type share one compiled function. In it an adapter is computed as peft has it, and matrix
products and attention as torch has them: what ``rlhf.models.folding`` and ``kernels.onednn`` put in
their place cannot be traced. Names and modules stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhf.errors import UserError, first_line
from rlhf.models.kernels.onednn import leave_onednn

BACKEND = "inductor"
_VARIANTS = 64  # of a block: with and without gradients, adapters and masks; torch gives up behind 8


class Compiled:
    """Stands in the place of a block's own ``forward``."""

    def __init__(self, block: nn.Module, compiled: Any) -> None:
        self.block, self.compiled = block, compiled

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The block's output; with a key-value cache, which grows at every token, as ever.

        Raises:
            UserError: torch cannot compile the block.
        """
        if options.get("past_key_values") is not None:
            return type(self.block).forward(self.block, *args, **options)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self.compiled(self.block, *args, **options)
        except TorchDynamoException as error:
            kind = type(self.block).__name__
            raise UserError(f"model.compile: {kind}: {first_line(error)}; set model.compile=false") from None


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Have every block of a decoder compiled at its first pass, for rows of any number and length."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    found: dict[type, Any] = {}
    for block in blocks:
        kind = type(block)
        if kind not in found:
            found[kind] = torch.compile(kind.forward, dynamic=True, backend=BACKEND)
        leave_onednn(block)  # torch would compile anew for each object that it finds in a map's place
        block.__dict__["forward"] = Compiled(block, found[kind])


def is_compiled(module: nn.Module) -> bool:
    """Whether blocks inside a module are compiled, checkpointed or not."""
    return any(getattr(part.__dict__.get("forward"), "compiled", None) for part in module.modules())
