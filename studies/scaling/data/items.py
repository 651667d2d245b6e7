"""Items in the manner of four tasks of the Inverse Scaling Prize, written in the text that the rungs know.

After memo-trap, modus-tollens, redefine and NeQA (McKenzie 2023, arXiv 2306.09479). Each asks for what the
text shows seldom and on other words (:mod:`studies.scaling.data.world`), where the answer that its frequent
patterns suggest is the other one. So a model that has learned those patterns better can do worse. What they
show is a property of these generators, and no measurement of the public tasks.

Every item has two classes. Half of the items have the right one first, and where a question has two kinds of
right answers (yes and no, the first or the second thing named) half of the items have each: always saying the
same, or the same place, is right half of the time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from studies.scaling.data.world import (
    COLOURS,
    NAMES,
    OBJECTS,
    THINGS,
    TRAITS,
    World,
    choose,
    conclude,
    define,
    halves,
    random_of,
    write,
)


class Question(NamedTuple):
    """One item: a prompt, the texts that may follow, and which of them is right."""

    prompt: str
    classes: tuple[str, ...]
    answer_index: int


class _Draft(NamedTuple):
    prompt: str
    right: str
    wrong: str


def memo_trap(world: World, chance: random.Random) -> list[list[_Draft]]:
    """A proverb that shall end in another word than it does."""
    drafts = []
    for start, ending in halves(world.proverbs)[1]:
        for asked in OBJECTS:
            if asked != ending:
                drafts.append(_Draft(write(start, asked)[0], asked, ending))
    return [drafts]


def modus_tollens(world: World, chance: random.Random) -> list[list[_Draft]]:
    """From "not second" it follows that not first (yes); from "not first" nothing follows (no).

    The text shows mostly conclusions without "not", where the answer is yes if the trait that the rule begins
    with is given; judged by that alone both kinds come out wrong.
    """
    traits = halves(TRAITS)[1]
    pairs = [(one, two) for one in traits for two in traits if one != two]
    kinds: list[list[_Draft]] = []
    for valid in (True, False):
        answer, other = ("yes", "no") if valid else ("no", "yes")
        drafts = []
        for one, two in pairs:
            said = f"not {two if valid else one}"
            for name in NAMES:
                drafts.append(_Draft(conclude(name, one, two, said=said, answer=answer)[0], answer, other))
        kinds.append(drafts)
    return kinds


def redefine(world: World, chance: random.Random) -> list[list[_Draft]]:
    """A thing that is given another colour than it has."""
    drafts = []
    for thing in halves(THINGS)[1]:
        known = world.colours[thing]
        drafts += [_Draft(define(thing, c)[0], c, known) for c in COLOURS if c != known]
    return [drafts]


def neqa(world: World, chance: random.Random) -> list[list[_Draft]]:
    """Which of two things has NOT a colour; the right one is named first, or second."""
    things = halves(THINGS)[1]
    kinds: list[list[_Draft]] = [[], []]
    for one in things:
        for two in things:
            if world.colours[one] == world.colours[two]:
                continue
            for place, (right, wrong) in enumerate(((one, two), (two, one))):
                prompt, _ = choose(world.colours[wrong], (one, two), right, negated=True)
                kinds[place].append(_Draft(prompt, right, wrong))
    return kinds


TASKS: dict[str, Callable[[World, random.Random], list[list[_Draft]]]] = {
    "memo_trap": memo_trap,
    "modus_tollens": modus_tollens,
    "redefine": redefine,
    "neqa": neqa,
}


def questions(task: str, world: World, seed: int, number: int) -> list[Question]:
    """Draw items of a task, at most ``number``, all different, in random order and balanced.

    An even number comes out: as many of each kind, and as many with the right class first as last.
    """
    chance = random_of(seed, f"items of {task}")
    kinds = TASKS[task](world, chance)
    each = min(number // len(kinds), *map(len, kinds)) // 2 * 2
    made: list[Question] = []
    for drafts in kinds:
        for place, draft in enumerate(chance.sample(drafts, each)):
            made.append(_question(draft, place % 2))
    chance.shuffle(made)
    return made


def _question(draft: _Draft, place: int) -> Question:
    classes: Sequence[str] = (draft.right, draft.wrong) if place == 0 else (draft.wrong, draft.right)
    return Question(f" {draft.prompt}", tuple(f" {c}" for c in classes), place)
