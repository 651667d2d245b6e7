"""Human comparisons: what one is, what makes it unusable, how a set is cleaned and stored.

A comparison is a prompt with K >= 2 responses that a person put in order (k-way rankings as in Ouyang et
al. 2022, "Training language models to follow instructions with human feedback", section 3.5; K = 2 is the
pair of Bai et al. 2022, "Training a Helpful and Harmless Assistant"). Readers of the public formats live in
``rlhf.data.readers``; everything after the reading sees only :class:`Comparison`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf.runs.artifacts import write_jsonl

ROLES = ("system", "user", "assistant")
OnBadRows = Literal["stop", "skip"]
Repeats = Literal["once", "votes"]
"""Whether the same pair with the same verdict counts once or as a vote each time."""
DUPLICATE = "duplicate comparison"


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt = tuple[Message, ...]


Item = TypeVar("Item")


@dataclass(frozen=True)
class Comparison:
    """K responses to one prompt, in the order in which a person (or a judge) preferred them.

    prompt: the dialogue before the response; its last message is the user's (a plain text to continue is
    one user message). ranks: one integer per response, 0 = best, equal = tie. source: the data set, for
    statistics per source. confidence: how sure the annotator was, in [0, 1]; None = not recorded.
    group: what belongs together beyond the prompt (a debate, an item of a benchmark); None = nothing does.
    The constructor accepts anything: :func:`problem` says whether a comparison can be used.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str
    confidence: float | None = None
    group: str | None = None


def problem(comparison: Comparison) -> str | None:
    """The reason why a comparison cannot be used, or None if it can.

    Reasons are fixed phrases, so that they can be counted.
    """
    return next(_problems(comparison), None)


def _problems(comparison: Comparison) -> Iterator[str]:
    responses, ranks, confidence = comparison.responses, comparison.ranks, comparison.confidence
    if reason := prompt_problem(comparison.prompt):
        yield reason
    if len(responses) < 2:
        yield "fewer than 2 responses"
    if not all(response.strip() for response in responses):
        yield "empty response"
    if not all(map(_is_unicode, (*responses, comparison.source))):
        yield "text that is not valid Unicode (a lone surrogate)"
    if len(ranks) != len(responses):
        yield "the number of ranks is not the number of responses"
    if any(not _is_number(rank, int) or rank < 0 for rank in ranks):
        yield "a rank is not an integer >= 0"
    if len(set(ranks)) == 1:
        yield "all responses are tied, which says nothing about preference"
    # NaN, for which every comparison is false, is refused too
    if confidence is not None and not (_is_number(confidence, int, float) and 0 <= confidence <= 1):
        yield "confidence outside [0, 1]"
    if comparison.group is not None and not _is_unicode(comparison.group):
        yield "text that is not valid Unicode (a lone surrogate)"


def is_usable(response: str) -> bool:
    """Whether a response says something, in valid Unicode."""
    return bool(response.strip()) and _is_unicode(response)


def usable_part(comparison: Comparison) -> Comparison:
    """The comparison without unusable responses; as it is where fewer than two would be left."""
    places = [i for i, response in enumerate(comparison.responses) if is_usable(response)]
    if len(places) in (0, 1, len(comparison.responses)) or len(comparison.ranks) != len(comparison.responses):
        return comparison
    responses = tuple(comparison.responses[i] for i in places)
    ranks = tuple(comparison.ranks[i] for i in places)
    return replace(comparison, responses=responses, ranks=ranks)


def _is_number(value: object, *kinds: type) -> bool:
    """Whether a value is of these types; a bool is an int to Python, but a row means something else by it."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def prompt_problem(prompt: Prompt) -> str | None:
    """The reason why a prompt cannot be used, or None.

    Only the last user turn has to say something: real transcripts hold turns in which nobody spoke, and
    such a turn is part of what the annotator saw.
    """
    if not prompt:
        return "empty prompt"
    for message in prompt:
        if message.role not in ROLES:
            return f"unknown role {message.role[:40]!r} (known: {', '.join(ROLES)})"
    if prompt[-1].role != "user":
        return "the prompt does not end in a user turn"
    if not prompt[-1].content.strip():
        return "empty prompt"
    if not all(_is_unicode(message.content) for message in prompt):
        return "text that is not valid Unicode (a lone surrogate)"
    return None


def _is_unicode(text: str) -> bool:
    """JSON can carry half of a UTF-16 pair, which no tokenizer and no UTF-8 file can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def prompt_key(prompt: Prompt) -> str:
    """SHA-256 (hex) of roles and contents; white space at the ends of a content does not count."""
    # ASCII JSON is unambiguous about where a message ends, and encodes every str.
    text = json.dumps([[message.role, message.content.strip()] for message in prompt])
    return hashlib.sha256(text.encode("ascii")).hexdigest()


_COLUMNS = 20  # names of columns that are counted: a file may have a new one in every row


def _printable(name: str) -> str:
    """The beginning of a name on one line, escaped where it is not Unicode."""
    return " ".join(name.encode("utf-8", "backslashreplace").decode()[:60].split())


