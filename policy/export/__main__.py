"""The policy's part of `make export`: ``python -m policy.export RECIPE [section.key=value ...]``.

Writes ``runs/<name>/export/policy``: weights with the adapter merged in, tokenizer, chat template, generation
settings and model card, loaded again in a fresh process before it counts.
"""

from __future__ import annotations

from rlhf.errors import exit_on_user_error
from rlhf.export.folder import place_of, wanted
from rlhf.recipe.load import from_command_line
from rlhf.runs.dtype import settled
from rlhf.runs.stage import RUNS

STAGES = ("ppo", "dpo", "distill", "sft")


def main() -> None:
    """The policy's part of the `export` target."""
    recipe = from_command_line()
    recipe = settled(recipe, RUNS / recipe.name, measured=False)
    named = recipe.export.policy
    stage = wanted(recipe, "policy", STAGES if named is None else (named,))
    if stage is None:
        return
    place = place_of(recipe, "policy")
    from policy.export.run import export

    export(recipe, stage, place)


if __name__ == "__main__":
    exit_on_user_error(main)
