"""The `chat` target: ``python -m policy.chat RECIPE [section.key=value ...]``.

Talks to two or more models of a run beside each other, and saves which answer is better where `make rank`
does. Nothing else of the run is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from policy.chat.session import SOURCE, Conversation
from policy.chat.terminal import Interrupts, lines, say
from rlhf.data.comparisons import Comparison
from rlhf.errors import UserError, exit_on_user_error
from rlhf.rank.store import ANSWERS, Store, answer
from rlhf.recipe.load import Recipe, from_command_line
from rlhf.runs.artifacts import MANIFEST, hash_of
from rlhf.runs.dtype import settled
from rlhf.runs.initial_adapter import ADAPTER, adapter_files
from rlhf.runs.stage import RUNS
from rlhf.runs.whole import check_place

BASE = "base"
STAGES = ("ppo", "dpo", "distill", "sft")
"""Stages that make a policy; the first that has finished is talked to."""


def main() -> None:
    """The `chat` target."""
    recipe = from_command_line()
    recipe = settled(recipe, RUNS / recipe.name, measured=False)
    places = places_of(recipe)
    from policy.chat.models import RunModels

    interrupts = Interrupts()
    models = RunModels(recipe, places, interrupts)
    section = recipe.chat
    talk = Conversation(
        models,
        say,
        functools.partial(keep, Store(RUNS / recipe.name / "rank" / ANSWERS), models.names),
        turns=recipe.dialogue.template == "chat",
        seed=section.seed,
    )
    say(f"{' and '.join(models.names)} answer beside each other; /help says what else there is\n")
    for line in lines():
        with interrupts.noted():
            try:
                if not talk.hear(line):
                    break
            except UserError as error:
                say(f"{error}\n")
    say(f"comparisons saved: {talk.saved}\n")


def keep(store: Store, writers: Sequence[str], comparison: Comparison) -> Path:
    """Add a comparison to the run's answers, as an item of its own; returns their file.

    writers: the models, by response.
    """
    row = answer(comparison, SOURCE, writers=list(writers))
    store.append({**row, "item": hash_of([row["prompt"], row["responses"]])[:16]})
    return store.path


def places_of(recipe: Recipe) -> dict[str, Path | None]:
    """The adapters of the models by name, in order; None for the base alone.

    Raises:
        UserError: one is not there, damaged, or was made with other settings.
    """
    run = RUNS / recipe.name
    there = [stage for stage in STAGES if (run / stage / MANIFEST).exists()]
    if recipe.chat.models is None and not there:
        raise UserError(
            f"chat: {run} has no policy yet: run `make ppo RECIPE=...` with the same recipe first, or name "
            'models (SET="chat.models=[base]")'
        )
    places: dict[str, Path | None] = {}
    for name in recipe.chat.models or [BASE, there[0]]:
        folder = None if name == BASE else run / name / ADAPTER if name in STAGES else Path(name)
        if name in STAGES and name not in there:
            raise UserError(
                f"chat.models: {run / name} is not complete: run `make {name} RECIPE=...` with the same "
                "recipe first"
            )
        if folder is not None:
            if name == "distill" and not folder.is_dir():
                raise UserError(
                    "chat.models: distill.method=full made a whole model, not an adapter: talk to it with "
                    f'SET="model.path={run}/distill/model chat.models=[base]"'
                )
            adapter_files(folder, recipe, "chat.models", (BASE, *STAGES))
            check_place(folder)
        places[name] = folder
    return places


if __name__ == "__main__":
    exit_on_user_error(main)
