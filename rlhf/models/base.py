"""The base model of a recipe, quantized where the recipe asks for it, by bitsandbytes."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from rlhf.errors import UserError
from rlhf.models.onednn import use_onednn
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Model
from rlhf.runs.processes import processes
from rlhf.training.runtime import gathered

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


def vocabulary_head(recipe: Recipe, base: PreTrainedModel) -> nn.Module:
    """The frozen map from last hidden states to vocabulary logits: the base's own, a copy only where ZeRO-3
    will take its weights apart.

    A sequence classifier has none: it is the embeddings there, where the two are tied, or read from files.
    """
    apart = processes() > 1 and recipe.distributed.zero_stage == 3
    head: Any = base.get_output_embeddings()
    if head is not None:
        return copy.deepcopy(head).requires_grad_(False) if apart else head
    embedding: Any = base.get_input_embeddings().weight
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        causal: Any = load_base(recipe.model)
        return causal.get_output_embeddings().to(embedding.device)
    with gathered([embedding]):
        head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False) if apart else embedding
    return head
