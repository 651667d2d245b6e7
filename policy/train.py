"""The `ppo` stage: prompts and a reward model in, a policy out.

``python -m policy.train RECIPE [section.key=value ...]``, or under ``deepspeed --module``, writes
``runs/<name>/ppo/policy`` and ``.../value``.
"""

from __future__ import annotations

from rlhf.errors import exit_on_user_error
from rlhf.recipe import check_batch_sizes, from_command_line
from rlhf.stage import open_stage, processes


def main() -> None:
    """The `ppo` target."""
    recipe = from_command_line()
    check_batch_sizes(recipe, processes())
    parents = ("comparisons",) if recipe.ppo.reward_model else ("comparisons", "reward")
    run = open_stage(recipe, "ppo", section="ppo", parents=parents)
    if run is None:
        return
    from policy.fit import fit

    run.finish(fit(recipe, run))


if __name__ == "__main__":
    exit_on_user_error(main)
