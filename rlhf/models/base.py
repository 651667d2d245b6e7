"""The base model of a recipe, quantized where the recipe asks for it, by bitsandbytes."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.utils import logging as hf_logging

from rlhf.errors import UserError, first_line
from rlhf.models.backbone import stack_of
from rlhf.models.kernels.compiled import compile_blocks
from rlhf.models.kernels.named import check_kernels, use_liger
from rlhf.models.kernels.onednn import use_onednn, use_short_attention
from rlhf.models.log_probs import logits_head
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Model
from rlhf.runs.processes import processes
from rlhf.training.gradient_checkpointing import checkpoint_layers
from rlhf.training.matrix_units import check_dtype
from rlhf.training.runtime import gathered

hf_logging.disable_progress_bar()
# a table of weights that are missing or too many: what is missing is refused here, in one line
_LOADING: Any = hf_logging.get_logger("transformers.modeling_utils")
_LOADING.addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


def best_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def precision_of(base: nn.Module) -> str:
    """What a base's passes are rounded to: ``int8``, which rounds activations too, or a type of floats."""
    kinds = {parameter.dtype for parameter in base.parameters()}
    if torch.int8 in kinds:
        return "int8"
    return str(max((k for k in kinds if k.is_floating_point), key=lambda k: torch.finfo(k).eps))[6:]


def quantization_config(kind: str, dtype: str) -> Any:
    """The bitsandbytes configuration of ``model.quantization`` (QLoRA, Dettmers 2023), None for ``none``.

    dtype: of ``model.dtype``, in which nf4 is unpacked and multiplied.
    """
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )


def in_float32(base: PreTrainedModel) -> PreTrainedModel:
    """A base's weights as float32, unpacked where they are quantized: what its adapters were trained on, but
    for int8, which rounds activations too. The model that was given is used up."""
    unpacked: Any = base
    if getattr(base, "hf_quantizer", None) is not None:
        unpacked = unpacked.dequantize()
    return unpacked.float()


_TEXT_PART = {  # names of a language model's weights beside a vision tower, and by itself
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


def check_kind(kind: Any, config: Any, where: str) -> None:
    """Whether an auto class has a model for a configuration; a sequence classifier is made where the family
    has none (Granite, Cohere), of its decoder and a linear head as in the others.

    where: the recipe key and the path, for the message.

    Raises:
        UserError: it has none.
    """
    if type(config) in kind._model_mapping or hasattr(config, "auto_map"):
        return
    if kind is AutoModelForSequenceClassification and type(config) in AutoModel._model_mapping:
        decoder: Any = AutoModel._model_mapping[type(config)]
        family = next(c for c in decoder.__mro__ if c is not decoder and issubclass(c, PreTrainedModel))
        name = f"{decoder.__name__.removesuffix('Model')}ForSequenceClassification"
        fields = {"config_class": type(config)}
        kind.register(
            type(config), type(name, (GenericForSequenceClassification, family), fields), exist_ok=True
        )
        return
    what = "sequence classifier" if kind is AutoModelForSequenceClassification else "causal language model"
    raise UserError(f"{where} ({config.model_type}) is no {what} that transformers knows; use another model")


def shorten(config: Any, layers: int, where: str) -> None:
    """Let a text model consist of its first ``layers`` layers: their number, and what is listed a layer.

    where: the recipe key, for the message.

    Raises:
        UserError: it has not so many.
    """
    had = int(config.num_hidden_layers)
    if layers > had:
        raise UserError(f"{where}: {layers} layers of a model that has {had}; use at most {had}")
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == had and re.search("layer|window", name):
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers  # by whatever name the family has for it


def load_base(
    model: Model, kind: Any = AutoModelForCausalLM, *, layers: int | None = None, **options: Any
) -> PreTrainedModel:
    """The base model of a recipe, on the CPU, in evaluation mode (no dropout anywhere).

    Of a model with a vision tower it is the text part, under the names of the text model.

    Args:
        model: the recipe's section.
        kind: the auto class.
        layers: how many of its layers, from the first, it consists of; None = all.
        options: fields of the model's configuration.

    Raises:
        UserError: there is no model at the path, and which target makes it; or none of this kind; or the GPU
            has no units for its type; or the model or the machine has not the kernels that are asked for.
    """
    check_dtype(model.dtype)
    check_kernels(model, gpu=torch.cuda.is_available())
    if processes() > 1 and torch.cuda.is_available():  # a quantized base loads onto the current GPU: its own
        torch.cuda.set_device(best_device())
    source = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    named = model.attn_implementation != "auto"
    try:
        whole = AutoConfig.from_pretrained(model.path, **source)
        config = whole.get_text_config()
        for name, value in options.items():
            setattr(config, name, value)
        if layers is not None:
            shorten(config, layers, "reward.layers")
        check_kind(kind, config, f"model.path: {model.path}")
        base, found = kind.from_pretrained(
            model.path,
            config=config,
            key_mapping=None if config is whole else _TEXT_PART,
            quantization_config=quantization_config(model.quantization, model.dtype),
            dtype=getattr(torch, model.dtype),
            output_loading_info=True,
            **({"attn_implementation": model.attn_implementation} if named else {}),
            **source,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error).rstrip(".")
        if named and "attention" in reason.lower():
            raise UserError(f"model.attn_implementation: {model.path}: {reason}; use auto") from None
        raise UserError(
            f"model.path: no model at {model.path} ({reason}); run `make model RECIPE=...` or check the path"
        ) from None
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("score."))
    if missing:
        raise UserError(
            f"model.path: {model.path} has no weights {missing[0]} ({len(missing)} missing), which a "
            f"{type(base).__name__} needs; get the model anew or use another"
        )
    if config is not whole:  # else it would be saved under the names beside the vision tower
        vars(base).pop("_weight_conversions", None)
    for module in base.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights at the first pass without gradients, for inference
        # only: later backward passes would lose the gradient that flows through them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    base.requires_grad_(False)
    if model.use_liger_kernel:
        use_liger(base, model.path)
    use_onednn(base)
    use_short_attention()
    decoder: Any = base.get_decoder()
    if model.compile:
        compile_blocks(getattr(decoder, stack_of(decoder)))
    if model.gradient_checkpointing:
        checkpoint_layers(decoder)
    return base.eval()


def load_in_float32(model: Model) -> PreTrainedModel:
    """A recipe's base ``in_float32``, all of it computed by torch: on any machine, and open to hooks."""
    return in_float32(load_base(model.model_copy(update={"use_liger_kernel": False, "compile": False})))


def vocabulary_head(recipe: Recipe, base: PreTrainedModel) -> nn.Module:
    """The frozen map from last hidden states to vocabulary logits: the base's own, a copy only where ZeRO-3
    will take its weights apart.

    A sequence classifier has none: it is the embeddings there, where the two are tied, or read from files.
    """
    apart = processes() > 1 and recipe.distributed.zero_stage == 3
    head: Any = base.get_output_embeddings()
    if head is not None:
        head = logits_head(base, head)
        return copy.deepcopy(head).requires_grad_(False) if apart else head
    embedding: Any = base.get_input_embeddings().weight
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        causal: Any = load_base(recipe.model)
        return logits_head(causal).to(embedding.device)
    with gathered([embedding]):
        head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta")
        head.weight = nn.Parameter(embedding.detach().clone(), requires_grad=False) if apart else embedding
    return logits_head(base, head)
