"""LoRA adapters as peft shapes and saves them: the shape from a recipe, the files, and what must fit.

Files are peft's own, so any tool that knows peft can load what is trained here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.errors import UserError
from rlhf.recipe.schema import Lora
from rlhf.runs.artifacts import WEIGHTS, write_atomically
from rlhf.runs.processes import print_once

HEAD = "base_model.model.score"  # where Hugging Face's sequence classifier keeps its head, under peft


def adapted_layers(lora: Lora, layers: int, depth: int | None = None) -> range:
    """Which of a model's ``layers`` layers have an adapter, where all above the first ``depth`` are left out.

    A part that has fewer layers than ``top_k`` says is adapted whole.
    """
    top = layers if depth is None else depth
    return range(0 if lora.top_k is None else max(0, top - lora.top_k), top)


def lora_config(
    lora: Lora,
    base: PreTrainedModel,
    task: str = "CAUSAL_LM",
    *,
    depth: int | None = None,
    times: int = 1,
    **options: Any,
) -> LoraConfig:
    """peft's configuration of one adapter.

    Args:
        lora: the recipe's section.
        base: the model to be adapted.
        task: peft's task type.
        depth: number of layers, from the first, that the adapter's role consists of; None = all.
        times: the adapter has so many times the rank and alpha.
        options: further fields of peft's configuration.

    Raises:
        UserError: ``top_k`` asks for more layers than there are, or no module has the name of a target.
    """
    layers = int(base.config.get_text_config().num_hidden_layers)
    k, adapted = lora.top_k, adapted_layers(lora, layers, depth)
    # every linear map inside the layers, by its last name: peft cannot combine its `all-linear` with layers
    linear = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name)
    }
    targets = sorted(linear) if lora.targets == "all-linear" else list(lora.targets)
    unknown = sorted(set(targets) - linear)
    if unknown or not targets:
        raise UserError(
            f"lora.targets: {unknown} are no linear modules of {base.name_or_path}; "
            f"it has {', '.join(sorted(linear))}"
        )
    if depth is None and k is not None and k > layers:
        raise UserError(f"lora.layers: top_{k} of a model with {layers} layers; use `all` or a smaller k")
    transposed = {
        isinstance(module, Conv1D)
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in targets and re.search(r"\.\d+\.", name)
    }
    share, names = fused_share(base, adapted.start)
    if names:
        print_once(
            f"lora: {share:.0%} of the weights of the adapted layers are experts in one piece "
            f"({', '.join(names)}) and get no adapter"
        )
    return LoraConfig(
        r=times * lora.rank,
        lora_alpha=times * lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets,
        layers_to_transform=None if k is None and depth is None else list(adapted),
        fan_in_fan_out=transposed == {True},  # GPT-2 keeps its matrices as [I, O]
        task_type=task,
        **options,
    )


def fused_share(base: PreTrainedModel, first: int) -> tuple[float, list[str]]:
    """Share of the matrices' weights in layers from ``first`` on that lie in three-dimensional parameters, as
    experts in one piece do, which no adapter can change; and the names of those parameters in a layer."""
    total, fused, names = 0, 0, set()
    for module_name, module in base.named_modules():
        place = re.search(r"\.(\d+)\.", f"{module_name}.")
        if not place or int(place[1]) < first:
            continue
        if isinstance(module, nn.Linear):
            total += module.in_features * module.out_features  # quantized ones are stored in fewer numbers
            continue
        for name, parameter in module.named_parameters(recurse=False):
            total += parameter.numel() * (parameter.dim() > 1)
            if parameter.dim() > 2:
                fused += parameter.numel()
                names.add(f"{module_name[place.end() :]}.{name}")
    return fused / max(1, total), sorted(names)


class Switches:
    """A context in which the LoRA layers of a module run as they did when it was made: with the same adapter,
    folded in or not, whatever has been switched on since. ``requires_grad``, which peft ties to its own
    switch, stays as it is.
    """

    _NAMES = ("forward", "_active_adapter", "_disable_adapters")

    def __init__(self, module: nn.Module) -> None:
        layers = [layer.__dict__ for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
        self._states = [(layer, self._of(layer)) for layer in layers]

    def _of(self, layer: dict[str, Any]) -> dict[str, Any]:
        return {name: layer[name] for name in self._NAMES if name in layer}

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        for index, (layer, state) in enumerate(self._states):
            self._states[index] = layer, self._of(layer)
            for name in self._NAMES:
                layer.pop(name, None)
            layer.update(state)


def write_adapter(
    folder: Path, tensors: dict[str, Tensor], config: PeftConfig | None, base_name: str | None
) -> None:
    """Write whole tensors by saved name, and peft's settings; a head on its own has none."""
    whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    write_atomically(folder / WEIGHTS, save(whole, metadata={"format": "pt"}))
    if config is None:
        return
    settings = config.to_dict() | {"base_model_name_or_path": base_name, "inference_mode": True}
    for key, value in settings.items():
        if isinstance(value, set):
            settings[key] = sorted(value)
    write_atomically(folder / "adapter_config.json", json.dumps(settings, indent=2, default=str) + "\n")


@torch.no_grad()
def read_adapter(folder: Path, into: dict[str, nn.Parameter], adapter: str) -> int:
    """Read an adapter (and its head) into parameters by saved name; every tensor must find its place.

    Returns:
        Number of tensors read.

    Raises:
        UserError: a tensor is missing, superfluous or of another shape, or nothing was read: silently keeping
            a fresh adapter or a fresh head is how reward models get lost.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: no such adapter; check the folder")
    saved = load_file(file)
    bias = f"{HEAD}.bias"
    if bias in into and bias not in saved:  # Hugging Face's head has none
        saved[bias] = torch.zeros_like(into[bias])
    missing = sorted(set(into) - set(saved))
    surplus = sorted(set(saved) - set(into) - ({f"{HEAD}.weight", bias}))
    if missing or surplus:
        what = f"{missing[0]} is missing" if missing else f"{surplus[0]} has no place"
        raise UserError(
            f"{file}: does not fit the `{adapter}` adapter ({what}; {len(missing)} missing, "
            f"{len(surplus)} superfluous): it was made with other lora settings or another base"
        )
    for name, parameter in into.items():
        if parameter.shape != saved[name].shape:
            raise UserError(
                f"{file}: {name} is {tuple(saved[name].shape)}, here {tuple(parameter.shape)}: "
                "it was made with other lora settings or another base"
            )
        parameter.copy_(saved[name])
    return len(into)
