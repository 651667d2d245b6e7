"""What the readers share: bad rows, messages and rankings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rlhf.data.comparisons import ROLES, Comparison, Message, Prompt

T_co = TypeVar("T_co", covariant=True)
Other = TypeVar("Other")
Row = Mapping[str, Any]
_ROLES = {role: role for role in ROLES} | {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bot", "chatbot", "ai", "model"), "assistant"),
}


class BadRow(ValueError):
    """A row that cannot be used. ``reason``, a fixed phrase, is counted; ``detail`` helps to mend it.

    ``column``, from 1, is shown after the line where the fault has one.
    """

    def __init__(self, reason: str, detail: str = "", column: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.column = column


class WholeFile(BadRow):
    """A row that tells that all rows of its file mean something else: also who skips bad rows stops."""


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
    nearly: what is wrong with a row that is nearly of this format, None where it is not.
    together: of a format whose items span rows: the key of a row, or BadRow. All rows of an origin with one
    key are parsed at its end as one, {"rows": [...]}.
    """

    format: str
    recognizes: Callable[[Row], bool]
    parse: Callable[[Row, str], Iterable[T_co | LeftOut]]
    nearly: Callable[[Row], BadRow | None] = lambda _: None
    together: Callable[[Row], Hashable] | None = None

    def then(self, give: Callable[[T_co | LeftOut], Iterable[Other | LeftOut]]) -> Reader[Other]:
        """A reader of the same rows that gives something else for each item."""
        return Reader(
            self.format,
            self.recognizes,
            lambda row, source: (other for item in self.parse(row, source) for other in give(item)),
            self.nearly,
            self.together,
        )


@dataclass(frozen=True)
class Origin:
    """Where rows come from. ``name`` is shown to the user; ``source`` labels the items.

    texts_only: whether every value is a text, as in a table, also where a format has a list.
    """

    name: str
    source: str
    rows: Iterator[tuple[int, object]]
    numbered_by_line: bool
    texts_only: bool = False

    def where(self, number: int) -> str:
        """The place of a row, as an editor can open it when rows are lines."""
        return f"{self.name}:{number}" if self.numbered_by_line else f"{self.name}: row {number}"


def is_text(row: Row, *names: str) -> bool:
    """Whether the row has all the named fields, and all are strings."""
    return all(isinstance(row.get(name), str) for name in names)


def is_list(row: Row, *names: str) -> bool:
    """Whether the row has all the named fields, and all are lists."""
    return all(isinstance(row.get(name), list) for name in names)


def messages(value: object, name: str) -> tuple[Message, ...]:
    """Chat messages ``[{"role": ..., "content": ...}, ...]``; further fields of a message are ignored.

    ``from`` and ``value``, the names of ShareGPT, and the roles of ``_ROLES`` in any case are read too; so
    is a content of parts that are all texts. Raises BadRow for anything else.
    """
    if not isinstance(value, list):
        raise BadRow("messages are not a list", f'"{name}" is a {type(value).__name__}')
    return tuple(_message(item, f'in "{name}", message {number}') for number, item in enumerate(value, 1))


def _message(item: object, place: str) -> Message:
    fault = f"a {type(item).__name__}"
    if isinstance(item, Mapping):
        role, content = (
            next((item[name] for name in names if item.get(name) is not None), None)
            for names in (("role", "from"), ("content", "value"))
        )
        parts = content if isinstance(content, list) else []
        other = [x for x in parts if not _is_text_part(x)]
        if parts and not other:  # a template that renders parts puts nothing between
            content = "".join(part["text"] for part in parts)
        if isinstance(role, str) and isinstance(content, str):
            known = role if role in ROLES else role.strip().lower()
            return Message(_ROLES.get(known, role), content)
        name, wrong = ("role", role) if not isinstance(role, str) else ("content", content)
        fault = f"{name} is {'null or not there' if wrong is None else f'a {type(wrong).__name__}'}"
        if other and name == "content":
            kinds = {str(isinstance(x, Mapping) and x.get("type"))[:20] for x in other}
            fault = f"content has parts that are no text ({', '.join(sorted(kinds))})"
    raise BadRow("a message without text in role and content", f"{place}: {fault}")


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and is_text(part, "text")


def prompt_of(value: object) -> Prompt:
    """A prompt field: a text is one user message, a tuple a prompt already.

    Raises BadRow for neither a text nor messages.
    """
    if isinstance(value, tuple):
        return value
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
    ranks = tuple(places[score] for score in scores)
    return Comparison(prompt, tuple(responses), ranks, source)


def merge_turns(dialogue: Sequence[Message]) -> tuple[Message, ...]:
    """Join neighboring turns of one role by a blank line.

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
