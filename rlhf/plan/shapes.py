"""The shape of a language model: from its ``config.json`` and the headers of its safetensors files, or from
published figures where the model is not in place. Nothing is loaded.

A decoder of the Llama kind is taken for granted (RMSNorm, rotary positions, grouped-query attention, a gated
MLP); of another family the sizes are right and the activations an approximation.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.errors import UserError
from rlhf.models.configuration import read_config, safetensors_header
from rlhf.recipe.schema import Model

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Shape(NamedTuple):
    """Sizes of a decoder and of its vocabulary head."""

    layers: int
    hidden: int
    intermediate: int
    """Of the MLP; of a mixture of experts, of those that one token goes through."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """The vocabulary head is the embedding."""
    gated: bool = True
    """The MLP has a gate beside its way up."""
    qk_norm: bool = False
    """Queries and keys are normalized a head, as in Qwen3."""
    experts: int = 1
    """MLPs of a layer that lie in memory, for each that a token goes through."""

    @property
    def attention(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    def maps(self) -> list[tuple[int, int]]:
        """(in, out) of every linear map of a layer."""
        d, f = self.hidden, self.intermediate
        up = [(d, f)] * (2 if self.gated else 1)
        return [(d, self.attention), (d, self.kv), (d, self.kv), (self.attention, d), *up, (f, d)]

    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        mlp = self.hidden * self.intermediate * (3 if self.gated else 2)
        return sum(i * o for i, o in self.maps()) + (self.experts - 1) * mlp

    def matrices(self) -> int:
        """Weights of the matrices of all layers: what an adapter changes and bitsandbytes quantizes."""
        return self.layers * self.layer_weights()

    def others(self) -> int:
        """All other weights: embeddings, vocabulary head, norms."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return (2 - self.tied) * self.vocabulary * self.hidden + self.layers * norms + self.hidden

    def first(self, layers: int) -> Shape:
        """The shape of the first so many layers."""
        return self._replace(layers=min(layers, self.layers))


class Known(NamedTuple):
    """A shape and where it comes from."""

    shape: Shape
    origin: str
    """In words, for the report."""
    stored: int = 0
    """Bytes of the weight files, 0 where they are not in place."""
    stored_dtype: str = ""
    """The type of most of them, as the recipe calls it."""


# Sources: config.json of each repository on the Hugging Face hub.
PUBLISHED = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "smollm2-360m": Shape(32, 960, 2560, 15, 5, 64, 49152, tied=True),
    "smollm2-1.7b": Shape(24, 2048, 8192, 32, 32, 64, 49152, tied=True),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128, 128256, tied=True),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, tied=False),
    "llama-3.1-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, tied=False),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151936, tied=True, qk_norm=True),
    "qwen3-1.7b": Shape(28, 2048, 6144, 16, 8, 128, 151936, tied=True, qk_norm=True),
    "qwen3-4b": Shape(36, 2560, 9728, 32, 8, 128, 151936, tied=True, qk_norm=True),
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8, 128, 151936, tied=False, qk_norm=True),
    "qwen3-14b": Shape(40, 5120, 17408, 40, 8, 128, 151936, tied=False, qk_norm=True),
    "qwen3-32b": Shape(64, 5120, 25600, 64, 8, 128, 151936, tied=False, qk_norm=True),
}
_ALIKE = {"llama-3-8b": "llama-3.1-8b", "llama-3-70b": "llama-3.1-70b", "llama-3.3-70b": "llama-3.1-70b"}
_TINY = Shape(3, 32, 64, 4, 2, 8, 259, tied=True)  # rlhf/models/tiny.py


def shape_of(model: Model) -> Known:
    """The shape of a recipe's base: its folder's, the hub's cache's, a published one.

    Raises:
        UserError: nothing is known of it.
    """
    places = (Path(model.path).expanduser(), "in place"), (_cached(model), "in the hub's cache")
    for folder, where in places:
        config = None if folder is None else read_config(folder)
        if folder is not None and config is not None:
            stored, kind = stored_weights(folder)
            return Known(from_config(config, str(folder)), f"{folder}/config.json ({where})", stored, kind)
    if model.source == "random":
        return Known(_TINY, "the tiny random model that `make model` makes")
    name = model.path.rstrip("/").rpartition("/")[2].lower()
    for ending in ("-instruct", "-base", "-it", "-chat"):
        name = name.removesuffix(ending)
    name = name.removeprefix("meta-").replace("meta-", "")
    name = _ALIKE.get(name, name)
    if name not in PUBLISHED:
        raise UserError(
            f"model.path: {model.path} is not in place and its shape is not known here: run `make model "
            "RECIPE=...`, or let model.path name a folder that holds its config.json "
            f"(shapes known: {', '.join(PUBLISHED)})"
        )
    return Known(PUBLISHED[name], f"published shape of {name}")


def from_config(config: dict[str, Any], where: str) -> Shape:
    """The shape that a configuration (its text part) says.

    where: for the message.

    Raises:
        UserError: a size is missing.
    """

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return int(config[name])
        if default is None:
            raise UserError(f"{where}: config.json has no {names[0]}; use another model, or plan: off")
        return default

    hidden = size("hidden_size", "n_embd")
    heads = size("num_attention_heads", "n_head")
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=1)
    used = min(experts, size("num_experts_per_tok", "top_k", default=1))
    wide = size("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    kind = str(config.get("model_type"))
    return Shape(
        layers=size("num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=wide if experts == 1 else used * size("moe_intermediate_size", default=wide),
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_dim=size("head_dim", default=hidden // heads),
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", kind in ("gpt2", "opt", "gemma", "gemma2"))),
        gated=kind not in ("gpt2", "opt", "gpt_neox", "phi", "starcoder2"),
        qk_norm=kind in ("qwen3", "qwen3_moe", "olmo2", "gemma3_text"),
        experts=max(1, experts // used),
    )


def stored_weights(folder: Path) -> tuple[int, str]:
    """Bytes of a model's safetensors files by their headers, and the type of most of them; (0, "") where
    there are none."""
    sizes: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors, _ = safetensors_header(file)
        except (OSError, ValueError):
            raise UserError(f"{file} is damaged: no safetensors header; get the model anew") from None
        for tensor in tensors.values():
            begin, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] += end - begin
    if not sizes:
        return 0, ""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return sizes.total(), names.get(max(sizes, key=lambda kind: sizes[kind]), "")


def _cached(model: Model) -> Path | None:
    """The newest snapshot of a hub id that holds a configuration in the Hugging Face cache."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
    found = (cache / f"models--{model.path.replace('/', '--')}").glob("snapshots/*/config.json")
    return max((file.parent for file in found), key=lambda place: place.stat().st_mtime, default=None)
