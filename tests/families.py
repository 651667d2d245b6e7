"""Tiny random models of the families that people train; `python tests/families.py` writes docs/models.md."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers as hf

from reward.model.forward import check_packing
from reward.model.model import new_reward_model
from rlhf.markdown import table
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.models.configuration import fault_of_config, read_config
from rlhf.models.lora import fused_share
from rlhf.models.tiny import tiny_tokenizer
from rlhf.recipe.schema import Lora, Model

IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "init_std": 0.2,
    "word_embed_proj_dim": 32,
}
WITHOUT_GROUPS = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
HEADS = {"head_dim": 8}

FAMILIES = {  # name: (class of the model, options of its configuration)
    "llama": ("Llama", SHAPE),
    "mistral": ("Mistral", {**SHAPE, "sliding_window": 16}),
    "qwen2": ("Qwen2", {**SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SHAPE, **HEADS}),
    "gemma": ("Gemma", {**SHAPE, **HEADS}),
    "gemma2": ("Gemma2", {**SHAPE, **HEADS, "sliding_window": 16, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {**SHAPE, **HEADS, "sliding_window": 16, "layer_types": WINDOWS}),
    "phi": ("Phi", SHAPE),
    "phi3": ("Phi3", SHAPE),
    "gpt2": ("GPT2LMHead", GPT),
    "gpt_neox": ("GPTNeoX", WITHOUT_GROUPS),
    "gptj": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "opt": ("OPT", OPT),
    "opt_350m": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}),
    "falcon": (
        "Falcon",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False,
         "new_decoder_architecture": False, "initializer_range": 0.2},
    ),
    "falcon_alibi": (
        "Falcon", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True}
    ),
    "stablelm": ("StableLm", SHAPE),
    "olmo2": ("Olmo2", SHAPE),
    "smollm3": ("SmolLM3", SHAPE),
    "granite": ("Granite", {**SHAPE, "logits_scaling": 6.0, "embedding_multiplier": 12.0}),
    "cohere": ("Cohere", {**SHAPE, "logit_scale": 0.0625}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16},
    ),
    "mixtral": ("Mixtral", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": ("Starcoder2", SHAPE),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}),
    "gemma3_vision": ("Gemma3", {**SHAPE, **HEADS, "sliding_window": 16, "layer_types": WINDOWS}),
}  # fmt: skip
TEXT_PART = ("gemma3_vision",)  # a text model with a vision tower beside it
REFUSED = {"bloom": "ALiBi", "falcon_alibi": "ALiBi", "mamba": "recurrent layers"}
NAMES = {  # as people know them
    "llama": "Llama 1 to 3, TinyLlama, SmolLM, SmolLM2",
    "mistral": "Mistral 7B (v0.1: sliding window)",
    "qwen2": "Qwen 2, Qwen 2.5",
    "qwen3": "Qwen 3",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 1B, 270M",
    "gemma3_vision": "Gemma 3 4B and larger: their text part",
    "phi": "Phi 1, 1.5, 2",
    "phi3": "Phi 3, Phi 4",
    "gpt2": "GPT-2, DistilGPT-2",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gptj": "GPT-J",
    "opt": "OPT",
    "opt_350m": "OPT-350m",
    "bloom": "BLOOM, BLOOMZ",
    "falcon": "Falcon 7B",
    "falcon_alibi": "Falcon-RW",
    "stablelm": "StableLM",
    "olmo2": "OLMo 2",
    "smollm3": "SmolLM3",
    "granite": "Granite 3",
    "cohere": "Command R, Aya",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "mixtral": "Mixtral",
    "starcoder2": "StarCoder 2",
    "mamba": "Mamba",
}
CONFIGS = {"GPT2LMHead": "GPT2Config", "Gemma3": "Gemma3TextConfig"}


def write_family(name, folder, tokenizer=None):
    """A model of a family, and a byte tokenizer, in a folder."""
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    kind, options = FAMILIES[name]
    if name in TEXT_PART:
        model = _with_vision_tower(len(tokenizer), options)
    else:
        config = getattr(hf, CONFIGS.get(kind, f"{kind}Config"))
        model_class = getattr(hf, f"{kind}Model" if kind == "GPT2LMHead" else f"{kind}ForCausalLM")
        model = model_class(config(vocab_size=len(tokenizer), **options, **IDS))
    model.save_pretrained(str(folder))


def _with_vision_tower(vocabulary, options):
    text = hf.Gemma3TextConfig(vocab_size=vocabulary, **options, **IDS)
    vision = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )
    return hf.Gemma3ForConditionalGeneration(config)


def row_of(name, folder):
    """What the page says of a family, found out by trying it."""
    fault = fault_of_config(read_config(folder))
    if fault is not None:
        return [NAMES[name], "refused", "", "", fault]
    model = Model(path=str(folder))
    base = load_base(model)
    share, _ = fused_share(base, 0)
    backbone = Backbone(base, Lora(rank=2, layers="top_2"), adapters=["policy"])
    trunk = backbone.check_architecture()
    ids = list(range(10, 34))
    examples = [{"prompt": ids, "responses": [[*ids[:9], 1], [*ids[5:16], 1]], "index": 0, "ranks": [0, 1]}]
    recipe = SimpleNamespace(model=model, lora=Lora(rank=2), seed=0)
    classifier = new_reward_model(recipe, SimpleNamespace(pad_id=0))
    packing = check_packing(classifier, examples, 0)
    remark = f"experts in one piece get no adapter (here {share:.0%} of the layers' weights)" if share else ""
    return [NAMES[name], "runs", *("no: " + why if why else "yes" for why in (trunk, packing)), remark]


def page(folder):
    """docs/models.md, from the families in a folder."""
    rows = sorted((row_of(name, folder / name) for name in FAMILIES), key=lambda row: row[1] == "refused")
    head = ["family", "", "frozen trunk", "shared rows", "remark"]
    return PAGE.format(families=table(head, rows), number=sum(row[1] == "runs" for row in rows))


PAGE = """# Which models can be trained

Each family below is built as a tiny random model from its configuration and taken through the whole pipeline
(comparisons, reward model, PPO, evaluation) in the tests; every role is compared with the plain model's own
logits. This page is written by `python tests/families.py` and tested to be up to date.

- *Frozen trunk*: with `lora.layers: top_k` the layers below are computed once for all roles and passes.
- *Shared rows*: responses to one prompt are read behind one copy of it. Where not, the stages say so and
  give each sequence a row of its own: slower, the same figures.

{number} families run:

{families}
What is refused is refused by every command within a second or two, from `config.json`: recurrent layers,
ALiBi, encoder-decoders, models that are no causal language models, and texts longer than the context window
(`dialogue.max_prompt_tokens + dialogue.max_response_tokens` and what closes them, `distill.max_tokens`,
`ppo.ptx_max_tokens`). A family that is not in the list is tried on a probe batch when it is loaded: what it
cannot share is switched off with a line, and logits that are changed in an unknown way are refused.

Families without a sequence classifier in transformers (Granite, Cohere) get one made of their decoder and a
linear head; another program that reads such a reward model has to make the same. Of a model with a vision
tower the text part is trained: its adapters fit the text model (`Gemma3ForCausalLM`).
"""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for each in FAMILIES:
            write_family(each, Path(scratch, each))
        Path("docs/models.md").write_text(page(Path(scratch)), encoding="utf-8")
