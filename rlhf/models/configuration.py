"""What a model's ``config.json`` tells before anything is loaded: whether it can be trained here at all.

Nothing is imported for it, so that a base which cannot work ends a command within a second, and not in the
middle of PPO after hours of other stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.errors import UserError

STATE_SPACE = (
    "it has recurrent layers, whose state cannot skip the padding or be shared between responses; use a "
    "model with attention in every layer"
)
ALIBI = (
    "it works its positions out of the padding mask (ALiBi), which packed rows and shared prompts replace; "
    "use a model with rotary or learned positions"
)
_RECURRENT = {
    *("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "zamba", "zamba2", "bamba", "rwkv", "xlstm"),
    *("recurrent_gemma", "nemotron_h", "granitemoehybrid", "lfm2", "lfm2_moe", "minimax", "kimi_linear"),
    *("qwen3_next", "olmo_hybrid", "bailing_hybrid"),
}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def read_config(folder: str | Path) -> dict[str, Any] | None:
    """A model folder's configuration, its text part where it has several; None where there is no folder.

    Raises:
        UserError: the file is no JSON object.
    """
    file = Path(folder).expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{file} is damaged: not JSON; get the model anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: no JSON object; get the model anew")
    text = found.get("text_config")
    return {**found, **text, "architectures": found.get("architectures")} if isinstance(text, dict) else found


def safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors (``dtype``, ``shape``, ``data_offsets``) by name, and the
    place that the offsets count from.

    Raises:
        ValueError: it has no such header.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        tensors = json.loads(opened.read(min(length, 100 << 20)))
    if not isinstance(tensors, dict):
        raise ValueError("the header is no JSON object")
    tensors.pop("__metadata__", None)
    return tensors, 8 + length


def fault_of_config(config: dict[str, Any]) -> str | None:
    """Why a model cannot be trained here, and what to do; None where nothing speaks against it."""
    kind, named = str(config.get("model_type")), config.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder; use a causal language model"
    if names and not config.get("auto_map") and not any(name.endswith(_CAUSAL) for name in names):
        return f"it is a {names[0]}, not a causal language model; use one that ends with ForCausalLM"
    layers = config.get("layer_types")
    recurrent = kind in _RECURRENT
    if isinstance(layers, list) and layers:  # Granite 4 has models with and without such layers
        recurrent = not {str(layer) for layer in layers} <= _ATTENTION
    if recurrent:
        return STATE_SPACE
    if kind in ("bloom", "mpt") or config.get("alibi"):
        return ALIBI
    return None


def context_window(config: dict[str, Any]) -> int | None:
    """Tokens that a model can read, None where its configuration does not say."""
    for name in _WINDOWS:
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    return None


def check_base(path: str, lengths: dict[str, int], key: str = "model.path") -> None:
    """Refuse a base that cannot be trained, or texts that are longer than it reads.

    Args:
        path: folder of the model; what is none (a hub id) is looked at when it is loaded.
        lengths: tokens of the longest sequence, by the recipe keys that set it.
        key: the recipe key of the path, for messages.

    Raises:
        UserError: and what to use instead.
    """
    config = read_config(path)
    if config is None:
        return
    fault = fault_of_config(config)
    if fault is not None:
        raise UserError(f"{key}: {path} ({config.get('model_type')}) cannot be trained here: {fault}")
    window = context_window(config)
    for keys, tokens in lengths.items():
        if window is not None and tokens > window:
            raise UserError(
                f"{keys}: up to {tokens} tokens, and the model at {path} reads {window}; lower it"
            )
