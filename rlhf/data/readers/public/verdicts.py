"""From votes, grades and their words to ranks; what the readers of published sets share.

Votes: the option with more than half of them wins, "tie" being one; where none has, there is no majority, and
such a row is left out and counted. ``confidence`` is the share of the votes for the winner, set where there
are two votes or more. Grades: the mean over annotators ranks; ``confidence`` is then the share of the
annotators' ordered pairs that agree with the order of the means (an annotator's tie counts half).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from rlhf.data.comparisons import Comparison, Message, Prompt, is_usable
from rlhf.data.readers import hh
from rlhf.data.readers.columns import is_empty, prompt_in
from rlhf.data.readers.rows import BadRow, LeftOut, Row, prompt_of, ranked_by_score

TIE = -1
"""The vote for neither side."""
TIES = frozenset(
    ("tie", "ties", "tied", "tie (bothbad)", "both", "both_bad", "bothbad", "both bad", "both good", "equal",
     "same", "draw", "neither", "none", "a=b", "c")
)  # fmt: skip
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # how HelpSteer 2 writes a dialogue


def number(value: object, what: str = "a score") -> float:
    """A finite number, or the text of one. Raises BadRow for anything else."""
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            found = float(value)
            if math.isfinite(found):
                return found
    except (ValueError, OverflowError):
        pass
    raise BadRow(f"{what} is not a number", repr(value)[:60])


def grade(value: object, response: str, what: str = "a score") -> float:
    """The grade of a response; that of an empty or invalid one, which is left out, may be anything."""
    return number(value, what) if is_usable(response) else 0.0


def side(value: object, column: str, meaning: Mapping[str, int]) -> int:
    """The side (0, 1, ... or TIE) that a verdict names, in any case. Raises BadRow where it names none."""
    if value is None or isinstance(value, Mapping):
        what = "empty" if value is None else f"an object of {', '.join(map(str, value))}"
        raise BadRow("the verdict names no side", f"{column} is {what}"[:100])
    word = str(value).strip().lower()
    word = word.removesuffix(".0") if re.fullmatch(r"-?[0-9]+\.0", word) else word  # as pandas writes 1
    found = meaning.get(word)
    if found is None or isinstance(value, bool):
        known = ", ".join(list(meaning)[:6])
        raise BadRow("the verdict names no side", f"{column} is {value!r}"[:60] + f" (known: {known}, ...)")
    return found


def not_counts(votes: Sequence[object], responses: int, column: str) -> None:
    """Refuse numbers of which nobody can tell whether they count votes or name the best response each.

    Raises:
        BadRow: as many whole numbers as responses.
    """
    if len(votes) == responses and all(isinstance(x, int) and not isinstance(x, bool) for x in votes):
        raise BadRow(
            "votes that may be counts",
            f"{column} is {votes!r}"[:60] + f": as many numbers as responses; counts are scores "
            f"(data.columns={{scores: {column}}}), places of the best response, one an annotator, are texts "
            '(["0", "1"])',
        )


def sign(value: object, column: str) -> int:
    """The side of a strength: below 0 the first, above 0 the second, 0 a tie."""
    strength = number(value, column)
    return TIE if strength == 0 else int(strength > 0)


def voted(
    prompt: Prompt, texts: Sequence[str], votes: Sequence[int], source: str, group: str | None = None
) -> Comparison | LeftOut:
    """The winner of the votes over all others, which are tied. Votes are places in ``texts``, or TIE."""
    if not votes:
        return LeftOut("no votes", prompt)
    ((winner, most),) = Counter(votes).most_common(1)
    if most * 2 <= len(votes):
        return LeftOut("votes without a majority", prompt)
    if winner == TIE:
        return LeftOut("a tie, which says nothing about preference", prompt)
    ranks = tuple(int(place != winner) for place in range(len(texts)))
    share = most / len(votes) if len(votes) > 1 else None
    return Comparison(prompt, tuple(texts), ranks, source, share, group)


def graded(
    prompt: Prompt,
    texts: Sequence[str],
    grades: Sequence[Sequence[float]],
    source: str,
    group: str | None = None,
) -> Comparison | LeftOut:
    """K-way by the mean grade, the highest the best. grades: those of each text, one per annotator.

    Those of an empty or invalid text do not count: it is the worst, and left out behind the reading.
    """
    usable = [place for place, of in enumerate(texts) if is_usable(of)]
    if 1 < len(usable) < len(texts):
        found = graded(prompt, [texts[i] for i in usable], [grades[i] for i in usable], source, group)
        if isinstance(found, LeftOut):
            return found
        others = [x for x in texts if not is_usable(x)]
        worst = (max(found.ranks) + 1,) * len(others)
        return replace(found, responses=(*found.responses, *others), ranks=(*found.ranks, *worst))
    if any(not of for of in grades):
        return LeftOut("a response without a grade", prompt)
    means = [math.fsum(of) / len(of) for of in grades]
    found = ranked_by_score(prompt, texts, means, source)
    if isinstance(found, LeftOut):
        return found
    annotators = {len(of) for of in grades}
    certainty = agreement(grades, means) if len(annotators) == 1 and max(annotators) > 1 else None
    return replace(found, confidence=certainty, group=group)


def agreement(grades: Sequence[Sequence[float]], means: Sequence[float]) -> float:
    """Share, in [0, 1], of the annotators' pairs in the order of the means; grades[k][a] of text k by a."""
    pairs = [
        (j, i) if means[i] < means[j] else (i, j)
        for i, j in combinations(range(len(means)), 2)
        if means[i] != means[j]
    ]
    votes = [
        0.5 + 0.5 * ((high > low) - (high < low))
        for better, worse in pairs
        for high, low in zip(grades[better], grades[worse], strict=True)
    ]
    return math.fsum(votes) / len(votes)


def as_prompt(value: Any) -> Prompt:
    """A prompt field: messages, a text, or a text that writes a dialogue as HH or HelpSteer 2 do."""
    if not isinstance(value, str):
        return prompt_of(value)
    if hh.is_transcript(value):
        return hh.before_answer(value)
    first, *rest = _TURN.split(value)
    roles = {"User": "user", "Assistant": "assistant"}
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return tuple(Message(roles[role], text) for role, text in turns)


def asked(row: Row) -> Prompt:
    """The prompt of a row, in a column that :mod:`rlhf.data.readers.columns` knows."""
    value = prompt_in(row)
    if is_empty(value):
        raise BadRow("no prompt", "name its column by data.columns={prompt: ...}")
    return as_prompt(value)


def text(value: object) -> str:
    """A response: a text, or one message."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("content", "value", "text") if name in value), None)
    if not isinstance(value, str):
        raise BadRow("a response is not a text", f"a {type(value).__name__}")
    return value


def texts(values: Iterable[object]) -> list[str]:
    """Responses as texts; null is an empty one."""
    return ["" if value is None else text(value) for value in values]


def named(row: Row, *names: str) -> bool:
    """Whether the columns are there and hold something: a table of several formats leaves others empty."""
    return all(not is_empty(row.get(name)) for name in names)


def group_of(row: Row) -> str | None:
    """The column "group", where data.columns or the set names one."""
    value = row.get("group")
    return None if is_empty(value) else str(value)
