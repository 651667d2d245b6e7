"""The weights of an arm: a model with low-rank adapters added for good.

W' = W + sum_i w_i s_i B_i A_i, with the model's W, and for each adapter i its low-rank pair (A_i, B_i), its
scaling s_i = alpha / r (Hu 2021; alpha / sqrt(r) where the adapter says so) and a weight w_i of the caller's.

Where a matrix is whole and float32, the sum is written into it, so that the model runs as fast as without.
Half precision would round small updates away, and a quantised matrix cannot be written to: there the low-rank
part runs beside the matrix, as it did in training.

Shape suffixes: ``_O`` output feature, ``_I`` input feature, ``_r`` rank.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError
from rlhf.runs.artifacts import SETTINGS, WEIGHTS, read_json

_EXOTIC = (  # settings of peft under which an adapter is more than a low-rank pair for each matrix
    "modules_to_save",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@torch.no_grad()
def add_adapter(model: PreTrainedModel, folder: Path, weight: float) -> int:
    """Add weight * scaling * B A of a saved adapter to a model, for good; returns the number of matrices.

    Raises:
        UserError: it is no plain LoRA adapter of a language model, or was made for another base.
    """
    if not (folder / WEIGHTS).is_file() or not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: no adapter here ({WEIGHTS} and {SETTINGS} make one); check the path")
    settings = read_json(folder / SETTINGS)
    _check_plain(settings, folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise UserError(
                f"{folder}: {name} is no part of a low-rank adapter of a language model; name a policy's "
                "folder, or merge the adapter into its model and name that"
            )
        pairs.setdefault(found[1], {})[found[2]] = tensor.float()
    if not pairs:
        raise UserError(f"{folder}: the adapter is empty; train it again")
    root = math.sqrt if settings.get("use_rslora") else float
    for name, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise UserError(f"{folder}: half of the pair for {name} is missing; the file is damaged")
        scaling = float(settings["lora_alpha"]) / root(pair["A"].shape[0])
        module = _module(model, name, (pair["B"].shape[0], pair["A"].shape[1]), folder)
        if _can_be_written(module, model):
            module.weight.addmm_(pair["B"], pair["A"], alpha=weight * scaling)
        else:
            _run_beside(module, pair["A"], pair["B"], weight * scaling)
    return len(pairs)


def _check_plain(settings: dict[str, Any], folder: Path) -> None:
    task = settings.get("task_type")
    if settings.get("peft_type") != "LORA" or task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{folder}: an adapter of kind {settings.get('peft_type')} for {task}; name a LoRA adapter of a "
            "language model (CAUSAL_LM)"
        )
    bias = ["bias"] if settings.get("bias", "none") != "none" else []
    exotic = bias + [key for key in _EXOTIC if settings.get(key)]
    if exotic:
        raise UserError(
            f"{folder}: an adapter with {', '.join(exotic)} is more than low-rank updates; merge it into its "
            "model with peft's merge_and_unload, save that, and name its folder"
        )


def _module(model: PreTrainedModel, name: str, shape: tuple[int, int], folder: Path) -> Any:
    """The linear map of that name, which must have so many output and input features."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"{folder}: {model.name_or_path} has no {name}: the adapter was made for another base"
        ) from None
    if isinstance(module, Conv1D):  # what GPT-2 calls its linear maps
        features = (module.nf, module.nx)
    elif isinstance(module, nn.Linear):
        features = (module.out_features, module.in_features)
    else:
        raise UserError(
            f"{folder}: {name} is no linear map but a {type(module).__name__}; merge it with peft"
        )
    if features != shape:
        raise UserError(
            f"{folder}: {name} is {features}, the adapter's update {shape}: it was made for another base"
        )
    return module


def _can_be_written(module: Any, model: PreTrainedModel) -> bool:
    """Whether a linear map's matrix is whole, float32, and nothing else's too (as a tied embedding is)."""
    embedding: Any = model.get_input_embeddings()
    plain = type(module) is nn.Linear and module.weight.dtype == torch.float32
    return plain and module.weight is not embedding.weight


def _run_beside(module: nn.Module, a_rI: Tensor, b_Or: Tensor, scaling: float) -> None:
    """Add scaling * B (A x) to what a module says, in the precision of A and B."""
    number = sum(name.startswith("arm_a_") for name, _ in module.named_buffers(recurse=False))
    module.register_buffer(f"arm_a_{number}", a_rI, persistent=False)  # buffers, so that they move along
    module.register_buffer(f"arm_b_{number}", b_Or, persistent=False)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        a: Any = getattr(module, f"arm_a_{number}")
        b: Any = getattr(module, f"arm_b_{number}")
        return (out + scaling * (inputs[0].to(a.dtype) @ a.T @ b.T)).to(out.dtype)

    module.register_forward_hook(add)
