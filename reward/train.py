"""The `reward` stage: comparisons in, a reward model out.

``python -m reward.train RECIPE [section.key=value ...]`` writes ``runs/<name>/reward/model``.
"""

from __future__ import annotations

from rlhf.errors import exit_on_user_error
from rlhf.recipe import check_batch_sizes, from_command_line
from rlhf.stage import open_stage, processes


def main() -> None:
    """The `reward` target."""
    recipe = from_command_line()
    check_batch_sizes(recipe, processes())
    start = recipe.reward.start
    parents = ("comparisons", "pmp") if recipe.pmp and not start else ("comparisons",)
    inputs = [f"{start}/adapter_model.safetensors"] if start else []
    run = open_stage(recipe, "reward", section="reward", parents=parents, inputs=inputs)
    if run is None:
        return
    from reward.fit import fit

    run.finish(fit(recipe, run))


if __name__ == "__main__":
    exit_on_user_error(main)
