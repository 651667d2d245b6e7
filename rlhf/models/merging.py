"""A model with saved adapters added for good, each by its weight w_i: W' = W + sum_i w_i s_i B_i A_i.

Where every adapted matrix is whole and float32 the sum is written into it, so that the model runs as fast as
without. Half precision would round small updates away, a quantized matrix cannot be written to, and one that
is the embedding too must not be: there peft's layers stay, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from rlhf.errors import UserError
from rlhf.runs.artifacts import SETTINGS, WEIGHTS

_BEYOND = ("bias", "modules_to_save", "trainable_token_indices", "layer_replication")
"""peft's settings by which an adapter changes more than the maps that it is scaled in."""


def with_adapters(model: PreTrainedModel, adapters: Sequence[tuple[str | Path, float]]) -> PreTrainedModel:
    """The model with these saved adapters, (folder, weight) each; the model that was given is used up.

    Any LoRA adapter of a language model can be added as it is (DoRA and the like too); only a plain sum of
    low-rank updates can be weighted or added to another.

    Raises:
        UserError: it is no such adapter, it does not fit the model, or it cannot be weighted.
    """
    if not adapters:
        return model
    peft: Any = None
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (folder, weight) in zip(names, adapters, strict=True):
        config = _config_of(Path(folder))
        try:
            peft = peft or get_peft_model(model, config, adapter_name=name)
            loaded = peft.load_adapter(str(folder), adapter_name=name)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: made for another base than {model.name_or_path} ({reason})") from None
        for keys, fault in ((loaded.missing_keys, "is missing"), (loaded.unexpected_keys, "has no place")):
            if keys:
                raise UserError(
                    f"{folder}: {keys[0]} {fault}: the file is damaged, or was made for another base than "
                    f"{model.name_or_path}"
                )
        if len(adapters) > 1 or weight != 1:
            _check_linear(peft, config, name, folder)
            for layer in _layers(peft):
                layer.set_scale(name, weight)
    if all(_can_be_written(layer, model) for layer in _layers(peft)):
        merged: PreTrainedModel = peft.merge_and_unload(adapter_names=names)
        return merged
    if len(names) > 1:
        peft.base_model.set_adapter(names, inference_mode=True)
    return peft.get_base_model()


def _layers(peft: Any) -> list[LoraLayer]:
    return [module for module in peft.modules() if isinstance(module, LoraLayer)]


def _config_of(folder: Path) -> LoraConfig:
    if not (folder / WEIGHTS).is_file() or not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: no adapter here ({WEIGHTS} and {SETTINGS} make one); check the path")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / SETTINGS}: not the settings of an adapter ({error})") from None
    if not isinstance(config, LoraConfig) or config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{folder}: an adapter of kind {getattr(config.peft_type, 'value', None)} for "
            f"{config.task_type}; name a LoRA adapter of a language model (CAUSAL_LM)"
        )
    return config


def _check_linear(peft: Any, config: LoraConfig, name: str, folder: str | Path) -> None:
    beyond = [key for key in _BEYOND if getattr(config, key) not in (None, "none", [])]
    beyond += sorted({type(m.lora_variant[name]).__name__ for m in _layers(peft) if name in m.lora_variant})
    if beyond:
        raise UserError(
            f"{folder}: an adapter with {', '.join(beyond)} is more than low-rank updates, so there is "
            "nothing between it and another model; leave it out of tax.interpolate"
        )


def _can_be_written(layer: Any, model: PreTrainedModel) -> bool:
    """Whether a layer's matrix is whole, float32, and no tied embedding."""
    weight = layer.get_base_layer().weight
    ends: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = ends[0] is not None and ends[1] is not None and ends[0].weight is ends[1].weight
    return weight.dtype == torch.float32 and not (tied and weight is ends[0].weight)
