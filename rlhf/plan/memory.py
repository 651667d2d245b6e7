"""Bytes of a process by what they are for; pure functions of sizes.

``tokens`` are those of one forward pass, padding included. What autograd keeps of a layer is counted tensor
by tensor, and held against torch's own saved tensors by tests/test_rlhf_plan_memory.py.
"""

from __future__ import annotations

from typing import NamedTuple

from rlhf.plan.shapes import BYTES, Shape

ADAMW = {"adamw": 8.0, "paged_adamw_8bit": 2.0}
"""Bytes a learning weight of the optimizer's moments."""
HEAP = 0.8
"""What the C library's heap keeps between passes on a CPU, for tensors that are small beside 32 MiB, in units
of the tensors (measured: docs/benchmarks.md); larger ones are mapped apart and leave nothing."""
_MAPPED = 2**25
_LOGITS_AT_ONCE = 2**24  # as rlhf/models/log_probs.py
_BUCKET = 500_000_000  # elements, DeepSpeed's reduce_bucket_size
_LIVE = 1_000_000_000  # elements, DeepSpeed's stage3_max_live_parameters


class Setting(NamedTuple):
    """How the weights lie on the machine."""

    dtype: str
    quantization: str
    gpu: bool
    world: int = 1
    """Processes that share the weights and states."""
    zero: int = 0
    """ZeRO stage; 0 with one process."""
    checkpointing: bool = False
    """Only the inputs of layers are kept for the backward pass."""
    offload_optimizer: bool = False
    offload_param: bool = False
    compiled: bool = False
    """Blocks run through torch.compile, which leaves adapters to peft and matrix products to torch."""

    @property
    def size(self) -> int:
        """Bytes of a number of the base's type."""
        return BYTES[self.dtype]

    @property
    def path(self) -> str:
        """How an adapter is computed: ``folded`` into float32 weights, ``beside`` bfloat16 ones on a CPU, or
        by ``peft`` (rlhf/models/folding.py)."""
        if self.quantization != "none" or self.compiled:
            return "peft"
        if self.dtype == "float32":
            return "folded" if self.zero < 3 else "peft"
        return "beside" if self.dtype == "bfloat16" and not self.gpu and self.zero < 3 else "peft"

    @property
    def packs(self) -> bool:
        """Whether sampling runs from reordered copies of the weights (rlhf/models/kernels/onednn.py)."""
        whole = self.zero < 3 and not self.compiled
        return not self.gpu and self.dtype in ("float32", "bfloat16") and whole


class Parts(NamedTuple):
    """Bytes of a process at one moment, by what they are for."""

    fixed: float = 0.0
    """Interpreter and libraries; nothing on a GPU."""
    weights: float = 0.0
    copies: float = 0.0
    """Folded or reordered copies of weights, and what ZeRO-3 gathers."""
    adapters: float = 0.0
    gradients: float = 0.0
    """With the buffers that they are reduced in."""
    optimizer: float = 0.0
    activations: float = 0.0
    kv_cache: float = 0.0
    states: float = 0.0
    """Trunk cache and probe features."""
    logits: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def matrix_bytes(shape: Shape, layers: int, setting: Setting) -> float:
    """The matrices of so many layers: int8 with a float32 scale a row, nf4 with one for 64 weights (Dettmers
    2023, without double quantization), else the base's type."""
    number = layers * shape.layer_weights()
    if setting.quantization == "int8":
        return number + 4.0 * layers * sum(o for _, o in shape.maps())
    return number * (0.5 + 4 / 64 if setting.quantization == "nf4" else setting.size)


def weights(shape: Shape, setting: Setting) -> tuple[float, float]:
    """(bytes of the base on this process, bytes that ZeRO-3 gathers beside them at most in a pass)."""
    whole = matrix_bytes(shape, shape.layers, setting) + shape.others() * setting.size
    if setting.zero < 3:
        return whole, 0.0
    own = 0.0 if setting.offload_param else whole / setting.world
    live = min(_LIVE * setting.size, whole - whole / setting.world)
    return own, live


def adapter_weights(shape: Shape, rank: int, layers: int) -> int:
    """Weights of one adapter on every linear map of so many layers: r (in + out) each (Hu 2021)."""
    return layers * rank * sum(i + o for i, o in shape.maps())


def learning(
    number: int, setting: Setting, *, moments: float = ADAMW["adamw"], bucket: int = _BUCKET
) -> tuple[float, float]:
    """(gradients, optimizer) of so many float32 weights that learn: AdamW's two moments; ZeRO 1 to 3 add a
    flat float32 copy, share it with the moments (2: and the gradients), and reduce in a bucket of their
    own."""
    if setting.zero == 0:
        return 4.0 * number, moments * number
    own = 4.0 * number / (setting.world if setting.zero > 1 else 1)
    reduced = 4.0 * bucket if setting.gpu else 4.0 * min(bucket, number)
    optimizer = 0.0 if setting.offload_optimizer else (moments + 4.0) * number / setting.world
    return own + reduced, optimizer


