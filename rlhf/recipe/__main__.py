"""Check a recipe and do nothing else: ``python -m rlhf.recipe recipes/tiny.yaml ppo.steps=2``."""

from __future__ import annotations

from rlhf import NAME, __version__
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import from_command_line


def main() -> None:
    """The `recipe` target; prints the recipe's name and where it will run."""
    recipe = from_command_line()
    print(f"{NAME} {__version__}: the recipe {recipe.name} is valid; it runs in runs/{recipe.name}")


if __name__ == "__main__":
    exit_on_user_error(main)
