"""Recipes stored in run folders by earlier versions, under the present keys."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf.recipe.keys import REMOVED, RENAMED, known_keys
from rlhf.recipe.schema import Recipe


def modernized(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe, or some sections of one, as this version would have stored it.

    Renamed keys get their present names, removed ones go, and keys that the version did not have yet get
    their defaults, which keep what was done before. A section that is not valid today is only renamed.
    """
    recipe = copy.deepcopy(stored)
    known = set(known_keys())
    for former in (RENAMED.keys() | REMOVED.keys()) - known:
        section, key = _section_of(recipe, former)
        if isinstance(section, dict) and key in section:
            value = section.pop(key)
            if former in RENAMED:
                section[RENAMED[former].rpartition(".")[2]] = value
    pmp = recipe.get("pmp")
    if isinstance(pmp, dict) and pmp.get("form") == "binarised":
        pmp["form"] = "binarized"
    for name, value in recipe.items():
        if name in Recipe.model_fields:
            annotation: Any = Recipe.model_fields[name].annotation
            adapter: TypeAdapter[Any] = TypeAdapter(annotation)
            with contextlib.suppress(ValidationError):
                recipe[name] = adapter.dump_python(adapter.validate_python(value), mode="json")
    return recipe


def _section_of(recipe: dict[str, Any], path: str) -> tuple[Any, str]:
    """The section that holds a dotted key (None where there is none), and the key's own name."""
    *sections, key = path.split(".")
    found: Any = recipe
    for name in sections:
        found = found.get(name) if isinstance(found, dict) else None
    return found, key
