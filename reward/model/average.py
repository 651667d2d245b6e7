"""Several reward models as one: the mean of their weights, as an adapter of their ranks together.

Ramé et al. 2024, "WARM: On the Benefits of Weight Averaged Reward Models" (arXiv 2401.12187). The members
share the base; heads that begin equal (``reward.head_init: probe``) are what the paper calls linear probing.

Shape suffixes: ``_r`` rank, ``_I`` input feature, ``_O`` output feature.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from reward.model.batch import Example
from reward.model.forward import score_examples
from reward.model.model import CONFIG, TextRewardModel, load_config
from rlhf.errors import UserError
from rlhf.models.lora import WEIGHTS
from rlhf.runs.artifacts import SETTINGS, read_json, staged_folder, write_atomically, write_json
from rlhf.training.runtime import clear_zero3_init


def average(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Adapter and head whose change of the weights is the mean of the members' changes.

    With one scaling s, the mean over M members of s B_i A_i is s [B_1 ... B_M] / M times the rows of A_1 to
    A_M: an adapter of M times the rank. (The mean of the A and of the B would have other products in it.)
    All other tensors, the head, are averaged as they are.

    members: tensors by saved name, of equal names and shapes: ``lora_A`` [r, I], ``lora_B`` [O, r].
    """
    if len(members) == 1:
        return dict(members[0])
    made = {}
    for name in members[0]:
        each = [member[name] for member in members]
        if ".lora_A." in name:
            made[name] = torch.cat(each, dim=0)
        elif ".lora_B." in name:
            made[name] = torch.cat(each, dim=1) / len(each)
        else:
            made[name] = torch.stack(each).mean(dim=0)
    return made


def save_average(folders: Sequence[Path], target: Path) -> None:
    """Write the average of saved reward models as a reward model of its own, whole or not at all.

    Its offset is the mean of theirs, so that its score is the mean of theirs where the weights hardly differ.

    Raises:
        UserError: two differ in base, tokens, layers, pooling, or the shape of their adapters.
    """
    configs = [load_config(folder) for folder in folders]
    weights = [load_file(folder / WEIGHTS) for folder in folders]
    settings = [read_json(folder / SETTINGS) for folder in folders]
    for folder, config, own, made in zip(folders[1:], configs[1:], weights[1:], settings[1:], strict=True):
        what = next(
            (
                f"{name} is {getattr(configs[0], name)} and {getattr(config, name)}"
                for name in ("base", "contract", "objective", "layers", "pooling")
                if getattr(configs[0], name) != getattr(config, name)
            ),
            None,
        )
        shapes = [{name: t.shape for name, t in tensors.items()} for tensors in (weights[0], own)]
        if what is None and (shapes[0] != shapes[1] or settings[0]["lora_alpha"] != made["lora_alpha"]):
            what = "their adapters have other shapes"
        if what:
            raise UserError(
                f"ppo.ensemble=average: {folders[0]} and {folder} cannot be averaged ({what}); choose "
                "ppo.ensemble=mean, or train both with the same lora settings"
            )
    number = len(folders)
    scaled = {name: number * settings[0][name] for name in ("r", "lora_alpha")}
    offset = sum(config.offset for config in configs) / number
    gain = sum(config.gain for config in configs) / number
    with staged_folder(target) as new:
        shutil.copytree(folders[0], new, dirs_exist_ok=True)
        write_atomically(new / WEIGHTS, save(average(weights), metadata={"format": "pt"}))
        write_json(new / SETTINGS, settings[0] | scaled)
        write_json(new / CONFIG, configs[0]._replace(offset=offset, gain=gain, averaged=number).as_dict())
        shutil.rmtree(target, ignore_errors=True)


def saved_scores(folder: Path, examples: Sequence[Example], device: torch.device, *, share: bool) -> Tensor:
    """Scores of encoded responses by a saved reward model, flat, less its offset."""
    clear_zero3_init()
    made = TextRewardModel(folder, device)
    return score_examples(made.model, examples, made.dialogue.pad_id, share=share)[0]
