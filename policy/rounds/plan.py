"""What a round consists of: its runs, their settings besides the recipe's, their stages. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Rounds
from rlhf.recipe.types import BASE
from rlhf.runs.stage import RUNS


def run_name(recipe: Recipe, number: int) -> str:
    """The run that learns from all comparisons of a round and those before."""
    return f"{recipe.name}-round-{number}"


def new_name(recipe: Recipe, number: int) -> str:
    """The run that holds the comparisons which a round adds."""
    return f"{run_name(recipe, number)}-new"


def policies(recipe: Recipe, rounds: Rounds, number: int) -> list[str]:
    """Who writes the responses of a round: the newest policies, the newest first; the base is the oldest."""
    trained = [str(RUNS / run_name(recipe, n) / "ppo" / "policy") for n in range(number - 1, 0, -1)]
    return [*trained, BASE][: rounds.policies]


def adds(recipe: Recipe, number: int) -> bool:
    """Whether a round samples; the first one of a recipe with comparisons of its own begins with those."""
    return recipe.data.sampled or number > 1


def stored(name: str, *files: str) -> list[str]:
    """Files that the comparisons stage of a run leaves."""
    return [str(RUNS / name / "comparisons" / f"{file}.jsonl") for file in files]


def _given(**values: object) -> list[str]:
    """Overrides; a double underscore is the dot."""
    return [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]


def _prompts(recipe: Recipe) -> list[str]:
    """The prompts of all rounds: the recipe's, or those that its comparisons gave the first round."""
    if recipe.data.sampled:
        return []
    first = run_name(recipe, 1)
    own = [] if recipe.data.prompts else _given(data__prompts=stored(first, "prompts"))
    return own + _given(data__held_out_prompts=stored(first, "held_out_prompts"))


def passed_over(recipe: Recipe, rounds: Rounds, number: int) -> int:
    """Prompts that had their turn in the rounds before."""
    return rounds.prompts * (number - 1 if recipe.data.sampled else number - 2)


def sampling(recipe: Recipe, rounds: Rounds, number: int) -> list[str]:
    """Settings of the run in which the comparisons of a round are sampled and ranked by the judge."""
    return [
        *_given(name=new_name(recipe, number), data__comparisons=["sampled"], data__held_out_comparisons=[]),
        *_given(data__limit=None, data__rankings=None, data__columns={}),
        *_prompts(recipe),
        *_given(collect__prompts=rounds.prompts, collect__skip=passed_over(recipe, rounds, number)),
        *_given(collect__policies=policies(recipe, rounds, number)),
    ]


def prompt_files(recipe: Recipe) -> list[str]:
    """What the prompts of the rounds are drawn from."""
    return recipe.data.prompts or stored(run_name(recipe, 1), "prompts")


def ranking(recipe: Recipe, rounds: Rounds, number: int, prompts: Path) -> list[str]:
    """Settings of the run in which people rank a round's responses to the prompts of a file."""
    return [
        *_given(name=new_name(recipe, number), data__prompts=[str(prompts)], data__prompt_columns=[]),
        *_given(rank__files=[], rank__prompts=rounds.prompts),
        *_given(rank__policies=policies(recipe, rounds, number)),
    ]


def training(recipe: Recipe, number: int, ranked: Sequence[str] = ()) -> list[str]:
    """Settings of the run that learns from all comparisons so far.

    ranked: files of those that the rounds have added, in order.
    """
    own = _given(name=run_name(recipe, number), evaluate__policy="ppo")
    if not adds(recipe, number):
        return own
    files, tests = list(ranked), []
    if not recipe.data.sampled:  # as the first round read, limited and dealt them
        first, apart = run_name(recipe, 1), bool(recipe.data.held_out_comparisons)
        files = [*stored(first, "train", *(() if apart else ("held_out",))), *files]
        tests = stored(first, "held_out") if apart else []
    return [
        *own,
        *_given(data__comparisons=files, data__held_out_comparisons=tests),
        *_given(data__limit=None, data__rankings=None, data__columns={}),
        *_prompts(recipe),
    ]


def card(recipe: Recipe, number: int, fresh: Sequence[str]) -> list[str]:
    """Settings of a round's card: its reward model and the one before on the round's held-out comparisons.

    fresh: files of the comparisons that the round has added; what was trained on is left out by the card.
    """
    before = str(Path(RUNS, run_name(recipe, number - 1), "reward", "model")) if number > 1 else None
    return _given(card__model=None, card__comparisons=list(fresh), card__against=before, card__curve=[])


def stages(recipe: Recipe) -> list[str]:
    """The stages of a round behind its comparisons, in order."""
    optional = {
        "policy.sft": recipe.sft,
        "policy.distillation": recipe.distill,
        "reward.pretraining": recipe.pmp,
    }
    there = [module for module, section in optional.items() if section is not None]
    return [*there, "reward.training", "policy.ppo", "policy.evaluate"]
