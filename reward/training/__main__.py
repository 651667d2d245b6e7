"""The `reward` stage: comparisons in, a reward model out.

``python -m reward.training RECIPE [section.key=value ...]`` writes ``runs/<name>/reward/model``.
"""

from __future__ import annotations

from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import check_batch_sizes, from_command_line
from rlhf.runs.initial_adapter import start_files, start_parents
from rlhf.runs.processes import processes
from rlhf.runs.stage import open_stage


def main() -> None:
    """The `reward` target."""
    recipe = from_command_line()
    check_batch_sizes(recipe, processes(), "reward")
    pretrained = ("pmp",) if recipe.pmp and not recipe.reward.start else ()
    parents = ("comparisons", *pretrained, *start_parents(recipe, "reward"))
    inputs = start_files(recipe, "reward")
    stage = open_stage(recipe, "reward", section="reward", parents=parents, inputs=inputs)
    if stage is None:
        return
    from reward.training.run import run

    stage.finish(run(stage.recipe, stage))


if __name__ == "__main__":
    exit_on_user_error(main)
