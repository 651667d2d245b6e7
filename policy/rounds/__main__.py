"""Online RLHF: ``python -m policy.rounds RECIPE [section.key=value ...]``, for a recipe with ``rounds``.

Each round is a run of its own, ``runs/<name>-round-1`` and so on, made by the stages' own commands; stopped
at any moment, the same command goes on where they were. Writes ``runs/<name>/rounds.json`` and ``rounds.md``,
and a report page of all rounds.
"""

from __future__ import annotations

import os

from policy.rounds.run import open_rounds, run_rounds, start
from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import from_command_line


def main() -> None:
    """The `rounds` target."""
    recipe = from_command_line()
    if recipe.rounds is None:
        raise UserError("rounds: this recipe has no rounds section; add one, as in rounds: {number: 3}")
    if not recipe.ppo.own_reward:
        raise UserError(
            "rounds: PPO of this recipe is not trained against the reward model of its own run, as a round "
            "makes one: remove ppo.reward_model, or add {model: reward} to ppo.rewards"
        )
    with open_rounds(recipe) as file:
        rows = run_rounds(recipe, recipe.rounds, file, start)
        if rows:
            os.environ["RUNS"] = " ".join(row.run for row in rows)
            start("rlhf.report", [str(file)])


if __name__ == "__main__":
    exit_on_user_error(main)
