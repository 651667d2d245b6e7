"""The base model of a recipe, quantized where the recipe asks for it, by bitsandbytes."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from rlhf.errors import UserError
from rlhf.models.onednn import use_onednn
from rlhf.recipe.schema import Model

hf_logging.disable_progress_bar()


def best_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def quantization_config(kind: str) -> Any:
    """The bitsandbytes configuration of ``model.quantization`` (QLoRA, Dettmers 2023), None for ``none``."""
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def load_base(model: Model, kind: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """The base model of a recipe, on the CPU, in evaluation mode (no dropout anywhere).

    Raises:
        UserError: there is no model at the path, and which target makes it.
    """
    config = quantization_config(model.quantization)
    if config is not None:
        options["quantization_config"] = config
    try:
        base = kind.from_pretrained(
            model.path,
            dtype=getattr(torch, model.dtype),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path: no model at {model.path} ({reason}); run `make model RECIPE=...` or check the path"
        ) from None
    for module in base.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights at the first pass without gradients, for inference
        # only: later backward passes would lose the gradient that flows through them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    use_onednn(base)
    return base.eval()
