"""Hidden states below the first adapted layer, computed once for all passes over the same comparisons.

With ``lora.layers: top_k`` the layers below change never: the probe, every epoch, every member of an ensemble
and the evaluation start from the same states. They are computed in batches that depend on the data alone, so
that a resumed run has the same ones bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reward.model.batch import Example, PackedComparisons, distinct, micro_batches, pack
from reward.model.forward import awkward, forward_packed, last_states
from reward.model.states import ResponseStates
from rlhf.models.packing import difference, inputs_of, tolerance
from rlhf.models.trunk_cache import keeps_trunk, trunk_bytes
from rlhf.recipe.load import Recipe
from rlhf.recipe.reward import PreferenceTraining
from rlhf.runs.processes import processes
from rlhf.training.progress import progress

_TOKENS_AT_ONCE = 2048


@torch.no_grad()
def build_trunk(
    recipe: Recipe, section: PreferenceTraining, model: Any, rows: Sequence[Example], pad_id: int, share: bool
) -> ResponseStates | None:
    """Compute the hidden states of all rows, or print why not.

    None where :func:`keeps_trunk` is false, where ZeRO-3 makes a forward pass a collective call, or where the
    architecture cannot be split.
    """
    base, top_k = model.base_model.model, recipe.lora.top_k
    if top_k is not None and processes() > 1 and recipe.distributed.zero_stage == 3:
        return None
    cut = 0 if top_k is None else max(0, base.config.get_text_config().num_hidden_layers - top_k)
    rows = distinct(rows, _TOKENS_AT_ONCE).examples
    prompts = {tuple(e["prompt"]) for e in rows}
    tokens = sum(map(len, prompts)) + sum(len(r) for e in rows for r in e["responses"])
    if not keeps_trunk(section, cut, trunk_bytes(base, tokens)):
        return None
    trunk = ResponseStates(cut)
    try:
        gap = max(
            _gap(model, [few[i] for i in batch], trunk, pad_id, share=share)
            for few in [awkward(rows)]
            for batch in micro_batches(few, _TOKENS_AT_ONCE, share=share)
        )
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError) as error:
        print(f"warning: this architecture cannot be split at layer {cut} ({error}): no trunk cache")
        return None
    if not gap <= tolerance(model):
        print(f"warning: trunk and top differ from the whole (by {gap:.2g}): no trunk cache", flush=True)
        return None
    batches = micro_batches(rows, _TOKENS_AT_ONCE, share=share)
    for batch in progress("trunk", batches):
        _read(model, [rows[i] for i in batch], trunk, pad_id, share=share)
    return trunk


def _read(
    model: Any, some: Sequence[Example], trunk: ResponseStates, pad_id: int, *, share: bool
) -> PackedComparisons:
    """Compute the states of some examples into a trunk; returns them as they were packed."""
    packed = pack(some, pad_id, share=share).to(next(model.parameters()).device)
    states_NTD = model(**inputs_of(model, packed), part="trunk", cut=trunk.cut)
    trunk.add(packed, states_NTD)
    return packed


def _gap(model: Any, few: Sequence[Example], trunk: ResponseStates, pad_id: int, *, share: bool) -> float:
    """How far the states by trunk and top are from those of the whole, in units of their length."""
    packed = _read(model, few, trunk, pad_id, share=share)
    whole, split = (last_states(packed, *forward_packed(model, packed, t)) for t in (None, trunk))
    return difference(split, whole)
