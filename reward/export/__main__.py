"""The reward model's part of `make export`: ``python -m reward.export RECIPE [section.key=value ...]``.

Writes ``runs/<name>/export/reward``, and ``reward-1``, ... for the other members of an ensemble: the base
with adapter and head merged in, tokenizer and model card, loaded again in a fresh process before it counts.
"""

from __future__ import annotations

from rlhf.errors import exit_on_user_error
from rlhf.export.folder import place_of, wanted
from rlhf.recipe.load import from_command_line
from rlhf.runs.dtype import settled
from rlhf.runs.stage import RUNS


def main() -> None:
    """The reward model's part of the `export` target."""
    recipe = from_command_line()
    recipe = settled(recipe, RUNS / recipe.name, measured=False)
    if wanted(recipe, "reward", ("reward",)) is None:
        return
    place_of(recipe, "reward")  # before torch is loaded
    from reward.export.run import export

    export(recipe)


if __name__ == "__main__":
    exit_on_user_error(main)
