"""Kernels of other libraries, asked for by name: attention, and Liger's norms, rotations and MLPs.

The GPU paths have not been run on hardware; tests put stand-ins in their place. No torch before a base is
there, so that what cannot be is told at once.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError, first_line
from rlhf.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_LIGER = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Kernels of Liger that stay out: the losses, since log-probs are computed from chunks of states here."""
_FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def check_kernels(model: Model, *, gpu: bool, elsewhere: bool = False) -> None:
    """Refuse kernels that a machine or the type of the weights cannot use, before anything is loaded.

    Args:
        model: the recipe's section, its type chosen.
        gpu: whether the machine has one.
        elsewhere: it is another machine, so that packages that are not here do not count.

    Raises:
        UserError: and what to use.
    """

    def lacks(*packages: str) -> bool:
        return not elsewhere and all(find_spec(package) is None for package in packages)

    kind = model.attn_implementation
    if kind in _FLASH:
        where = f"model.attn_implementation: {kind}"
        if not gpu:
            raise UserError(f"{where} needs a GPU, and there is none here; use auto")
        if model.dtype == "float32":
            raise UserError(f"{where} computes in half types; set model.dtype=bfloat16 or use auto")
        if lacks(_FLASH[kind], "kernels"):  # transformers takes it from either
            raise UserError(f"{where} needs {_FLASH[kind]}, which is not installed; use auto")
    if model.use_liger_kernel:
        if not gpu:
            raise UserError("model.use_liger_kernel needs a GPU, and there is none here; leave it out")
        if lacks("liger_kernel"):
            raise UserError("model.use_liger_kernel needs liger-kernel: pip install liger-kernel")
    if model.compile:
        compiler = os.environ.get("CXX", "g++")  # as torch has it
        if not gpu and not shutil.which(compiler):
            raise UserError(
                f"model.compile needs {compiler}, a C++ compiler: install it, or leave compile out"
            )
        if gpu and lacks("triton"):
            raise UserError("model.compile needs triton on a GPU: pip install triton, or leave compile out")


def use_liger(base: PreTrainedModel, path: str) -> None:
    """Give a base Liger's kernels for what its type has of them (Hsu 2024, arXiv 2410.10989).

    Args:
        base: the model, whose modules are changed in place.
        path: of the model, for errors.

    Raises:
        UserError: Liger has nothing for this type of model, or does not load.
    """
    from transformers.integrations.liger import apply_liger_kernel

    kind = base.config.model_type
    try:
        if kind not in _kinds_of_liger():  # Liger itself would say nothing and change nothing
            raise UserError(f"model.use_liger_kernel: Liger has no kernels for {path}, which is {kind}")
        apply_liger_kernel(base, NOT_LIGER)
    except (ImportError, TypeError, AttributeError) as error:
        raise UserError(f"model.use_liger_kernel: {path}: {first_line(error)}; leave it out") from None


def _kinds_of_liger() -> dict[str, Any]:
    """The types of models that the installed Liger changes."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return dict(MODEL_TYPE_TO_APPLY_LIGER_FN)
