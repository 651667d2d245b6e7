r"""Transcripts of Anthropic's HH data (Bai et al. 2022, arXiv:2204.05862; github.com/anthropics/hh-rlhf).

A row is {"chosen", "rejected"}: two whole dialogues "\n\nHuman: ...\n\nAssistant: ..." which share everything
up to the last Assistant turn. The published files hold oddities, and this is what becomes of them:

- an assistant that wrote a second "\n\nAssistant:" marker: one turn, the marker read as a paragraph break;
- line ends "\r\n", where no turn begins behind "\n\n": read as "\n";
- "Human:" or "Assistant:" not at the start of a paragraph: text, not a turn (it cannot be told from text);
- a turn without words inside the dialogue: kept; as the last one: an empty response, which is refused;
- a response in which the assistant went on to write a human turn as well: the transcripts differ in more than
  one answer, and the row is refused as not sharing a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeGuard

from rlhf.data.comparisons import Comparison, Message
from rlhf.data.readers.rows import BadRow, Reader, Row, confidence, is_text, pair_of_dialogues

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: object) -> TypeGuard[str]:
    """Whether a text begins with a turn and has at least one of the human."""
    return (
        isinstance(text, str)
        and _TURN.match(text) is not None
        and re.search(r"(?:\A\s*|\n\n)Human:", _with_newlines(text)) is not None
    )


def _with_newlines(text: str) -> str:
    windows = "\r\n\r\n" in text and re.search(r"\n\n(Human|Assistant):", text) is None
    return text.replace("\r\n", "\n") if windows else text


def turns(text: str) -> tuple[Message, ...]:
    """The turns of a transcript, without the white space of its layout; raises BadRow if it is none."""
    if not is_transcript(text):
        raise BadRow("not a transcript of Human and Assistant turns")
    pieces = _TURN.split(
        _with_newlines(text)
    )  # before the first marker (white space), then role, words, role, words, ...
    return tuple(
        Message(_ROLES[role], words.strip()) for role, words in zip(pieces[1::2], pieces[2::2], strict=True)
    )


def before_answer(text: str) -> tuple[Message, ...]:
    """The turns of a prompt; an empty one of the assistant at its end is where the answer begins, no turn."""
    found = turns(text)
    return found[:-1] if found[-1] == Message("assistant", "") else found


def parse(row: Row, source: str) -> Iterator[Comparison]:
    """The row's pair. Raises BadRow if the transcripts do not share a prompt or do not end in an answer."""
    yield pair_of_dialogues(
        turns(row["chosen"]), turns(row["rejected"]), source, confidence(row), noun="transcripts"
    )


READER = Reader(
    'HH {"chosen", "rejected"} with "Human:" and "Assistant:" turns',
    lambda row: (
        is_text(row, "chosen", "rejected")
        and row.get("prompt") is None
        and (is_transcript(row["chosen"]) or is_transcript(row["rejected"]))
    ),
    parse,
)