def folded_copies(shape: Shape, layers: int, setting: Setting) -> float:
    """Copies of the adapted matrices with the adapter in them."""
    return 4.0 * layers * shape.layer_weights() if setting.path == "folded" else 0.0


def packed_copies(shape: Shape, setting: Setting) -> float:
    """Copies of all matrices and of the vocabulary head in the order that decoding likes."""
    return setting.size * (shape.matrices() + shape.vocabulary * shape.hidden) if setting.packs else 0.0


def kept_of_layer(shape: Shape, rank: int, setting: Setting, *, length: int, mask: bool = True) -> float:
    """Bytes a token that autograd keeps of one adapted layer.

    length: tokens of a row, of which an attention mask has a number each. mask: there is one.
    """
    d, f, a, size = shape.hidden, shape.intermediate, shape.attention, setting.size
    half = size < 4
    low = len(shape.maps()) * rank
    norms = 2 * 4 * (d + 1)  # in float32, whatever the base's type
    if shape.qk_norm:
        norms += 4 * (a + shape.kv + shape.heads + shape.kv_heads)
    attention = size * 3 * a + 4 * shape.heads + (size * length if mask else 0)
    inner = size * (3 if shape.gated else 1) * f  # gate or pre-activation, its activation, the way up
    if setting.path == "peft" and half:  # every map's input again in float32, for its adapter
        inputs = 4 * (sum(i for i, _ in shape.maps()) + low) + size * a
    else:
        inputs = size * (2 * d + a + f)
        inputs += {"folded": 0, "beside": size, "peft": 4}[setting.path] * low
    return norms + attention + inner + inputs


def small(largest: float, setting: Setting) -> float:
    """The share of freed tensors that a CPU's heap keeps, the largest of which has so many bytes."""
    return 0.0 if setting.gpu else max(0.0, 1.0 - largest / _MAPPED)


def heap(largest: float, setting: Setting) -> float:
    """What passes take, in units of their tensors, of which the largest has so many bytes."""
    return 1.0 + HEAP * small(largest, setting)


def activations(
    shape: Shape, rank: int, layers: int, tokens: int, setting: Setting, *, length: int, mask: bool = True
) -> float:
    """Peak of a training pass through so many adapted layers: what is kept, and what a layer's backward pass
    needs at once. With checkpointing a layer's input is kept, and one layer at a time is whole."""
    layer = kept_of_layer(shape, rank, setting, length=length, mask=mask)
    kept = setting.size * shape.hidden * layers + layer if setting.checkpointing else layer * layers
    needed = tokens * (kept + max(2 * setting.size * shape.intermediate, 20 * shape.hidden))
    return needed * heap(tokens * shape.intermediate * setting.size, setting)


def passing(shape: Shape, tokens: int, setting: Setting, *, folds: bool = True) -> float:
    """Peak of a pass without gradients: one layer's tensors. folds: inside ``Backbone.folded``."""
    wide = setting.size * (4 * shape.intermediate + 2 * shape.hidden)
    if (setting.path == "peft" or not folds) and setting.size < 4:
        wide += 4 * shape.intermediate
    return tokens * wide * heap(tokens * shape.intermediate * setting.size, setting)


def kv_cache(shape: Shape, rows: int, room: int, setting: Setting) -> float:
    """Keys and values of all layers for so many rows with room for so many tokens each."""
    return 2.0 * setting.size * shape.layers * shape.kv * rows * room


def repeated_heads(shape: Shape, rows: int, room: int, setting: Setting) -> float:
    """One layer's keys and values, repeated for every query head while a token is decoded."""
    return 2.0 * setting.size * shape.attention * rows * room if shape.heads > shape.kv_heads else 0.0


def sampling_logits(shape: Shape, rows: int, setting: Setting) -> float:
    """Logits of one token a row: as they come, as log-probabilities, and their sum in float64."""
    return float(rows * shape.vocabulary * (setting.size + 4 + 8 + (4 if setting.size < 4 else 0)))


def training_logits(shape: Shape, positions: int, setting: Setting) -> float:
    """Logits, probabilities and one more such tensor of as many positions as are in memory at once."""
    at_once = min(positions, max(1, _LOGITS_AT_ONCE // shape.vocabulary))
    return float(at_once * shape.vocabulary * (12 + (setting.size if setting.size < 4 else 0)))
