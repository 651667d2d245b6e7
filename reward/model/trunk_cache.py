"""Hidden states below the first adapted layer, computed once for all passes over the same comparisons.

With ``lora.layers: top_k`` the layers below change never: the probe, every epoch, every member of an ensemble
and the evaluation start from the same states. They are computed in batches that depend on the data alone, so
that a resumed run has the same ones bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reward.model.batch import Example, Packed, Trunk, micro_batches, pack, rows_of, width
from reward.model.forward import dtype_of, forward_packed, inputs_of
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import processes
from rlhf.training.progress import progress

_TOKENS_AT_ONCE = 2048
_PROBED = 2  # examples on which trunk + top are compared with the whole
_TOLERANCE = 1e-3  # between the scores of trunk + top and of the whole, in units of their size


@torch.no_grad()
def build_trunk(
    recipe: Recipe, model: Any, examples: Sequence[Example], pad_id: int, *, share: bool, gigabytes: float
) -> Trunk | None:
    """Compute the trunk of all examples, or say why not.

    None where all layers are adapted, where the states would need more than ``gigabytes`` of memory, where
    ZeRO-3 makes a forward pass a collective call, or where the architecture cannot be split.
    """
    config = model.base_model.model.config.get_text_config()
    if recipe.lora.top_k is None or (processes() > 1 and recipe.distributed.zero_stage == 3):
        return None
    cut = config.num_hidden_layers - recipe.lora.top_k
    tokens = sum(width(e, share) * rows_of(e, share) for e in examples)
    needed = tokens * config.hidden_size * dtype_of(model).itemsize / 1e9
    if not cut or needed > gigabytes:
        if cut:
            print(
                f"trunk: {needed:.1f} GB of states are over the limit; computed anew at every pass",
                flush=True,
            )
        return None
    trunk = Trunk(cut, {})
    few = sorted(examples, key=lambda e: width(e, share) * rows_of(e, share))[:_PROBED]  # cheap to read twice
    try:
        gap = _gap(model, few, trunk, pad_id, share=share)
    except (AttributeError, TypeError, RuntimeError) as error:
        print(f"warning: this architecture cannot be split at layer {cut} ({error}): no trunk cache")
        return None
    if gap > _TOLERANCE:
        print(f"warning: trunk and top differ from the whole (by {gap:.2g}): no trunk cache", flush=True)
        return None
    batches = micro_batches(examples, _TOKENS_AT_ONCE, share=share)
    for batch in progress("trunk", batches):
        _read(model, [examples[i] for i in batch], trunk, pad_id, share=share)
    return trunk


def _read(model: Any, some: Sequence[Example], trunk: Trunk, pad_id: int, *, share: bool) -> Packed:
    """Compute the states of some examples into a trunk; returns them as they were packed."""
    packed = pack(some, pad_id, share=share).to(next(model.parameters()).device)
    states_NTD = model(**inputs_of(model, packed), cut=trunk.cut)
    lengths = (packed.segments_NT > 0).sum(-1).tolist()
    rows = iter(s[:n].cpu().clone() for s, n in zip(states_NTD, lengths, strict=True))
    trunk.rows.update({e["index"]: [next(rows) for _ in range(rows_of(e, share))] for e in some})
    return packed


def _gap(model: Any, few: Sequence[Example], trunk: Trunk, pad_id: int, *, share: bool) -> float:
    """How far the scores by trunk and top are from those of the whole, in units of their size."""
    packed = _read(model, few, trunk, pad_id, share=share)
    whole, split = forward_packed(model, packed)[1], forward_packed(model, packed, trunk)[1]
    exact = dtype_of(model) == torch.float32
    scale = max(1.0, float(whole.abs().max())) * (1 if exact else 100)
    return float((whole - split).abs().max()) / scale
