"""The block ``quick:`` of a recipe: smaller sizes in the same nesting, for a run of minutes.

``quick=true`` lays the block over the recipe, below the other overrides, and the run is called
``<name>-quick``; otherwise the block is checked and left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.errors import UserError

QUICK = "quick"  # name of the block, and of the override that asks for it


def take_block(values: dict[str, Any], origins: dict[str, str]) -> dict[str, Any] | None:
    """Take the block out of a recipe's values.

    Args:
        values: what the file holds; loses the block.
        origins: file and line of every key by its dotted path.

    Raises:
        UserError: it is no mapping, or it names the run.
    """
    block = values.pop(QUICK, None)
    if block is None:
        return None
    if not isinstance(block, dict):
        raise UserError(f"{origins[QUICK]}: {QUICK} is a mapping of sections, as the recipe (got {block!r})")
    if "name" in block:
        where = origins[f"{QUICK}.name"]
        raise UserError(f"{where}: {QUICK}.name: the name is the recipe's with -{QUICK} behind it; remove it")
    return block


def split_overrides(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether the overrides ask for the block (the last one counts), and the others.

    Raises:
        UserError: an override that means to change the block, or asks neither for true nor for false.
    """
    wanted, others = False, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip().startswith(f"{QUICK}."):
            rest = override.strip().removeprefix(f"{QUICK}.")
            raise UserError(f"override {override!r}: write {rest} {QUICK}=true instead")
        if key.strip() != QUICK:
            others.append(override)
            continue
        if value.strip().lower() not in ("true", "false"):
            raise UserError(f"override {override!r}: {QUICK} is true or false")
        wanted = value.strip().lower() == "true"
    return wanted, others


def laid_over(values: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Values with a block of the same nesting over them; what is no mapping on both sides is replaced."""
    merged = dict(values)
    for key, value in block.items():
        below = merged.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        merged[key] = laid_over(below, value) if both else value  # type: ignore[arg-type]
    return merged


def origins_with(origins: dict[str, str]) -> dict[str, str]:
    """Where every key stands once the block lies over the rest."""
    inside = f"{QUICK}."
    return origins | {
        key.removeprefix(inside): where for key, where in origins.items() if key.startswith(inside)
    }
