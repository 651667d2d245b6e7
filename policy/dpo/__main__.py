"""The `dpo` stage: a policy straight from the comparisons, by direct preference optimization.

``python -m policy.dpo RECIPE [section.key=value ...]``, or under ``deepspeed --module``, writes
``runs/<name>/dpo/policy``, an adapter as PPO's, which `evaluate` (``evaluate.policy=dpo``) and `tax` take. A
recipe without a ``dpo`` section has no such stage.
"""

from __future__ import annotations

from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import check_batch_sizes, from_command_line
from rlhf.runs.initial_adapter import start_inputs, start_parents
from rlhf.runs.processes import print_once, processes
from rlhf.runs.stage import open_stage


def main() -> None:
    """The `dpo` target."""
    recipe = from_command_line()
    section = recipe.dpo
    if section is None:
        print_once("dpo: not in this recipe")
        return
    check_batch_sizes(recipe, processes(), "dpo")
    parents = ("comparisons", *start_parents(recipe, "dpo"))
    run = open_stage(recipe, "dpo", section="dpo", parents=parents, inputs=start_inputs(recipe, "dpo"))
    if run is None:
        return
    from policy.dpo.run import fit

    run.finish(fit(run.recipe, section, run))


if __name__ == "__main__":
    exit_on_user_error(main)
