"""What the frozen base makes of responses: the states of several layers, pooled, in one pass.

Layer l stands for a model of the base's first l layers: its state has gone through the base's last norm, as
it would be read there.

Shape suffixes: ``_L`` layer, ``_P`` pooling, ``_R`` response, flat and in order, ``_D`` hidden unit, ``_N``
row, ``_T`` token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reward.model.batch import Example, PackedComparisons, distinct, micro_batches, pack
from reward.model.forward import TOKENS_AT_ONCE, forward_packed
from rlhf.models.backbone import layers_of, stack_of
from rlhf.models.packing import inputs_of
from rlhf.models.trunk_cache import ResponseStates
from rlhf.training.progress import progress

POOLINGS = ("last token", "mean over the response")
_LAYERS = 10  # that are looked at
_BYTES = 2e9  # of all that is kept


class Features(NamedTuple):
    """Pooled states of responses."""

    last_RD: Tensor
    """Of the last layer at the last token, float32."""
    layers: list[int]
    """Numbers of the layers, ascending, 1 = the first."""
    pooled_LPRD: Tensor
    """Of these layers by each of :data:`POOLINGS`, float16."""


def spread_layers(first: int, last: int, responses: int, width: int) -> list[int]:
    """Evenly spread layers from ``first`` to ``last``, both with it, as many as their states have room for.

    responses: how many there are. width: hidden units of a layer.
    """
    room = int(_BYTES / (2 * len(POOLINGS) * max(1, responses) * width))
    number = min(last - first + 1, _LAYERS, max(1, room))
    return sorted({last - i * (last - first) // max(1, number - 1) for i in range(number)})


def pooled(hidden_NTD: Tensor, packed: PackedComparisons) -> Tensor:
    """Each response's state at its last token, and the mean over its tokens, the closing ones too: [2, R, D]
    float32."""
    rows_R, columns_R = packed.rows_B, packed.columns_B
    own_R = torch.arange(len(rows_R), device=hidden_NTD.device)
    owners = torch.full((len(hidden_NTD), int(packed.segments_NT.max()) + 1), -1, device=hidden_NTD.device)
    owners[rows_R, packed.segments_NT[rows_R, columns_R]] = own_R
    owners_NT = owners.gather(1, packed.segments_NT)
    said_NT = owners_NT >= 0
    sums_RD = torch.zeros(len(own_R), hidden_NTD.shape[-1], device=hidden_NTD.device)
    sums_RD.index_add_(0, owners_NT[said_NT], hidden_NTD[said_NT].float())
    counts_R = torch.bincount(owners_NT[said_NT], minlength=len(own_R))
    return torch.stack([hidden_NTD[rows_R, columns_R].float(), sums_RD / counts_R[:, None]])


@torch.no_grad()
def features(
    model: Any,
    examples: Sequence[Example],
    pad_id: int,
    layers: Sequence[int] = (),
    *,
    share: bool = False,
    trunk: ResponseStates | None = None,
) -> Features:
    """Read all examples once.

    Args:
        model: a reward model whose adapter changes nothing yet.
        examples: encoded comparisons; a response that several hold is read once.
        pad_id: padding token.
        layers: numbers of the layers whose states are kept; above the trunk's end, where there is a trunk.
        share: pack the responses of a prompt behind one copy of it.
        trunk: states of all examples, where they have been computed.
    """
    examples, places_R = distinct(examples, TOKENS_AT_ONCE)
    starts = [0]
    for example in examples:
        starts.append(starts[-1] + len(example["responses"]))
    device = next(model.parameters()).device
    last_RD, pooled_LPRD = torch.empty(0), torch.empty(len(layers), 0, 0, 0, dtype=torch.float16)
    for batch in progress("probe", micro_batches(examples, TOKENS_AT_ONCE, share=share)):
        packed = pack([examples[i] for i in batch], pad_id, share=share).to(device)
        hidden_NTD, found = _states(model, packed, layers, trunk)
        places = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in batch])
        if not len(last_RD):
            width = hidden_NTD.shape[-1]
            last_RD = torch.empty(starts[-1], width)
            size = (len(layers), len(POOLINGS), starts[-1], width)
            pooled_LPRD = torch.empty(size, dtype=torch.float16)
        last_RD[places] = hidden_NTD[packed.rows_B, packed.columns_B].float().cpu()
        for index, states_NTD in enumerate(found):
            limit = torch.finfo(torch.float16).max
            pooled_LPRD[index][:, places] = pooled(states_NTD, packed).clamp(-limit, limit).half().cpu()
    return Features(last_RD[places_R], list(layers), pooled_LPRD[:, :, places_R])


def _states(
    model: Any, packed: PackedComparisons, layers: Sequence[int], trunk: ResponseStates | None
) -> tuple[Tensor, list[Tensor]]:
    """The last hidden states [N, T, D], and those of some layers behind the last norm."""
    if not layers:
        return forward_packed(model, packed, trunk)[0], []
    decoder = model.base_model.model.get_decoder()
    stack = getattr(decoder, stack_of(decoder))
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            kept[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [stack[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        hidden_NTD = forward_packed(model, packed, trunk)[0]
    finally:
        for hook in hooks:
            hook.remove()
    inputs = {k: v for k, v in inputs_of(model, packed).items() if k != "input_ids"}
    found = []
    for layer in layers:
        if layer == len(stack):
            found.append(hidden_NTD)
            continue
        with layers_of(decoder, "top", layer, layer):
            states_NTD = decoder(inputs_embeds=kept.pop(layer), **inputs, use_cache=False).last_hidden_state
        found.append(states_NTD)
    return hidden_NTD, found
