"""Where the text of a study comes from: the small world, or files; and its pieces for every purpose.

Pieces are texts, not tokens, so that models with different tokenizers meet the same items. Training and
held-out pieces of files are of different parts of each file (the last tenth is held out); those of the world
are drawn anew from random numbers of their own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from rlhf.data.readers.files import origins
from rlhf.errors import UserError
from studies.scaling.data import world
from studies.scaling.data.world import make_world, random_of

HELD_OUT = 0.1  # share of each file
WORLD_SHARE = (
    0.25  # of the training documents, where the text is files: the items are written in the world's words
)
OPENING_WORDS = 10  # of what PPO continues
PASSAGE_WORDS = 60  # longest passage whose last word is asked for
LEAST_WORDS = 120  # of a held-out part
_KEY = "--text"


class Library:
    """The text of one seed.

    Args:
        files: .txt files (their lines joined), or rows with a ``text`` field; none = the small world.
        seed: of everything that is drawn.
        pure: only files, also for training.

    Raises:
        UserError: a file cannot be used, or has too little text.
    """

    def __init__(self, files: Sequence[str], seed: int, *, pure: bool = False) -> None:
        self.seed, self.world = seed, make_world(seed)
        self._files = tuple(files)
        self._pure = pure

    def training(self, number: int, words: int) -> list[str]:
        """Documents to train on, each of so many words."""
        chance = random_of(self.seed, "training text")
        if not self._files:
            return [world.document(self.world, chance, words) for _ in range(number)]
        parts, made = _parts(self._files, training=True), []
        for _ in range(number):
            if not self._pure and chance.random() < WORLD_SHARE:
                made.append(world.document(self.world, chance, words))
            else:
                made.append(_window(parts, chance, words))
        return made

    def stories(self, purpose: str, number: int, words: int) -> list[str]:
        """Documents for a purpose: ``distil`` draws from the part for training, any other name does not."""
        chance = random_of(self.seed, f"stories {purpose}")
        if not self._files:
            return [world.tell(self.world, chance, words) for _ in range(number)]
        parts = _parts(self._files, training=purpose == "distil")
        return [_window(parts, chance, words) for _ in range(number)]

    def documents(self, number: int, words: int) -> list[str]:
        """Held-out documents of every kind that is trained on."""
        chance = random_of(self.seed, "held-out documents")
        if not self._files:
            return [world.document(self.world, chance, words) for _ in range(number)]
        return self.stories("documents", number, words)

    def last_words(self, number: int) -> list[tuple[str, str]]:
        """Held-out passages without their last word, and that word with its space.

        Of files: a word of four letters or more that stands in the passage before, as most of LAMBADA's do.
        """
        chance = random_of(self.seed, "last words")
        if not self._files:
            return [world.last_word(self.world, chance) for _ in range(number)]
        parts = _parts(self._files, training=False)
        found = (_last_word(_window(parts, chance, PASSAGE_WORDS)) for _ in range(20 * number))
        made = [passage for passage in found if passage][:number]
        if not made:
            raise UserError(
                f"{_KEY}: no passage ends in a word that it has had before; give other or more text"
            )
        return made

    def openings(self, number: int, *, training: bool) -> list[str]:
        """Beginnings of documents, for PPO to continue."""
        purpose = "distil" if training else "openings"
        return [text.rstrip() for text in self.stories(purpose, number, OPENING_WORDS)]

    def context(self, words: int) -> str:
        """A good story; of the world even where the text is files, if no other context is given."""
        return world.tell(self.world, random_of(self.seed, "context"), words, self._story())

    def continuations(self, number: int, words: int) -> list[str]:
        """Ways in which the story of the context may go on."""
        chance = random_of(self.seed, "continuations")
        return [world.tell(self.world, chance, words, self._story()) for _ in range(number)]

    def _story(self) -> world.Story:
        return world.plot(random_of(self.seed, "plot of the context"), world.GOOD)


def context_of(file: str, words: int) -> str:
    """The first words of a file.

    Raises:
        UserError: there is no such file, or nothing in it.
    """
    text = "".join(_words_of((file,), "--context"))
    found = re.findall(r"\s*\S+", text)[:words]
    if not found:
        raise UserError(f"--context: {file} is empty; give a file with some words")
    return "".join(found)


def check(files: Sequence[str]) -> None:
    """Read the files once.

    Raises:
        UserError: one cannot be used, or they have too little text.
    """
    if files:
        _parts(tuple(files), training=True)


@lru_cache(maxsize=4)
def _parts(files: tuple[str, ...], *, training: bool) -> tuple[tuple[str, ...], ...]:
    """The words of every file's part, each with the white space before it."""
    parts = []
    for file in files:
        words = _words_of((file,), _KEY)
        cut = round((1.0 - HELD_OUT) * len(words))
        if len(words) - cut < LEAST_WORDS:
            raise UserError(
                f"{_KEY}: {file} has too little text ({len(words):,} words, at least "
                f"{round(LEAST_WORDS / HELD_OUT):,} are needed); leave it out or join it with others"
            )
        parts.append(tuple(words[:cut] if training else words[cut:]))
    return tuple(parts)


def _words_of(files: Sequence[str], key: str) -> list[str]:
    words: list[str] = []
    for origin in origins(files, key=key):
        for number, row in origin.rows:
            text = row.get("text") if isinstance(row, Mapping) else row
            if not isinstance(text, str):
                raise UserError(
                    f"{origin.where(number)}: no text; {key} wants .txt files or rows with a `text` field"
                )
            words += re.findall(r"\s*\S+", f"\n{text}")
    return words


def _window(parts: Sequence[Sequence[str]], chance: random.Random, words: int) -> str:
    """So many words from a random place; every word of all files is as likely to be the first."""
    part = chance.choices(parts, [len(part) for part in parts])[0]
    start = chance.randrange(max(1, len(part) - words + 1))
    return "".join(part[start : start + words]).lstrip()


def _last_word(passage: str) -> tuple[str, str] | None:
    words = re.findall(r"\s*\S+", passage)
    bare = [word.strip().strip(".,;:!?\"'()").lower() for word in words]
    for place in range(len(words) - 1, len(words) // 2, -1):
        word = words[place].strip()
        if len(word) > 3 and word.isalpha() and bare[place] in bare[:place]:
            return "".join(words[:place]), f" {word}"
    return None
