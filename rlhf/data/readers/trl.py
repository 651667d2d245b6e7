"""Preference rows as TRL defines them (huggingface.co/docs/trl, "Dataset formats and types").

Texts or messages, each with the prompt in a field of its own (explicit) or at the start of both sides
(implicit). Two mixtures that widely used data sets hold are read as well: a prompt written as an HH
transcript, and a text prompt next to whole conversations. So are an answer that is one message, as in the
pairs of ShareGPT, and a prompt in a column of another name (:mod:`rlhf.data.readers.columns`). Other columns
(scores, margins) are not used, and counted; ``group`` is the comparison's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rlhf.data.comparisons import Comparison, Message, Prompt
from rlhf.data.readers import hh
from rlhf.data.readers.columns import is_empty, prompt_in
from rlhf.data.readers.rows import (
    BadRow,
    Reader,
    Row,
    confidence,
    is_text,
    messages,
    pair_of_dialogues,
    prompt_of,
)

SIDES = ("chosen", "rejected")


def parse(row: Row, source: str) -> Iterator[Comparison]:
    """The row's pair. Raises BadRow where the sides do not share a prompt or the types do not fit."""
    group = row.get("group")
    for pair in _pair(row, source):
        yield pair if is_empty(group) else replace(pair, group=str(group))


def _pair(row: Row, source: str) -> Iterator[Comparison]:
    chosen, rejected, certainty = row["chosen"], row["rejected"], confidence(row)
    if not isinstance(chosen, str):
        sides = [messages(as_list(row[name]), name) for name in SIDES]
        yield _conversations(row, (sides[0], sides[1]), source, certainty)
        return
    prompt = prompt_in(row)
    if prompt is None:
        before, *answers = _split_texts(chosen, rejected)
        yield Comparison((Message("user", before),), tuple(answers), (0, 1), source, certainty)
    elif hh.is_transcript(prompt):
        answers = [chosen.strip(), rejected.strip()]
        yield Comparison(hh.before_answer(prompt), tuple(answers), (0, 1), source, certainty)
    else:
        yield Comparison(prompt_of(prompt), (chosen, rejected), (0, 1), source, certainty)


def _conversations(
    row: Row, sides: tuple[Prompt, Prompt], source: str, certainty: float | None
) -> Comparison:
    whole = all(side and side[0].role != "assistant" for side in sides)
    prompt = row.get("prompt") if whole else prompt_in(row)  # whole ones begin with what was asked
    if is_empty(prompt):
        return pair_of_dialogues(*sides, source, certainty)
    before = prompt_of(prompt)
    if not whole:
        return pair_of_dialogues((*before, *sides[0]), (*before, *sides[1]), source, certainty)
    pair = pair_of_dialogues(*sides, source, certainty)
    # The sides repeat the prompt: it must be theirs, or one of the two is not what the annotator saw.
    asked = {(message.role, message.content.strip()) for message in pair.prompt}
    if any((message.role, message.content.strip()) not in asked for message in before):
        raise BadRow("the prompt is not in the conversations")
    return pair


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected): the longest shared start that ends before white space, in both.

    Cutting inside a word would give the two answers beginnings that no tokenizer produces. The white space
    goes to the answers, as in the rows with an explicit prompt. Without such a place the prompt is empty.
    """
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    shared = next(differ, min(len(chosen), len(rejected)) - 1)
    for cut in range(shared, 0, -1):
        at_boundary = chosen[cut].isspace() and rejected[cut].isspace() and not chosen[cut - 1].isspace()
        if at_boundary and chosen[cut:].strip() and rejected[cut:].strip():
            return chosen[:cut], chosen[cut:], rejected[cut:]
    return "", chosen, rejected


def as_list(value: Any) -> Any:
    """An answer that is one message, as messages."""
    return [value] if isinstance(value, Mapping) else value


def _nearly(row: Row) -> BadRow | None:
    """What is wrong with a pair that is neither two texts nor twice messages."""
    if any(name not in row for name in SIDES):
        return None
    if empty := [name for name in SIDES if row[name] is None]:
        return BadRow(" and ".join(empty) + (" is null" if len(empty) == 1 else " are null"))
    kinds = " and a ".join(type(row[name]).__name__ for name in SIDES)
    return BadRow("chosen and rejected are not both texts, or both messages", f"a {kinds}")


READER = Reader(
    'TRL {"prompt"?, "chosen", "rejected"} as texts or messages',
    lambda row: is_text(row, *SIDES) or all(isinstance(as_list(row.get(name)), list) for name in SIDES),
    parse,
    _nearly,
)
