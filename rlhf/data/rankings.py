"""Pairwise votes over the pool of a prompt as rankings of several responses, by Bradley and Terry's model.

A vote that i is better than j has the chance w_i / (w_i + w_j) (Bradley and Terry 1952). The strengths are
fitted by the MM algorithm of Hunter 2004, "MM algorithms for generalized Bradley-Terry models", equation (3),
with one virtual vote of every item against an item of strength 1, half won and half lost: a response that
never lost stays finite, and few votes say little.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf.data.comparisons import Comparison, Counts, prompt_key
from rlhf.data.split import connected, row_key

ITERATIONS = 5000
TOLERANCE = 1e-12  # of a log strength, from one step to the next
TIED = 1e-9
"""Log strengths nearer than this are equal. The virtual votes pull the middle of a chain of single votes
together: 45 responses, each better than the next, are still told apart."""


def log_strengths(winners_V: ArrayLike, losers_V: ArrayLike, items: int) -> NDArray[np.float64]:
    """Log strengths [items] of the votes "winners_V[v] is better than losers_V[v]", by the module's model.

    winners_V, losers_V: integers in [0, items), one entry per vote; a pair may have several, of both kinds.
    An item without a vote has 0, the log strength of the virtual item. Maximizes

        sum_V log(w_win / (w_win + w_lose)) + sum_i 1/2 log(w_i / (w_i + 1)) + 1/2 log(1 / (w_i + 1)).
    """
    win_V, lose_V = np.asarray(winners_V, dtype=np.intp), np.asarray(losers_V, dtype=np.intp)
    won_I = np.bincount(win_V, minlength=items) + 0.5
    log_I = np.zeros(items)
    for _ in range(ITERATIONS):
        strength_I = np.exp(log_I)
        share_V = 1 / (strength_I[win_V] + strength_I[lose_V])
        met_I = np.bincount(win_V, share_V, items) + np.bincount(lose_V, share_V, items)
        new_I = np.log(won_I / (met_I + 1 / (strength_I + 1)))
        moved, log_I = float(np.abs(new_I - log_I).max(initial=0)), new_I
        if moved < TOLERANCE:
            break
    return log_I


def dealt(items: int, most: int, passes: int, chance: random.Random) -> list[list[int]]:
    """Random groups of at most ``most`` (>= 2) of the items 0, 1, ...: each item once a pass.

    The groups of a pass differ by one item at most; one that would have a single item gets a second one
    anew. No group is given twice.
    """
    if items < 2:
        return []
    found: dict[frozenset[int], list[int]] = {}
    for _ in range(passes if items > most else 1):
        order = list(range(items))
        chance.shuffle(order)
        number = -(-items // most)
        for k in range(number):
            group = order[k::number]
            if len(group) < 2:
                group.append(chance.choice([i for i in order if i != group[0]]))
            found.setdefault(frozenset(group), group)
    return list(found.values())


@dataclass
class RankingCounts:
    """What became of pairwise votes.

    pairs: votes given; prompts: of them; pools: sets of responses that votes connect; rankings: made of
    them; tied: groups of equal strengths, left out; kept: comparisons of more responses that fit the size;
    redealt: those that did not, dealt into rankings of their own order; agreement: share of the votes with
    which the fit agrees, equal strengths half; None = no votes.
    """

    pairs: int = 0
    prompts: int = 0
    pools: int = 0
    rankings: int = 0
    tied: int = 0
    kept: int = 0
    redealt: int = 0
    agreement: float | None = None

    def as_dict(self) -> dict[str, int | float | None]:
        """For a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        line = f"rankings: {self.pairs:,} pairs over {self.pools:,} pools of {self.prompts:,} prompts"
        line += f" and {self.redealt:,} longer comparisons" if self.redealt else ""
        line += f" became {self.rankings:,} rankings"
        line += f", {self.tied:,} tied ones left out" if self.tied else ""
        line += f"; {self.kept:,} comparisons of more than two stay as they are" if self.kept else ""
        if self.agreement is not None:
            line += f"; the Bradley-Terry fit agrees with the vote in {self.agreement:.3f} of the pairs"
        return line


