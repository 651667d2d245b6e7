"""The adapter that an intervention leaves on a rung, the folder of its loop, and tokens."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.backbone import Backbone
from rlhf.models.base import best_device
from rlhf.recipe.schema import Lora
from rlhf.tokenization.special_tokens import special_start
from studies.engine.units import Settings

ADAPTER = "policy"


def backbone_of(model: PreTrainedModel, s: Settings, *, value: bool = False) -> Backbone:
    """A frozen rung with a fresh adapter ``policy``, and a value beside where PPO wants one."""
    torch.manual_seed(s["seed"])
    adapters = [ADAPTER, "value"] if value else [ADAPTER]
    backbone = Backbone(
        model,
        Lora(rank=s["rank"], alpha=s["alpha"]),
        adapters=adapters,
        heads=adapters[1:],
        trainable=adapters,
    )
    backbone.zero_heads()
    return backbone.to(best_device())


def save_adapter(backbone: Backbone, file: Path) -> None:
    """Write the adapter."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in backbone.parameters_of(ADAPTER).items()}
    save_file(tensors, file)


@torch.no_grad()
def load_adapter(backbone: Backbone, file: Path) -> None:
    """Read the adapter that :func:`save_adapter` wrote; every tensor must be there."""
    saved = load_file(file)
    for name, parameter in backbone.parameters_of(ADAPTER).items():
        parameter.copy_(saved[name])


@contextlib.contextmanager
def quiet_folder(folder: Path) -> Iterator[None]:
    """A new folder for what a training loop writes, gone at the end; what it prints is dropped."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    shutil.rmtree(folder)


def lead_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before every text: what the tokenizer puts there, else BOS, else EOS."""
    one = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return special_start(tokenizer) or [int(one)]


def bare_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text alone."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
