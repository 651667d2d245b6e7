"""Preference rows as TRL defines them (huggingface.co/docs/trl, "Dataset formats and types").

Texts or messages, each with the prompt in a field of its own (explicit) or at the start of both sides
(implicit). Two mixtures that widely used data sets hold are read as well: a prompt written as an HH
transcript, and a text prompt next to whole conversations. Other columns (scores, margins) are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.data.comparisons import Comparison, Message, Prompt
from rlhf.data.readers import hh
from rlhf.data.readers.rows import (
    BadRow,
    Reader,
    Row,
    confidence,
    is_list,
    is_text,
    messages,
    pair_of_dialogues,
    prompt_of,
)


def parse(row: Row, source: str) -> Iterator[Comparison]:
    """The row's pair. Raises BadRow where the sides do not share a prompt or the types do not fit."""
    prompt, chosen, rejected, certainty = row.get("prompt"), row["chosen"], row["rejected"], confidence(row)
    if isinstance(chosen, list):
        dialogues = messages(chosen, "chosen"), messages(rejected, "rejected")
        yield _conversations(prompt, dialogues, source, certainty)
    elif prompt is None:
        before, *answers = _split_texts(chosen, rejected)
        yield Comparison((Message("user", before),), tuple(answers), (0, 1), source, certainty)
    elif hh.is_transcript(prompt):
        sides = (chosen.strip(), rejected.strip())
        yield Comparison(hh.before_answer(prompt), sides, (0, 1), source, certainty)
    else:
        yield Comparison(prompt_of(prompt), (chosen, rejected), (0, 1), source, certainty)


def _conversations(
    prompt: object, sides: tuple[Prompt, Prompt], source: str, certainty: float | None
) -> Comparison:
    whole = all(side and side[0].role != "assistant" for side in sides)
    if prompt is None:
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


READER = Reader(
    'TRL {"prompt"?, "chosen", "rejected"} as texts or messages',
    lambda row: is_text(row, "chosen", "rejected") or is_list(row, "chosen", "rejected"),
    parse,
)
