"""Kernels of other libraries, asked for by name: attention, and Liger's norms, rotations and MLPs.

The GPU paths have not been run on hardware; tests put stand-ins in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from rlhf.errors import UserError, first_line
from rlhf.recipe.schema import Model

NOT_LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Kernels of Liger that stay out: the losses, since log-probs are computed from chunks of states here."""


def check_kernels(model: Model) -> None:
    """Refuse kernels that the machine or the type of the weights cannot use, before anything is loaded.

    Raises:
        UserError: and what to use.
    """
    kind = model.attn_implementation
    if kind.startswith("flash"):
        if not torch.cuda.is_available():
            raise UserError(
                f"model.attn_implementation: {kind} needs a GPU, and there is none here; use auto"
            )
        if model.dtype == "float32":
            raise UserError(
                f"model.attn_implementation: {kind} computes in half types; "
                "set model.dtype=bfloat16 or use auto"
            )
    if model.use_liger_kernel:
        if not torch.cuda.is_available():
            raise UserError("model.use_liger_kernel needs a GPU, and there is none here; leave it out")
        if not is_liger_kernel_available():
            raise UserError("model.use_liger_kernel needs liger-kernel: pip install liger-kernel")


def use_liger(base: PreTrainedModel, path: str) -> None:
    """Give a base Liger's kernels for what its type has of them (Hsu 2024, arXiv 2410.10989).

    Args:
        base: the model, whose modules are changed in place.
        path: of the model, for errors.

    Raises:
        UserError: Liger has nothing for this type of model, or does not load.
    """
    kind = base.config.model_type
    try:
        known = _kinds_of_liger()
        if kind not in known:  # Liger itself would say nothing and change nothing
            raise UserError(f"model.use_liger_kernel: Liger has no kernels for {path}, which is {kind}")
        apply_liger_kernel(base, NOT_LIGER)
    except (ImportError, TypeError, AttributeError) as error:
        raise UserError(f"model.use_liger_kernel: {path}: {first_line(error)}; leave it out") from None


def _kinds_of_liger() -> dict[str, Any]:
    """The types of models that the installed Liger changes."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return dict(MODEL_TYPE_TO_APPLY_LIGER_FN)
