"""The rounds, one after the other, by the stages' own commands; what is done they skip. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import yaml

from policy.rounds import plan
from policy.rounds.report import Row, row_of, write
from rlhf.data.comparisons import Comparison, Counts, prompt_key
from rlhf.data.readers.native import read_native
from rlhf.errors import STOP_SIGNALS, UserError
from rlhf.recipe.load import Recipe, dump
from rlhf.recipe.schema import Rounds
from rlhf.recipe.stored import modernized
from rlhf.runs.artifacts import write_atomically
from rlhf.runs.lock import locked
from rlhf.runs.stage import RUNS, differences

Do = Callable[[str, Sequence[str]], None]
"""Runs a stage: its package, then RECIPE [section.key=value ...]."""


@contextlib.contextmanager
def open_rounds(recipe: Recipe) -> Iterator[Path]:
    """The resolved recipe of all rounds as a file, which the stages read; one start at a time.

    Raises:
        UserError: another start is at it, or the recipe has changed since the first one, and in what.
    """
    folder = RUNS / recipe.name / "rounds"
    file = folder / "recipe.yaml"
    with locked(folder):
        if file.is_file():
            old, new = (
                _lasting(r) for r in (yaml.safe_load(file.read_text("utf-8")), recipe.model_dump(mode="json"))
            )
            changes = differences(modernized(old), new)
            if changes:
                raise UserError(
                    f"{folder} was begun with another recipe ({'; '.join(changes[:4])}): give the new run a "
                    'name of its own (SET="name=..."), or change the recipe back'
                )
        write_atomically(file, dump(recipe))
        yield file


def _lasting(recipe: dict[str, object]) -> dict[str, object]:
    """A recipe without what may change between two starts."""
    rounds = recipe.get("rounds")
    return {**recipe, "rounds": {**rounds, "number": 0} if isinstance(rounds, dict) else rounds}


def run_rounds(recipe: Recipe, rounds: Rounds, file: Path, do: Do) -> list[Row]:
    """Do all rounds that are not done, and say what came of each.

    Args:
        recipe: of all rounds.
        rounds: its section.
        file: the same recipe, for the stages.
        do: runs a stage.

    Returns:
        The figures of each round.

    Raises:
        UserError: a stage ended with an error, or a prompt is on both sides of the split.
    """
    ranked: list[str] = []
    rows: list[Row] = []
    for number in range(1, rounds.number + 1):
        fresh: list[str] = []
        if plan.adds(recipe, number):
            do("rlhf.collect", [str(file), *plan.sampling(recipe, rounds, number)])
            fresh = plan.stored(plan.new_name(recipe, number), "train", "held_out")
        ranked += fresh
        words = [str(file), *plan.training(recipe, number, ranked)]
        do("rlhf.collect", words)
        held_out = check_apart(recipe, number)
        for module in plan.stages(recipe):
            do(module, words)
        if any(prompt_key(c.prompt) in held_out for path in fresh for c in _read(path)):
            do("reward.card", [*words, *plan.card(recipe, number, fresh)])
        rows.append(row_of(recipe, rounds, number))
        print(rows[-1].line(), flush=True)
    write(recipe, rows)
    return rows


def _read(path: str) -> list[Comparison]:
    return read_native(path, "stop", Counts())


def check_apart(recipe: Recipe, number: int) -> set[str]:
    """What one round holds out no round trains on; returns the keys of the prompts that are held out.

    Raises:
        UserError: a prompt is on both sides. Parts of prompts (``data.split_by``) are not looked at.
    """
    parts: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for n in range(1, number + 1):
        for part, keys in parts.items():
            keys |= {
                prompt_key(c.prompt)
                for path in plan.stored(plan.run_name(recipe, n), part)
                for c in _read(path)
            }
    both = parts["train"] & parts["held_out"]
    if both and recipe.data.split_by == "prompt" and not recipe.data.held_out_comparisons:
        raise UserError(
            f"rounds: {len(both)} prompts are held out in one round and trained on in another, since a round "
            "is too small to hold any out: raise rounds.prompts or data.held_out, under a new name"
        )
    return parts["held_out"]


def start(module: str, words: Sequence[str]) -> None:
    """Run a stage in processes of its own (``PROCS``, ``HOSTFILE``); a request to stop goes to it.

    Raises:
        SystemExit: with the stage's status, where it is not 0; the stage has said why.
    """
    launcher = [] if module in ("rlhf.collect", "rlhf.report") else ["rlhf.training.launch"]
    child = subprocess.Popen([sys.executable, "-m", *launcher, module, *words])

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        sys.exit(128 - status if status < 0 else status)
