"""Tokenizers of twelve families as tiny ones: their kind, special tokens and the shape of their template."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
QWEN3 = CHATML.replace(
    "{{ '<|im_start|>' + m.role + '\n' + m.content",
    "{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content",
).replace(
    "assistant\n' }}{% endif %}",
    "assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}SYSTEM{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = GEMMA.replace("SYSTEM", "{{ raise_exception('System role not supported') }}")
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def byte_level(specials, template=None, *, add_bos=False, add_eos=False, more=(), **names):
    """One token a byte, as GPT-2, Qwen and Llama 3 have it. more: added tokens that are no special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer, specials, template, add_bos=add_bos, add_eos=add_eos, more=more, **names)


def sentence_piece(
    specials, template=None, *, legacy=True, prefix=True, add_eos=False, add_bos=True, **names
):
    """Letters with a mark for the space and bytes for the rest; prefix: a mark before every text (Llama 2).

    legacy: the mark is written by a normalizer, before every piece between special tokens; else before the
    first piece only.
    """
    letters = ["▁", *map(chr, range(33, 127)), "▁H", "▁Hello", "Hello", "▁G", "▁[", "▁a"]
    tokens = [*specials, *(f"<0x{i:02X}>" for i in range(256)), *letters]
    merges = [("▁", "H"), ("▁", "G"), ("▁", "["), ("▁", "a")]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        steps = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if prefix else "never", split=False
        )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | names
    return finished(tokenizer, specials, template, add_bos=add_bos, add_eos=add_eos, **names)


def finished(tokenizer, specials, template, *, add_bos, add_eos, more=(), **names):
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    tokenizer.add_tokens([AddedToken(s, normalized=False, special=False) for s in more])
    ends = {"bos": names.get("bos_token"), "eos": names.get("eos_token")}
    single = f"{ends['bos'] + ' ' if add_bos else ''}$A{' ' + ends['eos'] if add_eos else ''}"
    used = [name for name, on in ((ends["bos"], add_bos), (ends["eos"], add_eos)) if on]
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in used]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


SPM = ["<unk>", "<s>", "</s>"]
GEMMAS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_NAMES = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "prefix": False}
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3S = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
PHI3S = [*SPM, "<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"]
BOTH = {"pad_token": "<|endoftext|>"}

FAMILIES = {  # how it is built, what ends a turn, what pads
    "llama-2": (lambda: sentence_piece(SPM, LLAMA2), "</s>", "<unk>"),
    "llama-3": (
        lambda: byte_level(
            LLAMA3S, LLAMA3, add_bos=True, bos_token=LLAMA3S[0], eos_token="<|end_of_text|>"
        ),
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
    ),
    "mistral": (lambda: sentence_piece(SPM, MISTRAL, legacy=False), "</s>", "<unk>"),
    "gemma-2": (lambda: sentence_piece(GEMMAS, GEMMA2, **GEMMA_NAMES), "<end_of_turn>", "<pad>"),
    "gemma-3": (lambda: sentence_piece(GEMMAS, GEMMA, **GEMMA_NAMES), "<end_of_turn>", "<pad>"),
    "qwen-2.5": (
        lambda: byte_level(IM, QWEN25, eos_token="<|endoftext|>", **BOTH), "<|im_end|>", "<|endoftext|>"
    ),
    "qwen-3": (
        lambda: byte_level(IM, QWEN3, eos_token="<|im_end|>", more=["<think>", "</think>"], **BOTH),
        "<|im_end|>",
        "<|endoftext|>",
    ),
    "phi-3": (
        lambda: sentence_piece(PHI3S, PHI3, add_bos=False, eos_token="<|endoftext|>", **BOTH),
        "<|end|>",
        "<|endoftext|>",
    ),
    "zephyr": (lambda: sentence_piece(SPM, ZEPHYR, pad_token="</s>"), "</s>", "<unk>"),
    "gpt-2": (
        lambda: byte_level(["<|endoftext|>"], eos_token="<|endoftext|>", bos_token="<|endoftext|>"),
        "<|endoftext|>",
        "ÿ",
    ),
    "gpt-neox": (
        lambda: byte_level(
            ["<|endoftext|>", "<|padding|>"],
            eos_token="<|endoftext|>",
            bos_token="<|endoftext|>",
            more=["  ", "    "],
        ),
        "<|endoftext|>",
        "<|padding|>",
    ),
    "smollm2": (
        lambda: byte_level(IM, QWEN25, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token=IM[0]),
        "<|im_end|>",
        "<|endoftext|>",
    ),
}  # fmt: skip
"""Each: a function that builds the tokenizer, the token that ends a turn, the token that pads."""


def family(name):
    """A tokenizer of a family, its template's name, and the recipe's padding token where it needs one."""
    build, _, pad = FAMILIES[name]
    tokenizer = build()
    return tokenizer, "chat" if tokenizer.chat_template else "plain", pad if name == "gpt-2" else None
