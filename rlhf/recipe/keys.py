"""The keys of a recipe: which there are, which there were, and the answer to one that there is not."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from rlhf.recipe.quick import QUICK
from rlhf.recipe.schema import Recipe

MOST_LISTED = 12  # keys, of a line

RENAMED = {
    "collect.comparisons": "collect.prompts",
    "distill.teacher_file": "distill.teacher_cache",
    "distill.warmup": "distill.warmup_steps",
    "evaluate.samples": "evaluate.samples_per_prompt",
    "pmp.centring": "pmp.center_rewards_coef",
    "pmp.comparisons": "pmp.limit",
    "pmp.warmup": "pmp.warmup_ratio",
    "ppo.clip": "ppo.clip_range",
    "ppo.kl_control": "ppo.kl_controller",
    "ppo.kl_horizon": "ppo.kl_controller_horizon",
    "ppo.kl_target": "ppo.kl_controller_target",
    "ppo.max_bad_updates": "ppo.max_nonfinite_updates",
    "ppo.retokenise": "ppo.retokenize",
    "ppo.samples": "ppo.samples_per_prompt",
    "ppo.score_normalisation": "ppo.score_normalization",
    "ppo.stop_kl": "ppo.target_kl",
    "ppo.value_clip": "ppo.value_clip_range",
    "ppo.warmup": "ppo.warmup_steps",
    "reward.centring": "reward.center_rewards_coef",
    "reward.comparisons": "reward.limit",
    "reward.warmup": "reward.warmup_ratio",
    "sft.judged": "sft.eval_samples",
    "sft.warmup": "sft.warmup_ratio",
    "tax.arms": "tax.variants",
    "tax.humaneval.samples": "tax.humaneval.samples_per_prompt",
    "tax.others": "tax.models",
    "tax.pieces": "tax.cache",
    "tax.tokens_at_once": "tax.tokens_per_batch",
    "tax.toxicity.samples": "tax.toxicity.samples_per_prompt",
}
"""Present name of every key that had another one, by its former path."""

REMOVED = {"ppo.check_invariants": "remove it: the invariants are checked on every run"}
"""Keys that are gone, and why."""

FORMER = {**{key: f"it is called {present} now" for key, present in RENAMED.items()}, **REMOVED}
"""What to say of a key that was valid once."""


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted path of every field of a recipe, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        section = _section(field.annotation)
        if section is not None:
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def class_at(path: Sequence[int | str]) -> tuple[type[BaseModel] | None, bool]:
    """The class of the section that a path leads to, and whether that is, or lies in, an item of a list.

    An entry of a mapping, under a name of its own, is an item too. None where there is no section.
    """
    model: type[BaseModel] | None = Recipe
    item: type[BaseModel] | None = None
    within = False
    for part in path:
        if item is not None:
            model, item, within = item, None, True
            continue
        field = model.model_fields.get(str(part)) if model else None
        model = _section(field.annotation) if field else None
        if field and model is None:
            item = next(filter(None, map(_section, typing.get_args(field.annotation))), None)
    return model, within


def is_list(path: Sequence[str]) -> bool:
    """Whether a path leads to a list."""
    model, _ = class_at(path[:-1])
    field = model.model_fields.get(path[-1]) if model and path else None
    return field is not None and typing.get_origin(field.annotation) is list


def unknown_key(path: Sequence[int | str]) -> str:
    """What to say of a key that is none: the nearest one, or those that are valid in its place."""
    key = ".".join(map(str, path))
    *before, last = map(str, path)
    section = ".".join(before)
    place, within = class_at(path[:-1])
    if within and place is not None:
        names = list(place.model_fields)
        near = difflib.get_close_matches(last, names, n=1, cutoff=0.6)
        remedy = f"did you mean {section}.{near[0]}?" if near else f"valid keys: {', '.join(names)}"
        return f"unknown key {key}; {remedy}"
    keys = [*known_keys(), QUICK]
    leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    near = near or [leaves[m] for m in difflib.get_close_matches(last, leaves, n=1, cutoff=0.6)]
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    listed = f"valid keys: {', '.join(siblings)}"
    if len(siblings) > MOST_LISTED:
        field = Recipe.model_fields.get(before[0]) if before else None
        home = ((field and _section(field.annotation)) or Recipe).__module__.replace(".", "/")
        listed = f"{section or 'a recipe'} has {len(siblings)} keys, listed in {home}.py"
    return f"unknown key {key}; {f'did you mean {near[0]}?' if near else listed}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section class behind a field's annotation, if it is one."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