@dataclass
class Counts:
    """What became of the items of a reading: ``read`` = ``kept`` + the sum of ``dropped`` by reason.

    An item is one comparison (or prompt); a row that cannot be read at all counts as one item.
    ``duplicate_responses`` and ``unusable_responses`` (empty, or invalid) count responses taken out of
    comparisons that stayed, ``unused`` the rows in which a column holds something that is not read, by its
    name (the first ``_COLUMNS`` of them).
    """

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    duplicate_responses: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    unusable_responses: int = 0

    @property
    def kept(self) -> int:
        """Items read and not dropped."""
        return self.read - sum(self.dropped.values())

    def drop(self, reason: str, number: int = 1) -> None:
        """Count ``number`` of the items already in ``read`` as dropped for ``reason``."""
        self.dropped[reason] = self.dropped.get(reason, 0) + number

    def note_unused(self, columns: Iterable[str]) -> None:
        """Count a row whose columns of these names are not read."""
        for name in map(_printable, columns):
            if name in self.unused or len(self.unused) < _COLUMNS:
                self.unused[name] = self.unused.get(name, 0) + 1

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """The counts as JSON-able values, for a manifest."""
        counts = {**asdict(self), "kept": self.kept}
        optional = ("unused", "unusable_responses")
        return {name: x for name, x in counts.items() if x or name not in optional}

    def __str__(self) -> str:
        line = f"read {self.read:,}, kept {self.kept:,}, dropped {sum(self.dropped.values()):,}"
        if self.dropped:
            line += " (" + "; ".join(f"{number:,} {reason}" for reason, number in self.dropped.items()) + ")"
        if self.duplicate_responses:
            line += f", duplicate responses removed {self.duplicate_responses:,}"
        if self.unusable_responses:
            line += f", empty or invalid responses removed {self.unusable_responses:,}"
        if self.unused:
            columns = ", ".join(f"{name} ({rows:,})" for name, rows in self.unused.items())
            line += f"; columns not used (in rows): {columns}"
        return line


def deduplicate(
    comparisons: Iterable[Comparison], counts: Counts, repeats: Repeats = "once"
) -> list[Comparison]:
    """Remove repeated responses inside a comparison, then repeated comparisons; the first one stays.

    A response that stands twice in one comparison keeps its better rank. A comparison left with one
    response, or with ties only, is dropped. Two comparisons are the same when prompt, responses and their
    order of preference are, however the responses are listed, and the group is (an item of a benchmark may
    repeat a text of another style); source and confidence do not count. Under repeats="votes" repeated pairs
    stay: each is a vote.
    The ranks of the result are dense (0, 1, 2, ... without gaps). White space at the ends of a text does
    not make it another text.

    ``counts`` is the tally of the reading that gave ``comparisons`` (they are in ``counts.read``).
    """
    kept: list[Comparison] = []
    seen: set[tuple[str, str | None, tuple[tuple[int, str], ...]]] = set()
    for comparison in comparisons:
        distinct = distinct_responses(comparison)
        if len(distinct.responses) < 2:
            counts.drop("all responses are the same text")
            continue
        if len(set(distinct.ranks)) < 2:
            counts.drop("only ties are left without duplicate responses")
            continue
        texts = (response.strip() for response in distinct.responses)
        key = (
            prompt_key(distinct.prompt),
            distinct.group,
            tuple(sorted(zip(distinct.ranks, texts, strict=True))),
        )
        if key in seen and (repeats == "once" or len(distinct.responses) > 2):
            counts.drop(DUPLICATE)
            continue
        seen.add(key)
        counts.duplicate_responses += len(comparison.responses) - len(distinct.responses)
        kept.append(distinct)
    return kept


def distinct_responses(comparison: Comparison, identity: Callable[[str], Hashable] = str.strip) -> Comparison:
    """Responses of one identity as one, with its better rank; ranks become dense."""
    best: dict[Hashable, tuple[int, str]] = {}  # identity -> (best rank, text as first written)
    for response, rank in zip(comparison.responses, comparison.ranks, strict=True):
        key = identity(response)
        best[key] = (min(rank, best[key][0]), best[key][1]) if key in best else (rank, response)
    dense = {rank: index for index, rank in enumerate(sorted({rank for rank, _ in best.values()}))}
    return replace(
        comparison,
        responses=tuple(response for _, response in best.values()),
        ranks=tuple(dense[rank] for rank, _ in best.values()),
    )


def drawn(items: Sequence[Item], number: int | None, seed: int) -> list[Item]:
    """That many items, drawn without replacement; None = all as they stand. Fewer are a beginning of more."""
    if number is None:
        return list(items)
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[i] for i in order[:number]]


def at_most(items: list[Item], number: int | None, seed: int, counts: Counts, key: str) -> list[Item]:
    """All items, or that many drawn without replacement; the others are counted as beyond ``key``."""
    if not number or len(items) <= number:
        return items
    counts.drop(f"beyond {key}", len(items) - number)
    return random.Random(seed).sample(items, number)


def reservoir_sample(items: Iterable[Item], number: int, chance: random.Random) -> list[Item]:
    """A uniform sample (algorithm R, Waterman in Knuth 1981, section 3.4.2); all where there are no more."""
    kept: list[Item] = []
    for seen, item in enumerate(items):
        if seen < number:
            kept.append(item)
        elif (place := chance.randrange(seen + 1)) < number:
            kept[place] = item
    return kept


def write_native(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Write JSON Lines, one comparison a line: see :func:`native_row`.

    The file appears under its name only when it is complete.
    """
    write_jsonl(Path(path), map(native_row, comparisons))


def native_row(comparison: Comparison) -> dict[str, Any]:
    """The comparison as a JSON object; ``group`` is there only where it is set, as confidence always is."""
    row = asdict(comparison)
    if comparison.group is None:
        del row["group"]
    return row
