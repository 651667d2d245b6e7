"""What to change where a recipe does not fit: each remedy as overrides, with what it would need then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from rlhf.plan.stages import Moment
from rlhf.recipe.load import Recipe

_WORTH = 0.99  # a remedy that leaves more than this share of the need is not told


class Remedy(NamedTuple):
    """Overrides, and the largest moment under them."""

    overrides: tuple[str, ...]
    largest: Moment


Need = Callable[[Recipe], Moment]
"""The largest moment of a recipe on the machine at hand."""


def remedies(recipe: Recipe, need: Need, *, world: int) -> list[Remedy]:
    """Single changes that lower the need, the strongest first."""
    now = need(recipe).parts.total
    found = []
    for change in _changes(recipe, world):
        if (changed := _changed(recipe, change)) is not None:
            largest = need(changed)
            if largest.parts.total < _WORTH * now:
                found.append(Remedy(_overrides(change), largest))
    return sorted(found, key=lambda remedy: remedy.largest.parts.total)


def together(recipe: Recipe, need: Need, *, world: int, limit: float) -> Remedy | None:
    """The mildest changes that together fit into ``limit`` bytes: at each turn the first that helps, lengths
    and precision last; None where nothing does."""
    taken: dict[str, Any] = {}
    for _ in range(24):
        largest = need(recipe)
        if largest.parts.total <= limit:
            return Remedy(_overrides(taken), largest)
        for change in _changes(recipe, world):
            changed = _changed(recipe, change)
            if changed is not None and need(changed).parts.total < _WORTH * largest.parts.total:
                taken |= change
                recipe = changed
                break
        else:
            return None
    return None


def _changes(recipe: Recipe, world: int) -> Iterator[dict[str, Any]]:
    """Changes that a recipe has room for, from those that change no result to those that change most."""
    for section, key, least in (
        ("ppo", "micro_batch_size", 1),
        ("ppo", "rollout_batch_size", 1),
        ("evaluate", "batch_size", 1),
        ("collect", "prompts_per_batch", 1),
        *((name, "tokens_per_micro_batch", 256) for name in ("reward", "pmp", "sft", "dpo", "distill")),
    ):
        value = getattr(getattr(recipe, section), key, None)
        if isinstance(value, int) and value // 2 >= least:
            yield {f"{section}.{key}": value // 2}
    if not recipe.model.gradient_checkpointing:
        yield {"model.gradient_checkpointing": True}
    if world > 1:
        yield from _shared_by_more(recipe)
    if recipe.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if recipe.model.quantization == "none":
        yield {"model.quantization": "nf4"}
    if recipe.lora.top_k is None:
        yield {"lora.layers": "top_8"}
    for key in ("max_prompt_tokens", "max_response_tokens"):
        if (value := getattr(recipe.dialogue, key)) >= 64:
            yield {f"dialogue.{key}": value // 2}


def _shared_by_more(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Changes of what several processes share, or keep in the machine's own memory."""
    distributed = recipe.distributed
    if distributed.zero_stage < 2:
        yield {"distributed.zero_stage": 2}
    if distributed.offload_optimizer == "none" and distributed.zero_stage:
        yield {"distributed.offload_optimizer": "cpu"}
    if distributed.zero_stage < 3:
        yield {"distributed.zero_stage": 3}
    elif distributed.offload_param == "none":
        yield {"distributed.offload_param": "cpu"}


def _overrides(change: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={str(value).lower()}" for key, value in change.items())


def _changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe | None:
    """The recipe under a change; None where it is not valid so."""
    values = recipe.model_dump()
    for path, value in change.items():
        section, key = path.split(".")
        if values.get(section) is None:
            return None
        values[section][key] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError:
        return None
