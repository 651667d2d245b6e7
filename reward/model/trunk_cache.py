"""Hidden states below the first adapted layer, computed once for all passes over the same comparisons.

With ``lora.layers: top_k`` the layers below change never: the probe, every epoch, every member of an ensemble
and the evaluation start from the same states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reward.model.batch import Example, distinct, micro_batches, pack
from reward.model.forward import awkward
from rlhf.models.trunk_cache import ResponseStates, response_states
from rlhf.recipe.load import Recipe
from rlhf.recipe.reward import PreferenceTraining

_TOKENS_AT_ONCE = 2048


def build_trunk(
    recipe: Recipe, section: PreferenceTraining, model: Any, rows: Sequence[Example], pad_id: int, share: bool
) -> ResponseStates | None:
    """The hidden states of all rows (:func:`rlhf.models.trunk_cache.response_states`), or None."""
    rows = distinct(rows, _TOKENS_AT_ONCE).examples
    prompts = {tuple(e["prompt"]) for e in rows}
    tokens = sum(map(len, prompts)) + sum(len(r) for e in rows for r in e["responses"])
    return response_states(
        recipe, section, model, tokens, rows, awkward(rows),
        lambda some: micro_batches(some, _TOKENS_AT_ONCE, share=share),
        lambda batch: pack(batch, pad_id, share=share),
    )  # fmt: skip
