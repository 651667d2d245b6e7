"""Pairs of responses that differ in one thing alone, to see what a reward model reads. No torch.

The two responses of a pair have equally many tokens, so that each position of one run stands beside the same
position of the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from rlhf.data.comparisons import Prompt
from rlhf.data.readers import Refuses, no_refusal, read_comparisons
from rlhf.data.readers.sieve import SKIP
from rlhf.errors import UserError

OWN = "your pairs"
FILLER = "They came home by train at six."
"""A sentence that says nothing good or bad, for the questions of length and position."""
_WORDS = (
    ("good", "bad"),
    ("great", "awful"),
    ("wonderful", "terrible"),
    ("happy", "sad"),
    ("pleasant", "unpleasant"),
    ("beautiful", "ugly"),
    ("lovely", "nasty"),
    ("brilliant", "stupid"),
)
_THINGS = ("The day", "The evening", "The food", "All of it")
_POLITE = (
    ("Thank you for that", "Go away with that"),
    ("Please take a seat", "Just take a seat"),
    ("I am sorry to say", "I am here to say"),
    ("You are welcome here", "You are nobody here"),
    ("Would you kindly wait", "Would you just wait"),
    ("I would gladly help", "I would hardly help"),
)


class Pair(NamedTuple):
    """Two responses to one prompt."""

    prompt: Prompt
    good: str
    """The one whose score is expected to be higher, where one is."""
    bad: str


class Kind(NamedTuple):
    """What the pairs of one kind ask of a reward model."""

    name: str
    asks: str
    texts: Callable[[], Iterator[tuple[str, str]]]


def _filled(first: str, second: str) -> Iterator[tuple[str, str]]:
    for thing, (good, bad) in itertools.product(_THINGS, _WORDS):
        words = {"thing": thing, "good": good, "bad": bad}
        yield first.format(**words), second.format(**words)


def _politeness() -> Iterator[tuple[str, str]]:
    for end, (polite, rude) in itertools.product((".", ", my friend.", ", he said.", " now."), _POLITE):
        yield f" {polite}{end}", f" {rude}{end}"


KINDS = (
    Kind(
        "sentiment",
        "one word of sentiment is changed to its opposite",
        partial(_filled, " {thing} was {good}.", " {thing} was {bad}."),
    ),
    Kind(
        "negation",
        "the same behind `not`: a reader of single words prefers the wrong one",
        partial(_filled, " {thing} was not {bad}.", " {thing} was not {good}."),
    ),
    Kind(
        "order",
        "the same words, the good one last or first: a bag of words sees no difference",
        partial(_filled, " {thing} looked {bad} but was {good}.", " {thing} looked {good} but was {bad}."),
    ),
    Kind(
        "position",
        "the same sentences, the good one last or first: neither is right",
        partial(_filled, f" {FILLER} {{thing}} was {{good}}.", f" {{thing}} was {{good}}. {FILLER}"),
    ),
    Kind("politeness", "a polite or a rude turn of phrase", _politeness),
)


def pairs_of(
    kind: Kind, prompts: Sequence[Prompt], encode: Callable[[str], list[int]], most: int, longest: int
) -> tuple[list[Pair], int]:
    """The first ``most`` pairs of a kind, behind the prompts in turn, and how many were left out because
    their tokens are not equally many, or more than ``longest``."""
    texts = list(kind.texts())
    even = [pair for pair in texts if len(encode(pair[0])) == len(encode(pair[1])) <= longest]
    found = [Pair(prompts[n % len(prompts)], *pair) for n, pair in enumerate(even)]
    return found[:most], len(texts) - len(even)


def own_pairs(
    specs: Sequence[str],
    encode: Callable[[str], list[int]],
    show: Callable[[int], str],
    longest: int,
    refuses: Refuses = no_refusal,
) -> list[Pair]:
    """The pairs of the recipe's files: comparisons of two responses.

    encode: text to tokens. show: a token in writing. longest: tokens of a response, at most. refuses: why a
    prompt cannot be rendered.

    Raises:
        UserError: one has more responses, or responses of unequal length in tokens, or too long ones.
    """
    try:
        rows, _ = read_comparisons(specs, on_bad_rows="stop", key="inside.pairs", refuses=refuses)
    except UserError as error:  # bad rows are never skipped here
        raise UserError(str(error).replace(SKIP, "mend that row, or remove it")) from None
    found = []
    for row in rows:
        if len(row.responses) != 2:
            raise UserError(
                f"inside.pairs: {row.responses[0][:40]!r} is one of {len(row.responses)} responses; give two"
            )
        good, bad = (row.responses[n] for n in sorted((0, 1), key=lambda n: row.ranks[n]))
        sides = [encode(good), encode(bad)]
        if len(sides[0]) != len(sides[1]):
            tokens = " against ".join(f"{len(ids)} ({' '.join(map(show, ids))})" for ids in sides)
            raise UserError(
                f"inside.pairs: {good[:40]!r} and {bad[:40]!r} have unequally many tokens, {tokens}: change "
                "words until they are equally many, so that positions stand beside each other"
            )
        if len(sides[0]) > longest:
            raise UserError(
                f"inside.pairs: {good[:40]!r} has {len(sides[0])} tokens, more than the {longest} of "
                "dialogue.max_response_tokens; shorten it"
            )
        found.append(Pair(row.prompt, good, bad))
    return found
