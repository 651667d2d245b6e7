"""The rungs of the ladder: small causal language models trained here from nothing, or models of others.

A rung of L layers has width 128 L and N = 196,608 L^3 weights in the matrices of its layers, as
:mod:`studies.engine.ladder` (Askell 2021 keeps width / layers = 128). The architecture is Starcoder2's:
four attention matrices of d x d and an MLP of width 4 d, 12 d^2 together as in GPT-2, with rotary positions.

Suffixes: ``_B`` row, ``_T`` token, ``_V`` vocabulary entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from rlhf.models.base import load_base
from rlhf.models.tiny import END, PAD, START
from rlhf.recipe.schema import Model
from rlhf.tokenization.dialogue import load_tokenizer
from studies.engine.ladder import HEAD_WIDTH, WIDTH_PER_LAYER
from studies.engine.training import Schedule, index_stream, train
from studies.engine.units import Settings
from studies.scaling.data.texts import Library

TOKENIZER_DOCUMENTS = 300  # that the tokenizer is trained on
WARMUP = 50  # optimiser steps


def make_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most ``size`` tokens, which puts START before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start_id = tokenizer.token_to_id(START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, start_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=START)


@lru_cache(maxsize=4)
def tokenizer_of(files: tuple[str, ...], seed: int, size: int, words: int) -> PreTrainedTokenizerFast:
    """The tokenizer of all rungs of a seed."""
    return make_tokenizer(Library(files, seed).training(TOKENIZER_DOCUMENTS, words), size)


def make_rung(layers: int, vocabulary: int, window: int, seed: int) -> Starcoder2ForCausalLM:
    """A fresh model whose initial weights depend on the arguments alone."""
    width = WIDTH_PER_LAYER * layers
    config = Starcoder2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_WIDTH,
        num_key_value_heads=width // HEAD_WIDTH,
        max_position_embeddings=window,
        initializer_range=0.02,
        sliding_window=None,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Starcoder2ForCausalLM(config)


def matrix_weights(model: PreTrainedModel) -> int:
    """N: the weights in the matrices of a model, without embeddings and vocabulary head."""
    head = model.get_output_embeddings()
    return sum(
        parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module is not head
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    )


def token_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], window: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Texts as rows of exactly ``window`` tokens, START first; longer ones are cut, shorter ones left out.

    Raises:
        ValueError: none is long enough.
    """
    rows = [tokenizer(text)["input_ids"][:window] for text in texts]
    whole = [row for row in rows if len(row) == window]
    if not whole:
        raise ValueError(f"no text has {window} tokens")
    return np.asarray(whole, dtype=np.int64)


def language_model(model: PreTrainedModel, rows_BT: Any, s: Settings) -> list[float]:
    """Train on rows of tokens; returns the loss of every step, nats a token."""
    steps = max(1, s["tokens"] // rows_BT[: s["batch"]].size)
    stream = index_stream(len(rows_BT), s["batch"], steps, np.random.default_rng([s["seed"], 1]))

    def loss(items: Any) -> torch.Tensor:
        ids_BT = torch.from_numpy(rows_BT[items])
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())

    schedule = Schedule(s["learning_rate"], steps, warmup=min(WARMUP, max(1, steps // 10)))
    losses = train(model, stream, loss, schedule)
    model.eval()
    return losses


def load(settings: Settings, weights: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a rung, frozen, and its tokenizer.

    settings: of its unit. weights: of a rung that was trained here; None = fresh ones.

    Raises:
        UserError: there is no such model.
    """
    if "model" in settings:
        return load_base(Model(path=settings["model"])), load_tokenizer(settings["model"])
    files = tuple(path for path, _ in settings["text"])
    tokenizer = tokenizer_of(files, settings["seed"], settings["vocabulary"], settings["window"])
    model = make_rung(settings["layers"], len(tokenizer), settings["window"], settings["seed"])
    model.config.name_or_path = f"rung of {settings['layers']} layers, seed {settings['seed']}"
    if weights is not None:
        load_model(model, weights)
        model.requires_grad_(False)
    return model.eval(), tokenizer
