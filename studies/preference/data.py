"""A grammar whose sentences have a known quality, and the comparisons, corpora and ranked sets drawn from it.

A sentence is  START topic x x x ... END:  seven content words and up to three fillers in random order. The
topic says which half of the content words fits it (a random table, the world's rule); the latent QUALITY is
the number of the seven words that fit, 0..7. Fillers, word frequencies (some words are commoner than others,
whether they fit or not) and the order of the words are distractors: they vary and say nothing about quality.
The topic plays the prompt: both sides of a comparison have the same one.

Suffixes: ``_N`` sentence, ``_S`` content word (slot) in order of appearance, ``_T`` token. Better scores are
higher. Everything is a function of the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Part = Literal["train", "held_out"]

PAD, END, START, GOOD, BAD = range(5)
TOPICS, FILLERS, WORDS = 6, 6, 32
FIRST_TOPIC = 5
FIRST_FILLER = FIRST_TOPIC + TOPICS
FIRST_WORD = FIRST_FILLER + FILLERS
VOCABULARY = FIRST_WORD + WORDS

SLOTS, MOST_FILLERS = 7, 3
WIDTH = 2 + SLOTS + MOST_FILLERS + 1  # START, topic, words and fillers, END
LEVELS = SLOTS + 1
# Every sentence has a skill from Beta(2, 1), with which each of its words fits: a beta-binomial quality.
QUALITY_PRIOR: Floats = np.arange(1.0, LEVELS + 1) / (LEVELS * (LEVELS + 1) // 2)  # (q + 1) / 36
FREQUENCY_EXPONENT = 0.5  # the word of rank k has weight 1 / k^0.5
HELD_OUT_SHARE = 5  # one sentence in five can only be held out, the others can only be trained on


@dataclass(frozen=True)
class World:
    """What the words mean. fits[topic, word]: half of the words fit each topic; frequency[word] sums to 1."""

    fits: Bools
    frequency: Floats


@dataclass(frozen=True)
class Sentences:
    """Sentences with their latent values.

    ids_NT: tokens, PAD behind END. mask_NT: True = a token. topic_N: 0..7. valid_NS: whether each content
    word fits, in order of appearance. fillers_N: how many fillers. log_p_N: log-probability of the sentence
    given its topic under the corpus generator.
    """

    ids_NT: Ints
    mask_NT: Bools
    topic_N: Ints
    valid_NS: Bools
    fillers_N: Ints
    log_p_N: Floats

    @property
    def quality_N(self) -> Ints:
        """The number of content words that fit the topic, 0..7."""
        return self.valid_NS.sum(axis=1)

    def __len__(self) -> int:
        return len(self.topic_N)

    def take(self, index: NDArray[np.generic]) -> Sentences:
        """The sentences at these places (integers or a bool mask)."""
        return Sentences(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True)
class Pairs:
    """Comparisons: sentence i of ``good`` was preferred to sentence i of ``bad``; both have one topic."""

    good: Sentences
    bad: Sentences

    def __len__(self) -> int:
        return len(self.good)

    def take(self, index: NDArray[np.generic]) -> Pairs:
        """The pairs at these places."""
        return Pairs(self.good.take(index), self.bad.take(index))


def make_world(rng: np.random.Generator) -> World:
    """Draw the rule (each topic accepts a random half of the words) and which words are common."""
    fits = np.zeros((TOPICS, WORDS), dtype=bool)
    for topic in range(TOPICS):
        fits[topic, rng.permutation(WORDS)[: WORDS // 2]] = True
    weight = (1.0 + rng.permutation(WORDS)) ** -FREQUENCY_EXPONENT
    return World(fits, weight / weight.sum())


def sample(
    world: World, topic_N: Ints, rng: np.random.Generator, *, part: Part, quality: Ints | None = None
) -> Sentences:
    """Draw one sentence for every topic; all of them belong to ``part``.

    quality: how many words of each sentence shall fit; None draws it from QUALITY_PRIOR. A sentence of the
    wrong part is drawn again with its topic and quality, so neither distribution depends on the part.
    """
    q_N = rng.choice(LEVELS, len(topic_N), p=QUALITY_PRIOR) if quality is None else quality
    drawn = _draw(world, topic_N, q_N, rng)
    wrong = np.flatnonzero(part_of(drawn.ids_NT) != part)
    while wrong.size:
        again = _draw(world, topic_N[wrong], q_N[wrong], rng)
        for field in fields(drawn):
            getattr(drawn, field.name)[wrong] = getattr(again, field.name)
        wrong = wrong[part_of(again.ids_NT) != part]
    return drawn


def part_of(ids_NT: Ints) -> NDArray[np.str_]:
    """The part every sentence belongs to: it follows from its tokens alone, so the parts cannot overlap."""
    digest = np.zeros(len(ids_NT), dtype=np.uint64)
    for column in ids_NT.T.astype(np.uint64):
        digest = (digest ^ column) * np.uint64(0x9E3779B97F4A7C15)
        digest ^= digest >> np.uint64(29)
    return np.where(digest % np.uint64(HELD_OUT_SHARE) == 0, "held_out", "train")


def corpus(world: World, n: int, rng: np.random.Generator) -> Sentences:
    """Text without preference for language modelling: any topic, any quality."""
    return sample(world, rng.integers(TOPICS, size=n), rng, part="train")


def ranked_pairs(
    world: World, n: int, rng: np.random.Generator, *, part: Part, reverse: bool = False
) -> Pairs:
    """Draw n pairs of sentences of one topic whose quality differs; the better one is the good side.

    The same quality is the good side of one pair and the bad side of another. reverse: the good side is the
    one in which fewer words fit, the opposite order of the same levels.
    """
    sign = -1 if reverse else 1
    return _pairs(world, n, rng, part, lambda sentences: sign * sentences.quality_N)


def shifted_pairs(world: World, n: int, rng: np.random.Generator, *, part: Part) -> Pairs:
    """Draw n pairs that differ in :func:`shifted_score`; the higher score is the good side."""
    return _pairs(world, n, rng, part, shifted_score)


def shifted_score(sentences: Sentences) -> Ints:
    """The shifted preference: how many of the last four words fit, less the number of disliked fillers.

    It shares the rule with the quality, weighs it differently (the first three words do not count) and adds
    what the quality ignores: the first half of the fillers is disliked.
    """
    disliked_NT = (sentences.ids_NT >= FIRST_FILLER) & (sentences.ids_NT < FIRST_FILLER + FILLERS // 2)
    return sentences.valid_NS[:, -4:].sum(axis=1) - disliked_NT.sum(axis=1)


def binary_pairs(world: World, n: int, rng: np.random.Generator, *, part: Part, most_wrong: int = 2) -> Pairs:
    """Draw n pairs of a valid sentence (all words fit) and a corrupted one (1..most_wrong words do not)."""
    topic_N = rng.integers(TOPICS, size=n)
    bad_N = SLOTS - rng.integers(1, most_wrong + 1, size=n)
    return Pairs(
        sample(world, topic_N, rng, part=part, quality=np.full(n, SLOTS)),
        sample(world, topic_N, rng, part=part, quality=bad_N),
    )


def noisy_pairs(world: World, n: int, rng: np.random.Generator, *, part: Part, sharpness: float) -> Pairs:
    """Draw n pairs of any qualities, labelled by the Bradley-Terry model of the score sharpness * quality.

    P(first is the good side) = sigmoid(sharpness * (quality of first - quality of second)).
    """
    topic_N = rng.integers(TOPICS, size=n)
    first, second = (sample(world, topic_N, rng, part=part) for _ in range(2))
    p_first = 1.0 / (1.0 + np.exp(-sharpness * (first.quality_N - second.quality_N)))
    return _by_label(first, second, rng.random(n) < p_first)


def in_random_order(pairs: Pairs, rng: np.random.Generator) -> Pairs:
    """The same pairs with labels that mean nothing: each is turned round with probability 1/2."""
    return _by_label(pairs.good, pairs.bad, rng.random(len(pairs)) < 0.5)


def ranked_sets(
    world: World, n: int, k: int, rng: np.random.Generator, *, part: Part, sharpness: float
) -> tuple[Sentences, Ints]:
    """Draw n prompts with k sentences each, and a noisy annotator's ranking of them.

    The annotator sorts by sharpness * quality + Gumbel noise (Plackett-Luce), so each comparison taken alone
    follows the Bradley-Terry model of sharpness * quality. Returns the n * k sentences, those of one prompt
    together, and ranks [n, k], 0 = best, without ties.
    """
    sentences = sample(world, np.repeat(rng.integers(TOPICS, size=n), k), rng, part=part)
    seen = sharpness * sentences.quality_N + rng.gumbel(size=n * k)
    return sentences, (-seen.reshape(n, k)).argsort(axis=1).argsort(axis=1)


def pairs_of_sets(sentences: Sentences, ranks_NK: Ints) -> Pairs:
    """The K (K - 1) / 2 comparisons of every ranked set of :func:`ranked_sets` as pairs of their own."""
    n, k = ranks_NK.shape
    by_rank_NK = ranks_NK.argsort(axis=1) + k * np.arange(n)[:, None]
    better, worse = np.triu_indices(k, k=1)
    return Pairs(sentences.take(by_rank_NK[:, better].ravel()), sentences.take(by_rank_NK[:, worse].ravel()))


def with_control(ids_NT: Ints, token: int) -> Ints:
    """Put a control token (GOOD or BAD) where START stands."""
    changed = ids_NT.copy()
    changed[:, 0] = token
    return changed


def perfect_imitation(sentences: Sentences, prior: Floats = QUALITY_PRIOR) -> Floats:
    """Log-probability under a perfect imitation of the good sides of :func:`ranked_pairs`, up to a constant.

    The good side of a pair is a sentence of the corpus that met a worse one:
    p_good(x) = p_corpus(x) * P(quality of another < quality of x) * constant.
    """
    worse = np.concatenate([[0.0], prior.cumsum()[:-1]])
    with np.errstate(divide="ignore"):
        return sentences.log_p_N + np.log(worse)[sentences.quality_N]


def _pairs(
    world: World, n: int, rng: np.random.Generator, part: Part, score: Callable[[Sentences], Ints]
) -> Pairs:
    kept: list[Pairs] = []
    missing = n
    while missing > 0:
        topic_N = rng.integers(TOPICS, size=missing)
        first, second = (sample(world, topic_N, rng, part=part) for _ in range(2))
        gap = score(first) - score(second)
        kept.append(_by_label(first, second, gap > 0).take(gap != 0))
        missing -= len(kept[-1])
    return Pairs(_join([p.good for p in kept]), _join([p.bad for p in kept]))


def _by_label(first: Sentences, second: Sentences, first_wins: Bools) -> Pairs:
    both = _join([first, second])
    n = len(first)
    here = np.arange(n)
    return Pairs(
        both.take(np.where(first_wins, here, here + n)), both.take(np.where(first_wins, here + n, here))
    )


def _join(parts: list[Sentences]) -> Sentences:
    return Sentences(
        **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Sentences)}
    )


def _draw(world: World, topic_N: Ints, quality_N: Ints, rng: np.random.Generator) -> Sentences:
    n = len(topic_N)
    here = np.arange(n)[:, None]
    valid_NS = rng.random((n, SLOTS)).argsort(axis=1) < quality_N[:, None]
    weight_NSW = np.where(world.fits[topic_N][:, None, :] == valid_NS[:, :, None], world.frequency, 0.0)
    weight_NSW /= weight_NSW.sum(axis=2, keepdims=True)
    word_NS = (weight_NSW.cumsum(axis=2) < rng.random((n, SLOTS, 1))).sum(axis=2).clip(0, WORDS - 1)
    log_word_NS = np.log(np.take_along_axis(weight_NSW, word_NS[:, :, None], axis=2)[:, :, 0])

    fillers_N = rng.integers(MOST_FILLERS + 1, size=n)
    body = SLOTS + MOST_FILLERS
    key_NT = rng.random((n, body))
    key_NT[:, :SLOTS].sort(axis=1)  # the words keep their order among the fillers
    unused = np.arange(body) >= (SLOTS + fillers_N)[:, None]
    key_NT[unused] = 2.0
    token_NT = np.concatenate(
        [FIRST_WORD + word_NS, FIRST_FILLER + rng.integers(FILLERS, size=(n, MOST_FILLERS))], axis=1
    )
    ids_NT = np.full((n, WIDTH), PAD, dtype=np.int64)
    ids_NT[:, 0], ids_NT[:, 1] = START, FIRST_TOPIC + topic_N
    ids_NT[:, 2:-1] = np.where(np.sort(key_NT, axis=1) < 2.0, token_NT[here, key_NT.argsort(axis=1)], PAD)
    length_N = 2 + SLOTS + fillers_N
    ids_NT[np.arange(n), length_N] = END
    arrangements = np.array([comb(SLOTS + f, f) for f in range(MOST_FILLERS + 1)])[fillers_N]
    patterns = np.array([comb(SLOTS, q) for q in range(LEVELS)])[quality_N]
    log_p_N = (
        log_word_NS.sum(axis=1)
        + np.log(QUALITY_PRIOR[quality_N] / patterns)
        - np.log((MOST_FILLERS + 1) * arrangements * float(FILLERS) ** fillers_N)
    )
    mask_NT = np.arange(WIDTH) <= length_N[:, None]
    return Sentences(ids_NT, mask_NT, topic_N.copy(), valid_NS, fillers_N, log_p_N)
