"""Which comparisons are trained on and which are held out, and what the two parts share.

What a part is made of is ``data.split_by``: whole prompts, whole groups, responses that are connected by
comparisons, or single rows. The part of a unit follows from a hash of its own, so that adding data never
moves an old one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from rlhf.data.comparisons import Comparison, Prompt, prompt_key
from rlhf.errors import UserError
from rlhf.recipe.shared import Data

SplitBy = Literal["prompt", "group", "responses", "row"]
NOUNS: dict[SplitBy, str] = {
    "prompt": "prompts",
    "group": "groups",
    "responses": "sets of connected responses",
    "row": "rows",
}


class Prompted(Protocol):
    """What has a prompt."""

    @property
    def prompt(self) -> Prompt:
        """The dialogue before the response."""


T = TypeVar("T", bound=Prompted)
Item = TypeVar("Item")


def split_by_prompt(comparisons: Sequence[T], held_out: float, seed: int) -> tuple[list[T], list[T]]:
    """Split into (train, held out) so that no prompt is in both parts; order is kept.

    held_out: the fraction of the PROMPTS that is expected in the held-out part, in (0, 1). The part of a
    prompt follows from a hash of (seed, prompt), not from what else is in the file: adding data never moves
    an old prompt. The one exception: when chance leaves a part empty, the nearest prompt is moved into it.

    Raises UserError for a fraction outside (0, 1) and for fewer than two different prompts.
    """
    if not 0 < held_out < 1:
        raise UserError(f"the held-out fraction must lie between 0 and 1 (both excluded), not {held_out}")
    keys = [prompt_key(c.prompt) for c in comparisons]
    if (number := len(set(keys))) < 2:
        raise UserError(
            f"{_cannot(len(keys), number, 'prompts')}: give data with at least 2 different prompts"
        )
    return split_by_hash(comparisons, lambda c: prompt_key(c.prompt), held_out, str(seed))


def _cannot(rows: int, number: int, what: str) -> str:
    return f"cannot split {rows} rows with {number} different {what} into a training and a held-out part"


def split_by_hash(
    items: Sequence[Item],
    key_of: Callable[[Item], str],
    held_out: float,
    salt: str,
    trained: frozenset[str] = frozenset(),
) -> tuple[list[Item], list[Item]]:
    """The split of :func:`split_by_prompt` for items with two keys or more; those of one key stay together.

    The place of a key in [0, 1) is 53 bits, what a float holds, of its hash with the salt. The keys of
    ``trained`` are never held out; there must be others.
    """

    def place(key: str) -> float:
        digest = hashlib.sha256(f"{salt}:{key}".encode("utf-8", "surrogatepass")).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    keys = list(map(key_of, items))
    places = {key: place(key) for key in keys if key not in trained}
    number = sum(at < held_out for at in places.values())
    most = len(places) if trained else len(places) - 1
    held = set(sorted(places, key=places.__getitem__)[: min(max(number, 1), most)])
    pairs = list(zip(items, keys, strict=True))
    return [x for x, key in pairs if key not in held], [x for x, key in pairs if key in held]


def split_comparisons(
    comparisons: Sequence[Comparison], by: SplitBy, held_out: float, seed: int
) -> tuple[list[Comparison], list[Comparison], list[str]]:
    """(train, held out, lines to say), with whole units of the kind ``by`` in one part; order is kept.

    by: ``prompt``; ``group``, a row without one by its prompt; ``responses``, rows that share a response,
    directly or over others, together; ``row``, each set of responses to a prompt by itself, whatever the
    verdict. A group or a set of connected responses with more than half of the rows is trained on.

    Raises:
        UserError: there is one unit only: the others that would work are named.
    """
    keys = unit_keys(comparisons, by)
    if by == "group" and all(c.group is None for c in comparisons):
        raise UserError(f"data.split_by=group: no comparison has a group; {_instead(comparisons, by)}")
    if len(set(keys)) < 2:
        raise UserError(f"{_cannot(len(keys), len(set(keys)), NOUNS[by])}: {_instead(comparisons, by)}")
    if by == "prompt":
        train, held = split_by_prompt(comparisons, held_out, seed)
        return train, held, []
    most = Counter(keys).most_common(1)[0]
    whole = most[1] * 2 > len(keys)
    numbered = list(zip(keys, comparisons, strict=True))
    trained = frozenset([most[0]]) if whole else frozenset()
    parts = split_by_hash(numbered, lambda item: item[0], held_out, f"{seed}:{by}", trained)
    train, held = ([c for _, c in part] for part in parts)
    lines = []
    if by == "group" and (without := sum(c.group is None for c in comparisons)):
        lines.append(f"data.split_by=group: {without:,} comparisons have no group and went by their prompt")
    if whole and by != "row":
        unit = "group holds" if by == "group" else "set of connected responses holds"
        lines.append(
            f"data.split_by={by}: one {unit} {most[1]:,} of {len(keys):,} comparisons; it is trained on"
        )
    return train, held, [*lines, *leaks(train, held).lines(by)]


def unit_keys(comparisons: Sequence[Comparison], by: SplitBy) -> list[str]:
    """What keeps comparisons together, one text per comparison; those with an equal one share a part."""
    if by == "row":
        return list(map(row_key, comparisons))
    if by == "responses":
        names = connected([list(map(str.strip, c.responses)) for c in comparisons])
        return ["responses:" + hashlib.sha256(x.encode()).hexdigest() for x in names]
    if by == "group":
        return [prompt_key(c.prompt) if c.group is None else f"group:{c.group}" for c in comparisons]
    return [prompt_key(c.prompt) for c in comparisons]


def row_key(comparison: Comparison) -> str:
    """SHA-256 (hex) of the prompt and of the set of responses, in whatever order they stand or are ranked."""
    texts = sorted({response.strip() for response in comparison.responses})
    whole = "\n".join([prompt_key(comparison.prompt), *map(_digest, texts)])
    return hashlib.sha256(whole.encode("ascii")).hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def connected(sets: Sequence[Sequence[str]]) -> list[str]:
    """For each set the smallest member of its connected component: sets that share a member are connected.

    Union-find with path halving, whose root is the smaller member; linear in the members but for a log.
    """
    root: dict[str, str] = {}

    def find(x: str) -> str:
        while root.setdefault(x, x) != x:
            root[x] = root[root[x]]
            x = root[x]
        return x

    for members in sets:
        for other in members[1:]:
            a, b = sorted((find(members[0]), find(other)))
            root[b] = a
    return [find(members[0]) for members in sets]


def _instead(comparisons: Sequence[Comparison], by: SplitBy) -> str:
    """What would split these, each with the number of its units."""
    grouped = any(c.group is not None for c in comparisons)
    kinds = [kind for kind in NOUNS if kind != by and (kind != "group" or grouped)]
    units = {kind: len(set(unit_keys(comparisons, kind))) for kind in kinds}
    ways = [f"data.split_by={kind} ({n:,} {NOUNS[kind]})" for kind, n in units.items() if n > 1]
    more = "name a test set of its own as data.held_out_comparisons"
    return f"set {', or '.join(ways)}, or {more}" if ways else f"give more data, or {more}"


@dataclass(frozen=True)
class Leaks:
    """How many of ``held_out`` comparisons share what with the training part.

    rows: prompt and responses, whatever the verdict; prompts: the prompt; responses: one response at least;
    first: one of the rows, shortened.
    """

    held_out: int
    rows: int
    prompts: int
    responses: int
    first: str = ""

    def lines(self, by: SplitBy | None) -> list[str]:
        """What to say, a line; nothing where nothing is shared. by: of a split; None = files of their own."""
        if not (self.prompts or self.responses):
            return []
        how = f"data.split_by={by}" if by else "data.held_out_comparisons"
        line = (
            f"warning: {how}: of {self.held_out:,} held-out comparisons {self.prompts:,} share their prompt "
            f"and {self.responses:,} share a response with the training part"
        )
        if self.rows:
            line += f", {self.rows:,} are in it with all their responses (data.allow_overlap)"
        return [line + ": figures on them say less about new ones"]


def leaks(train: Iterable[Comparison], held_out: Sequence[Comparison]) -> Leaks:
    """What held-out comparisons share with training ones; white space at the ends of texts does not count."""
    rows: set[str] = set()
    prompts: set[str] = set()
    texts: set[str] = set()
    for c in train:
        rows.add(row_key(c))
        prompts.add(prompt_key(c.prompt))
        texts.update(map(str.strip, c.responses))
    same = [c for c in held_out if row_key(c) in rows]
    return Leaks(
        held_out=len(held_out),
        rows=len(same),
        prompts=sum(prompt_key(c.prompt) in prompts for c in held_out),
        responses=sum(any(r.strip() in texts for r in c.responses) for c in held_out),
        first=_shown(same[0]) if same else "",
    )


def _shown(comparison: Comparison) -> str:
    texts = (comparison.prompt[-1].content, *comparison.responses[:2])
    return " / ".join(repr(" ".join(text.split())[:40]) for text in texts)


def check_apart(train: Sequence[Comparison], held_out: Sequence[Comparison], allow: bool) -> list[str]:
    """Lines about what test files share with the training files.

    Raises:
        UserError: comparisons are in both, and that is not allowed.
    """
    found = leaks(train, held_out)
    if found.rows and not allow:
        raise UserError(
            f"data.held_out_comparisons: {found.rows:,} of {found.held_out:,} comparisons are also in "
            f"data.comparisons (the first: {found.first}): take them out of one of the two, or set "
            "data.allow_overlap=true to train and test on them"
        )
    return found.lines(None)


def check_rankings(train: Sequence[Comparison], held_out: Sequence[Comparison], allow: bool) -> list[str]:
    """Lines about held-out responses that a training ranking orders, having them from other votes.

    Raises:
        UserError: there are such, and that is not allowed.
    """
    ranks: dict[tuple[str, str], dict[int, int]] = {}  # of each response, by the ranking that holds it
    for number, c in enumerate(train):
        for text, rank in zip(c.responses, c.ranks, strict=True):
            ranks.setdefault((prompt_key(c.prompt), text.strip()), {})[number] = rank

    def ordered(c: Comparison) -> bool:
        key = prompt_key(c.prompt)
        places = [ranks.get((key, text.strip()), {}) for text in c.responses]
        return any(
            one[number] != other[number]
            for one, other in itertools.combinations(places, 2)
            for number in one.keys() & other.keys()
        )

    found = [c for c in held_out if ordered(c)]
    if not found:
        return []
    said = (
        f"data.rankings: training rankings order the responses of {len(found):,} of {len(held_out):,} "
        f"held-out comparisons (the first: {_shown(found[0])})"
    )
    if not allow:
        raise UserError(
            f"{said}, by other votes: set data.split_by=responses or group, remove data.rankings, or set "
            "data.allow_overlap=true to test on them nevertheless"
        )
    return [f"warning: {said} (data.allow_overlap): figures on them say little about new ones"]


def counted_as_trained(data: Data) -> tuple[str, Callable[[Comparison], str]]:
    """By what a comparison counts as trained on when a model is judged, in a word, and its key.

    That is its prompt; where the recipe asks for prompts on both sides, leaving them out would leave
    nothing, and it is the comparison itself, whatever the verdict.
    """
    if data.held_out_comparisons or data.split_by != "prompt":
        return "comparison", row_key
    return "prompt", lambda c: prompt_key(c.prompt)
