"""Check what the tax stage needs before the first stage: ``python -m policy.alignment_tax.preflight RECIPE``.

The tax table comes hours after the start; an unknown task, a file that cannot be read or a reference that no
stage will make is an error at once.
"""

from __future__ import annotations

from policy.alignment_tax.checks import check, read_items
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.runs.artifacts import MANIFEST
from rlhf.runs.stage import RUNS


def main() -> None:
    """The first step of the `rlhf` target; it writes nothing."""
    recipe = from_command_line()
    section = recipe.tax
    if section is None or (RUNS / recipe.name / "tax" / MANIFEST).is_file():
        return
    variants = check(recipe, section, planned=True)
    items = read_items(recipe, section)
    drawn = ", ".join(f"{name} {len(some)}" for name, (some, _) in items.items())
    print(
        f"preflight: variants of the tax table: {', '.join(variants)}; items: {drawn or 'none'}", flush=True
    )


if __name__ == "__main__":
    exit_on_user_error(main)