def as_rankings(
    comparisons: Sequence[Comparison], most: int, passes: int, seed: int
) -> tuple[list[Comparison], RankingCounts]:
    """Rankings of at most ``most`` responses in place of pairs, each response in ``passes`` of them.

    The pairs of a prompt make pools: responses that votes connect, directly or over others. Each pool is
    fitted and dealt by itself, so that nothing is ranked that no vote connects. A comparison of more
    responses stays, or is dealt into rankings where it has more than ``most``. A pair that stands several
    times is as many votes. A ranking has the source and
    the group that all its pool has, else the first source and no group, and no confidence. What is dealt
    depends on the pool and the seed, not on other prompts.
    """
    counts, agreed = RankingCounts(), 0.0
    votes: dict[str, list[Comparison]] = {}
    made: list[Comparison] = []

    def deal(like: Comparison, texts: Sequence[str], level_I: Sequence[int], name: str) -> None:
        groups = dealt(len(texts), most, passes, random.Random(f"{seed}:{name}"))
        found = [c for group in groups if (c := _ranking(like, texts, level_I, group))]
        counts.rankings += len(found)
        counts.tied += len(groups) - len(found)
        made.extend(found)

    for c in comparisons:
        if len(c.responses) == 2:
            votes.setdefault(prompt_key(c.prompt), []).append(c)
        elif len(c.responses) <= most:
            counts.kept += 1
            made.append(c)
        else:
            counts.redealt += 1
            deal(c, c.responses, c.ranks, row_key(c))
    for key, of_prompt in votes.items():
        counts.prompts += 1
        counts.pairs += len(of_prompt)
        pools: dict[str, list[Comparison]] = {}
        names = connected([[response.strip() for response in c.responses] for c in of_prompt])
        for name, vote in zip(names, of_prompt, strict=True):
            pools.setdefault(name, []).append(vote)
        for name, pool in pools.items():
            counts.pools += 1
            texts, level_I, agree = _fitted(pool)
            agreed += agree
            group = pool[0].group if len({c.group for c in pool}) == 1 else None
            deal(replace(pool[0], confidence=None, group=group), texts, level_I, f"{key}:{name}")
    counts.agreement = agreed / counts.pairs if counts.pairs else None
    return made, counts


def decided(votes: Sequence[Comparison], counts: Counts) -> list[Comparison]:
    """Each pair once, as more than half of the votes on it say; longer comparisons as they are.

    Votes on one pair have the prompt, the group and both responses in common. Where there are several, the
    first that says what most say stays, with their share as its confidence; without a majority none does.
    """
    on_pair: dict[tuple[str, str | None], list[Comparison]] = {}
    for number, c in enumerate(votes):
        key = row_key(c) if len(c.responses) == 2 else str(number)
        on_pair.setdefault((key, c.group), []).append(c)
    found = []
    for same in on_pair.values():
        winner, most = Counter(_better(c) for c in same).most_common(1)[0]
        first = next(c for c in same if _better(c) == winner)
        if len(same) == 1:
            found.append(first)
            continue
        counts.drop("further votes on a pair", len(same) - 1)
        if most * 2 > len(same):
            found.append(replace(first, confidence=most / len(same)))
        else:
            counts.drop("votes without a majority")
    return found


def _better(c: Comparison) -> str:
    return c.responses[c.ranks.index(min(c.ranks))].strip()


def _fitted(pool: Sequence[Comparison]) -> tuple[list[str], list[int], float]:
    """Texts of the pool's responses, their levels (0 the best), and with how many votes the levels agree.

    The texts are in alphabetical order, so that what is dealt does not depend on that of the votes.
    """
    texts = sorted({response.strip() for c in pool for response in c.responses})
    place = {text: i for i, text in enumerate(texts)}
    better = [sorted(zip(c.ranks, c.responses, strict=True)) for c in pool]
    win_V, lose_V = (np.array([place[pair[side][1].strip()] for pair in better]) for side in (0, 1))
    level_I = levels(log_strengths(win_V, lose_V, len(texts)))
    agree = float((np.sign(level_I[lose_V] - level_I[win_V]) / 2 + 0.5).sum())
    return texts, level_I.tolist(), agree


def levels(log_I: NDArray[np.float64]) -> NDArray[np.intp]:
    """Places of log strengths, 0 = the strongest; neighbors nearer than :data:`TIED` share one."""
    order = np.argsort(-log_I, kind="stable")
    level_I = np.empty(log_I.size, dtype=np.intp)
    level_I[order] = np.concatenate([[0], np.cumsum(-np.diff(log_I[order]) > TIED)])
    return level_I


def _ranking(
    like: Comparison, texts: Sequence[str], level_I: Sequence[int], group: Sequence[int]
) -> Comparison | None:
    """The group's responses by their levels, the best first; None where all are equal."""
    order = sorted(group, key=lambda i: (level_I[i], i))
    dense = {level: rank for rank, level in enumerate(dict.fromkeys(level_I[i] for i in order))}
    ranks = tuple(dense[level_I[i]] for i in order)
    return replace(like, responses=tuple(texts[i] for i in order), ranks=ranks) if len(dense) > 1 else None
