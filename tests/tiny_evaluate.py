"""A tiny random model behind the evaluations, and plain ways to compute what they say."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from rlhf.evals.model import LanguageModel
from rlhf.models.backbone import Backbone
from rlhf.models.tiny import END, PAD, START, tiny_model, tiny_tokenizer
from rlhf.recipe.schema import Lora
from rlhf.tokenization.dialogue import Dialogue


def ascii_tokenizer():
    """One token a letter of ASCII, so that whatever a random model says is text; three special tokens."""
    letters = ["Ċ", "Ġ", *map(chr, range(33, 127))]  # line end and space as byte-level tokenizers write them
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate([PAD, END, START, *letters])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[START]
    )


def bos_tokenizer():
    """The same, with a BOS before every text."""
    made = ascii_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        bos_token="<|start|>",
    )


TOKENIZER = ascii_tokenizer()
_SHAPE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
_EVERYWHERE = {"head_dim": 8, "layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None}
ARCHITECTURES = {  # configuration, and whether the model takes trees
    "gpt2": (GPT2Config(vocab_size=len(TOKENIZER), eos_token_id=1, bos_token_id=None, **_GPT2), True),
    "sliding window": (MistralConfig(**_SHAPE, sliding_window=8), False),
    "logits behind the head": (Gemma2Config(**_SHAPE, **_EVERYWHERE, final_logit_softcapping=2.0), True),
    "half precision": (LlamaConfig(**_SHAPE, dtype="bfloat16"), True),
}


def random_model(seed=0, window=4096):
    """A random Llama; its rotary positions do not end, so any window will do."""
    model = tiny_model(len(TOKENIZER), seed=seed).eval()
    model.config.max_position_embeddings = window
    return model


def language_model(seed=0, window=4096, **options):
    return LanguageModel(random_model(seed, window), TOKENIZER, **options)


def backbone_and_dialogue(*, stir, max_response_tokens, layers="top_2"):
    """A tiny backbone whose adapter `policy` has random weights, and a dialogue that now and then ends."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    dialogue = Dialogue(
        tokenizer, template="plain", max_prompt_tokens=32, max_response_tokens=max_response_tokens
    )
    dialogue.end_id = 30  # a letter that the tiny model writes now and then
    dialogue.also_end = set()
    base = tiny_model(len(tokenizer)).requires_grad_(False).eval()
    backbone = Backbone(base, Lora(rank=4, layers=layers), adapters=["policy"])
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=stir)
    return backbone, dialogue


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def log_prob(model, before, after):
    """log P(after | before) and whether after is greedy, by one plain pass over one row."""
    logp = model(input_ids=torch.tensor([[*before, *after]])).logits[0].float().log_softmax(-1)
    places = range(len(before) - 1, len(before) + len(after) - 1)
    picked = [float(logp[t, token]) for t, token in zip(places, after, strict=True)]
    best = [int(logp[t].argmax()) == token for t, token in zip(places, after, strict=True)]
    return sum(picked), all(best)


def write_rows(path, rows):
    """A jsonl file; returns its path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
