"""The `sft` stage: supervised fine-tuning on demonstrations, before distillation, the reward model and PPO.

``python -m policy.sft RECIPE [section.key=value ...]``, or under ``deepspeed --module``, writes
``runs/<name>/sft/policy``, from which `ppo`, `pmp`, `reward` and `distill` can start. A recipe without an
``sft`` section has no such stage.
"""

from __future__ import annotations

from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import check_batch_sizes, from_command_line
from rlhf.runs.initial_adapter import start_inputs
from rlhf.runs.processes import print_once, processes
from rlhf.runs.stage import open_stage


def main() -> None:
    """The `sft` target."""
    recipe = from_command_line()
    section = recipe.sft
    if section is None:
        print_once("sft: not in this recipe")
        return
    check_batch_sizes(recipe, processes(), "sft")
    parents = ("comparisons",) if section.chosen else ()
    inputs = [*(() if section.chosen else section.data), *start_inputs(recipe, "sft")]
    run = open_stage(recipe, "sft", section="sft", parents=parents, inputs=inputs)
    if run is None:
        return
    from policy.sft.run import fit

    run.finish(fit(run.recipe, section, run))


if __name__ == "__main__":
    exit_on_user_error(main)
