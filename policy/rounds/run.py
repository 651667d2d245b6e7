"""The rounds, one after the other, by the stages' own commands; what is done they skip. No torch."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import yaml

from policy.rounds import plan
from policy.rounds.report import Row, row_of, write
from rlhf.data.comparisons import Comparison, prompt_key
from rlhf.data.prompts import read_prompts
from rlhf.data.readers import read_comparisons
from rlhf.data.stored import write_prompts
from rlhf.errors import STOP_SIGNALS, UserError
from rlhf.rank.candidates import FILE as CANDIDATES
from rlhf.rank.candidates import candidates
from rlhf.rank.store import ANSWERS, Store
from rlhf.recipe.load import Recipe, dump, load
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
        The figures of each round that is done: where people are to rank before the next one, not of all.

    Raises:
        UserError: a stage ended with an error, or a prompt is on both sides of the split.
    """
    ranked: list[str] = []
    rows: list[Row] = []
    for number in range(1, rounds.number + 1):
        fresh: list[str] | None = []
        if plan.adds(recipe, number):
            rank = _by_people if rounds.ranked_by == "people" else _by_judge
            fresh = rank(recipe, rounds, file, number, do)
        if fresh is None:
            break
        ranked += fresh
        words = [str(file), *plan.training(recipe, number, ranked)]
        do("rlhf.collect", words)
        held_out = check_apart(recipe, number)
        for module in plan.stages(recipe):
            do(module, words)
        new = [prompt_key(c.prompt) for path in fresh for c in _read(path)]
        if not held_out.isdisjoint(new):
            do("reward.card", [*words, *plan.card(recipe, number, fresh)])
        rows.append(row_of(recipe, rounds, number, len(new)))
        print(rows[-1].line(), flush=True)
    if rows:
        write(recipe, rows)
    return rows


def _by_judge(recipe: Recipe, rounds: Rounds, file: Path, number: int, do: Do) -> list[str]:
    """Files of the comparisons that a round adds, sampled and ranked."""
    do("rlhf.collect", [str(file), *plan.sampling(recipe, rounds, number)])
    return plan.stored(plan.new_name(recipe, number), "train", "held_out")


def _by_people(recipe: Recipe, rounds: Rounds, file: Path, number: int, do: Do) -> list[str] | None:
    """The file of what people said in a round; None where they are not done, and a line says what to do."""
    own, prompts = file.with_name(f"round-{number}.yaml"), file.with_name(f"round-{number}-prompts.jsonl")
    if not own.is_file():
        found, _ = read_prompts(plan.prompt_files(recipe), on_bad_rows=recipe.data.on_bad_rows)
        random.Random(f"{recipe.seed}:prompts").shuffle(found)
        first = plan.passed_over(recipe, rounds, number)
        places = range(first, first + min(rounds.prompts, len(found)))
        write_prompts(prompts, [found[i % len(found)] for i in places])
        write_atomically(own, dump(load(file, plan.ranking(recipe, rounds, number, prompts))))
    folder = RUNS / plan.new_name(recipe, number) / "rank"
    begun, answers = (folder / CANDIDATES).is_file(), Store(folder / ANSWERS)
    said = Counter(row.get("item") for row in answers.rows()) if begun else Counter[object]()
    items = candidates(load(own)) if begun else []
    done = sum(said[item.id] >= recipe.rank.annotators for item in items)
    if begun and done == len(items):
        return [str(answers.path)]
    left = f"{done} of {len(items)} prompts are ranked" if begun else "people are to rank"
    print(f"round {number}: {left}: make rank RECIPE={own}; then the same command again goes on", flush=True)
    return None


def _read(path: str) -> list[Comparison]:
    return read_comparisons([path], on_bad_rows="stop", key="rounds")[0]


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
