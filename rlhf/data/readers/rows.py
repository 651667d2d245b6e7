"""What the readers share: bad rows, messages, rankings, and the sieve that obeys ``on_bad_rows``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rlhf.data.comparisons import Comparison, Counts, Message, OnBadRows, Prompt
from rlhf.errors import UserError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Other = TypeVar("Other")
Row = Mapping[str, Any]


class BadRow(ValueError):
    """A row that cannot be used. ``reason``, a fixed phrase, is counted; ``detail`` helps to mend it.

    ``column``, from 1, is shown after the line where the fault has one.
    """

    def __init__(self, reason: str, detail: str = "", column: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.column = column


class LeftOut(BadRow):
    """What a rule of the format leaves out, such as a question with one answer: no mistake of the file.

    It is counted by its reason like a bad row, but never stops a reading. A reader raises it for a whole
    row and yields it in the place of one comparison among others; a file reader gives it in the place of a
    row. prompt: that of the comparison, which is still good for readers that want prompts only.
    """

    def __init__(self, reason: str, prompt: Prompt = ()) -> None:
        super().__init__(reason)
        self.prompt = prompt


@dataclass(frozen=True)
class Reader(Generic[T_co]):
    """One format.

    format: in a few words, for the message about a row that nobody recognizes.
    recognizes: whether the row's fields are those of this format.
    parse: what the row holds, not yet checked; raises BadRow where it does not hold together. Its second
    argument labels the items.
    """

    format: str
    recognizes: Callable[[Row], bool]
    parse: Callable[[Row, str], Iterable[T_co | LeftOut]]

    def then(self, give: Callable[[T_co | LeftOut], Iterable[Other | LeftOut]]) -> Reader[Other]:
        """A reader of the same rows that gives something else for each item."""
        return Reader(
            self.format,
            self.recognizes,
            lambda row, source: (other for item in self.parse(row, source) for other in give(item)),
        )


@dataclass(frozen=True)
class Origin:
    """Where rows come from. ``name`` is shown to the user; ``source`` labels the items."""

    name: str
    source: str
    rows: Iterator[tuple[int, object]]
    numbered_by_line: bool

    def where(self, number: int) -> str:
        """The place of a row, as an editor can open it when rows are lines."""
        return f"{self.name}:{number}" if self.numbered_by_line else f"{self.name}: row {number}"


def sift(
    origin: Origin,
    readers: Sequence[Reader[T]],
    problem: Callable[[T], str | None],
    on_bad_rows: OnBadRows,
    counts: Counts,
) -> Iterator[T]:
    """The usable items of an origin; every item is counted in ``counts``.

    "stop" raises UserError at the first bad row or item. "skip" counts it and goes on; but an origin of
    whose rows none is recognized is a mistake in the recipe and raises UserError in both cases. What a
    reader leaves out by rule (:class:`LeftOut`) is counted in both cases.
    """
    recognized = False
    unrecognized = ""
    for number, row in origin.rows:
        where = origin.where(number)
        try:
            reader = _reader(row, readers)
            if reader is None:
                unknown = BadRow("fields of no known format", _fields_and_formats(row, readers))
                unrecognized = unrecognized or f"{where}: {unknown}"
                if on_bad_rows == "stop" and not recognized:  # the file is wrong, skipping would not help
                    raise UserError(unrecognized)
                raise unknown
            recognized = True
            items = list(reader.parse(row, origin.source))  # type: ignore[arg-type]
        except LeftOut as left_out:
            counts.read += 1
            counts.drop(left_out.reason)
            continue
        except BadRow as error:
            counts.read += 1
            place = where if error.column is None else f"{where}:{error.column}"
            _refuse(error.reason, str(error), place, on_bad_rows, counts)
            continue
        for item in items:
            counts.read += 1
            if isinstance(item, LeftOut):
                counts.drop(item.reason)
            elif reason := problem(item):
                _refuse(reason, reason, where, on_bad_rows, counts)
            else:
                yield item
    if unrecognized and not recognized:
        raise UserError(unrecognized)


def _refuse(reason: str, message: str, where: str, on_bad_rows: OnBadRows, counts: Counts) -> None:
    if on_bad_rows == "stop":
        raise UserError(
            f"{where}: {message}; set data.on_bad_rows=skip to leave such rows out and count them"
        )
    counts.drop(reason)


def _reader(row: object, readers: Sequence[Reader[T]]) -> Reader[T] | None:
    if isinstance(row, BadRow):  # the file reader could not make a row of it, and did not want to stop
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("not a row with fields", f"a {type(row).__name__}")
    return next((reader for reader in readers if reader.recognizes(row)), None)


def _fields_and_formats(row: object, readers: Sequence[Reader[T]]) -> str:
    fields = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else ""
    known = "; ".join(reader.format for reader in readers)
    return f"{fields or 'no field'}; expected one of: {known}"


def is_text(row: Row, *names: str) -> bool:
    """Whether the row has all the named fields, and all are strings."""
    return all(isinstance(row.get(name), str) for name in names)


def is_list(row: Row, *names: str) -> bool:
    """Whether the row has all the named fields, and all are lists."""
    return all(isinstance(row.get(name), list) for name in names)


def messages(value: object, name: str) -> tuple[Message, ...]:
    """Chat messages ``[{"role": ..., "content": ...}, ...]``; further fields of a message are ignored.

    Raises BadRow for anything else, parts of several media as content included.
    """
    if not isinstance(value, list):
        raise BadRow("messages are not a list", f'"{name}" is a {type(value).__name__}')
    for item in value:
        if not isinstance(item, Mapping) or not is_text(item, "role", "content"):
            raise BadRow("a message without text in role and content", f'in "{name}"')
    return tuple(Message(item["role"], item["content"]) for item in value)


def prompt_of(value: object) -> Prompt:
    """A prompt field: a text is one user message; raises BadRow for neither a text nor messages."""
    if not isinstance(value, str | list):
        raise BadRow("the prompt is neither a text nor messages", f"a {type(value).__name__}")
    return (Message("user", value),) if isinstance(value, str) else messages(value, "prompt")


def confidence(row: Row) -> float | None:
    """The optional field "confidence": a number, or its text in a CSV; not yet checked for [0, 1]."""
    value = row.get("confidence")
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise BadRow("confidence is not a number", repr(value)[:40])


def ranked_by_score(
    prompt: Prompt, responses: Sequence[str], scores: Sequence[float], source: str
) -> Comparison | LeftOut:
    """Responses with their scores, the highest the best, as one comparison; equal scores are a tie.

    Fewer than two responses and scores that are all equal say nothing about preference: LeftOut.
    """
    if len(responses) < 2:
        return LeftOut("fewer than 2 answers", prompt)
    places = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    if len(places) < 2:
        return LeftOut("all answers have the same score", prompt)
    return Comparison(prompt, tuple(responses), tuple(places[score] for score in scores), source)


def merge_turns(dialogue: Sequence[Message]) -> tuple[Message, ...]:
    """Join neighbouring turns of one role by a blank line.

    A writer who split a turn in two said the same thing, and many chat templates refuse two turns of one
    role in a row.
    """
    merged: list[Message] = []
    for message in dialogue:
        if merged and merged[-1].role == message.role:
            texts = [text for text in (merged[-1].content, message.content) if text.strip()]
            merged[-1] = Message(message.role, "\n\n".join(texts))
        else:
            merged.append(message)
    return tuple(merged)


def pair_of_dialogues(
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    source: str,
    certainty: float | None = None,
    noun: str = "conversations",
) -> Comparison:
    """Two whole dialogues that differ in the last assistant turn only, as one comparison.

    Raises BadRow if one does not end in an assistant turn, or if the turns before it differ: a preference
    between answers to different questions trains the wrong thing.
    """
    sides = [merge_turns(chosen), merge_turns(rejected)]
    if any(not side or side[-1].role != "assistant" for side in sides):
        raise BadRow(f"one of the two {noun} does not end in an assistant turn")
    if sides[0][:-1] != sides[1][:-1]:
        raise BadRow(f"the two {noun} do not share a prompt")
    return Comparison(sides[0][:-1], (sides[0][-1].content, sides[1][-1].content), (0, 1), source, certainty)
