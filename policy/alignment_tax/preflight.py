"""Check what a road needs before its first stage: ``python -m policy.alignment_tax.preflight RECIPE``.

First the memory that the recipe needs (``rlhf.plan``). Then, where the base is in place, a few tokens go
through every role; that is remembered for a base and a recipe.
The batches of all stages must divide over the processes that will run them.
The tax table comes hours after the start; an unknown task, a file that cannot be read or a reference that no
stage will make is an error at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from policy.alignment_tax.checks import check, read_items
from rlhf.errors import exit_on_user_error
from rlhf.plan.check import before_a_run
from rlhf.recipe.load import check_batch_sizes, from_command_line
from rlhf.runs.artifacts import MANIFEST
from rlhf.runs.dtype import settled
from rlhf.runs.stage import RUNS
from rlhf.training.launch import wanted_processes


def main() -> None:
    """The first step of the `rlhf` target; it writes nothing but the result of the probe."""
    recipe = from_command_line()
    check_batch_sizes(recipe, wanted_processes(os.environ))
    before_a_run(recipe)
    section = recipe.tax
    if Path(recipe.model.path, "config.json").expanduser().is_file():
        from policy.alignment_tax.probe import probe_once

        print(
            f"preflight: {probe_once(settled(recipe, RUNS / recipe.name), RUNS / recipe.name / 'preflight')}",
            flush=True,
        )
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
