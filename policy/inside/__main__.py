"""The `inside` stage: which parts of the policy carry what PPO changed, and what the reward model reads.

``python -m policy.inside RECIPE [section.key=value ...]`` writes ``runs/<name>/inside/inside.json``,
``inside.md`` and plots, and prints the page.
"""

from __future__ import annotations

from policy.inside.solutions.others import check_others
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.runs.artifacts import print_page
from rlhf.runs.initial_adapter import (
    ADAPTER,
    check_same_start,
    policy_files,
    start_files,
    start_parents,
)
from rlhf.runs.stage import RUNS, open_stage


def main() -> None:
    """The `inside` target; a finished stage prints its page again."""
    recipe = from_command_line()
    own = ("reward",) if recipe.ppo.own_reward else ()
    parents = ("comparisons", *own, "ppo", *start_parents(recipe, "ppo"))
    others = policy_files(recipe, recipe.inside.others or (), "inside.others")
    reads = [*recipe.ppo.named_models, *start_files(recipe, "ppo")]
    options = recipe.inside
    texts = (options.texts or recipe.ppo.ptx_texts) if options.neurons else []
    inputs = [*options.pairs, *texts, *others]
    run = open_stage(recipe, "inside", section="inside", parents=parents, inputs=inputs, reads=reads)
    if run is not None:
        check_same_start(run.recipe, run, "ppo")
        check_others(run.parent("ppo") / ADAPTER, options.others or ())
        from policy.inside.run import look

        run.finish(look(run.recipe, run))
    print_page(RUNS / recipe.name / "inside" / "inside.md")


if __name__ == "__main__":
    exit_on_user_error(main)
