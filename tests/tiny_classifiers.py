"""Tiny random sequence classifiers on the disk, for tests of what reads them."""

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf.models.tiny import tiny_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer_in(folder, *, template=True, pad=True, limit=None):
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    if not pad:
        tokenizer.pad_token = tokenizer.eos_token if pad is None else None
    if limit:
        tokenizer.model_max_length = limit
    tokenizer.save_pretrained(folder)
    return tokenizer


def llama(folder="model", *, labels=1, template=True, pad=True, limit=None, seed=0, **config):
    """A tiny random classifier with tokenizer.

    pad: True = a token of its own, None = EOS, False = none at all.
    """
    tokenizer = tokenizer_in(folder, template=template, pad=pad, limit=limit)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        pad_token_id={True: 0, None: 1, False: None}[pad],
        eos_token_id=1,
        bos_token_id=None,
        num_labels=labels,
        initializer_range=0.3,
        **config,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer
