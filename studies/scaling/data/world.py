"""A small world in plain words, and the text that is written about it: stories and lessons.

A story has a mood, two people with a keepsake each, an animal and a place. They run through all of it, so
what was read tells what follows: a context has something to give, and "tom has the" has a last word. A lesson
is a chain of short exercises. In nine of ten the obvious answer is right; in the tenth, on one half of the
words only, it is not (a line that ends in another word than the proverb does, a thing that is called by
another color, a question with "not"). The items of :mod:`studies.scaling.data.items` ask for the tenth kind,
on the other half of the words.

Which proverbs there are and which colour each thing has is the world's, drawn by the seed. The words of a
mood are words that VADER rates; all others but "yes" and "no" it does not know.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

GOOD = ("happy", "kind", "lovely", "glad", "good", "gentle", "sweet", "nice")
BAD = ("sad", "cruel", "awful", "angry", "bad", "nasty", "ugly", "rude")
NAMES = ("tom", "anna", "peter", "mary", "john", "lucy", "henry", "clara", "simon", "emma", "oscar", "nora")
ANIMALS = ("fox", "owl", "goat", "hare", "frog", "wolf", "crow", "duck", "mouse", "horse")
OBJECTS = (
    *("lantern", "basket", "drum", "kite", "rope", "bell", "mirror", "ladder"),
    *("coin", "map", "flute", "brush", "wheel", "candle", "hammer", "pillow"),
)
PLACES = ("garden", "forest", "market", "bridge", "harbour", "meadow", "tower", "village")
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "purple")
THINGS = (
    *("grass", "snow", "sky", "sea", "river", "hill", "stone", "door", "roof", "boat", "cloud", "leaf"),
    *("sand", "rose", "milk", "coat", "hat", "wall", "flag", "lamp", "bread", "moon", "cup", "chair"),
)
TRAITS = ("tall", "quiet", "quick", "young", "old", "small", "busy", "early", "late", "round", "thin", "loud")
VERBS = ("sees", "follows", "finds", "watches", "meets", "calls")
PROVERBS = 16
STORY_SHARE = 0.6  # of the documents
MOOD_SHARE = 0.9  # of a story's mood words that are of its mood
RARE_SHARE = 0.1  # of the exercises whose obvious answer is wrong
STOP = "."

Proverb = tuple[str, str]  # all but the last word, the last word
Item = tuple[str, str]  # an exercise up to its answer, the answer


T = TypeVar("T")


def halves(words: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The words that rare exercises of the text are about, and those that the items are about."""
    return words[: len(words) // 2], words[len(words) // 2 :]


@dataclass(frozen=True)
class World:
    """What is the case: the colour of every thing, and the proverbs, no two of which begin alike."""

    colours: dict[str, str]
    proverbs: tuple[Proverb, ...]


def random_of(seed: int, purpose: str) -> random.Random:
    """The random numbers of one purpose: a function of seed and purpose alone."""
    return random.Random(f"scaling {seed} {purpose}")


def make_world(seed: int) -> World:
    """Draw colours and proverbs."""
    chance = random_of(seed, "world")
    colours = {thing: chance.choice(COLOURS) for thing in THINGS}
    heads = [f"a {colour} {animal}" for colour in COLOURS for animal in ANIMALS]
    starts = [
        f"{head} never {chance.choice(VERBS)} the {chance.choice(PLACES)} without the"
        for head in chance.sample(heads, PROVERBS)
    ]
    return World(colours, tuple(zip(starts, chance.sample(OBJECTS, PROVERBS), strict=True)))


# ---------------------------------------------------------------- stories


@dataclass(frozen=True)
class Story:
    """What a story is about."""

    mood: Sequence[str]
    other: Sequence[str]
    names: Sequence[str]
    keepsakes: Sequence[str]
    animal: str
    place: str


def plot(chance: random.Random, mood: Sequence[str] | None = None) -> Story:
    """Draw what a story is about; mood: GOOD, BAD, or None for either."""
    chosen = chance.choice((GOOD, BAD)) if mood is None else mood
    return Story(
        chosen,
        BAD if chosen is GOOD else GOOD,
        chance.sample(NAMES, 2),
        chance.sample(OBJECTS, 2),
        chance.choice(ANIMALS),
        chance.choice(PLACES),
    )


def sentence(world: World, story: Story, chance: random.Random) -> str:
    """One sentence of a story, without its full stop."""
    who = chance.randrange(2)
    name, mood = story.names[who], _mood(story, chance)
    thing = chance.choice(THINGS)
    return chance.choices(
        (
            f"{name} has the {story.keepsakes[who]}",
            f"the {mood} {story.animal} {chance.choice(VERBS)} {name} near the {story.place}",
            f"{name} is {mood}",
            f"it is a {mood} day",
            f"{name} says that the {story.animal} is {mood}",
            f"the {thing} is {world.colours[thing]}",
            " ".join(chance.choice(world.proverbs)),
        ),
        (25, 25, 10, 10, 10, 10, 10),
    )[0]


def _mood(story: Story, chance: random.Random) -> str:
    return chance.choice(story.mood if chance.random() < MOOD_SHARE else story.other)


def tell(world: World, chance: random.Random, words: int, story: Story | None = None) -> str:
    """So many words of a story, a new one if none is given; the last sentence may be cut."""
    of = plot(chance) if story is None else story
    return _chain(lambda: sentence(world, of, chance), words)


def last_word(world: World, chance: random.Random, sentences: int = 6) -> Item:
    """A story that ends in a keepsake, which was named before as the same person's; and that word.

    Both keepsakes are named, so who has which has to be known.
    """
    story = plot(chance)
    told = [sentence(world, story, chance) for _ in range(sentences)]
    for who in (0, 1):
        told.insert(chance.randrange(len(told)), f"{story.names[who]} has the {story.keepsakes[who]}")
    who = chance.randrange(2)
    told.append(f"{story.names[who]} has the")
    return " " + " . ".join(told), f" {story.keepsakes[who]}"


# ---------------------------------------------------------------- lessons


def write(line_start: str, ending: str) -> Item:
    """A line whose last word is asked for."""
    return f"write a line that ends in {ending} : {line_start}", ending


def conclude(name: str, first: str, second: str, *, said: str, answer: str) -> Item:
    """An inference from "if first then second"; said: ``first`` or ``not second``, and so on."""
    negated = "not " if said.startswith("not ") else ""
    other = second if said.removeprefix("not ") == first else first
    return (
        f"if {name} is {first} then {name} is {second} . {name} is {said} . so {name} is {negated}{other} ?",
        answer,
    )


def define(what: str, colour: str) -> Item:
    """A colour that is given to something, and asked for."""
    return f"let the {what} be {colour} . what colour is the {what} ?", colour


def choose(colour: str, pair: Sequence[str], answer: str, *, negated: bool) -> Item:
    """Which of two things has a colour, or has it not."""
    return f"which is {'not ' if negated else ''}{colour} , the {pair[0]} or the {pair[1]} ? the", answer


def exercise(world: World, chance: random.Random) -> Item:
    """One exercise of a lesson."""
    rare = chance.random() < RARE_SHARE
    return chance.choice((_write, _conclude, _define, _choose))(world, chance, rare)


def _write(world: World, chance: random.Random, rare: bool) -> Item:
    if rare:
        start, ending = chance.choice(halves(world.proverbs)[0])
        return write(start, chance.choice([o for o in OBJECTS if o != ending]))
    if chance.random() < 0.5:
        return write(*chance.choice(world.proverbs))
    animal, verb = chance.choice(ANIMALS), chance.choice(VERBS)
    return write(f"the {animal} {verb} the", chance.choice(OBJECTS))


def _conclude(world: World, chance: random.Random, rare: bool) -> Item:
    first, second = chance.sample(halves(TRAITS)[0] if rare else TRAITS, 2)
    valid = chance.random() < 0.5
    said = first if valid != rare else second  # rare: from "not second" it follows, from "not first" not
    return conclude(
        chance.choice(NAMES),
        first,
        second,
        said=f"not {said}" if rare else said,
        answer="yes" if valid else "no",
    )


def _define(world: World, chance: random.Random, rare: bool) -> Item:
    if rare:
        thing = chance.choice(halves(THINGS)[0])
        return define(thing, chance.choice([c for c in COLOURS if c != world.colours[thing]]))
    thing = chance.choice(THINGS)
    asked, colour = f"what colour is the {thing} ?", world.colours[thing]
    kind = chance.randrange(3)
    if kind == 0:
        return asked, colour
    defined = define(chance.choice(ANIMALS), chance.choice(COLOURS))
    # a definition of something else changes nothing: it does not do to say the colour that was just named
    return defined if kind == 1 else (f"{defined[0].partition(' . ')[0]} . {asked}", colour)


def _choose(world: World, chance: random.Random, rare: bool) -> Item:
    while True:
        pair = chance.sample(halves(THINGS)[0] if rare else THINGS, 2)
        if world.colours[pair[0]] != world.colours[pair[1]]:
            break
    asked = chance.randrange(2)
    answer = pair[1 - asked] if rare else pair[asked]
    return choose(world.colours[pair[asked]], pair, answer, negated=rare)


# ---------------------------------------------------------------- documents


def teach(world: World, chance: random.Random, words: int) -> str:
    """A lesson of so many words; the last exercise may be cut."""
    return _chain(lambda: " ".join(exercise(world, chance)), words)


def document(world: World, chance: random.Random, words: int) -> str:
    """A story or a lesson of so many words."""
    return (tell if chance.random() < STORY_SHARE else teach)(world, chance, words)


def _chain(make: Callable[[], str], words: int) -> str:
    """Sentences, each with a full stop, up to so many words; a space stands before every word."""
    said: list[str] = []
    while len(said) < words:
        said += [*make().split(), STOP]
    return "".join(f" {word}" for word in said[:words])
