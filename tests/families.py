"""Tiny random models of the families that people train, made from their configurations."""

import torch
import transformers as hf

from rlhf.models.tiny import tiny_tokenizer

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
