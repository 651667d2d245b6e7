"""The `comparisons` stage: read or sample comparisons, check them, split them.

``python -m rlhf.collect RECIPE [section.key=value ...]`` writes, under ``runs/<name>/comparisons/``:
``train.jsonl`` and ``held_out.jsonl`` (comparisons), ``prompts.jsonl`` and ``held_out_prompts.jsonl``
(what PPO and the evaluation start from). No prompt is on both sides, unless the recipe splits otherwise
(``data.split_by``) or brings test files of its own (``data.held_out_comparisons``).
"""

from __future__ import annotations

from rlhf.collect.judges import check_judge
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.recipe.types import function_files
from rlhf.runs.initial_adapter import policy_files
from rlhf.runs.stage import open_stage


def main() -> None:
    """The `comparisons` target."""
    recipe = from_command_line()
    data = recipe.data
    run = open_stage(
        recipe,
        "comparisons",
        section="collect",
        inputs=[
            *data.comparisons,
            *data.held_out_comparisons,
            *data.prompts,
            *data.held_out_prompts,
            *(function_files(recipe.collect.judge) if data.sampled else []),
            *(policy_files(recipe, recipe.collect.policies, "collect.policies") if data.sampled else []),
        ],
    )
    if run is not None:
        if data.sampled:
            check_judge(recipe.collect.judge, recipe, "collect.judge")
        from rlhf.collect.run import collect

        run.finish(collect(run.recipe, run))


if __name__ == "__main__":
    exit_on_user_error(main)
