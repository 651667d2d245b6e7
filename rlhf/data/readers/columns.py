"""The column of a pair that holds its prompt, where it is not called ``prompt``; a prompt is never guessed.

Known names stand in ``PROMPTS`` (in any case), ``input`` goes behind ``instruction``, a ``system`` text
before the prompt. A row with two candidates is refused, and one with text in a column whose name tells
neither a prompt nor a label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.comparisons import Message
from rlhf.data.readers import hh
from rlhf.data.readers.rows import BadRow, Row, messages, prompt_of

_PROMPTS = """
prompt question query instruction input context problem request human user user_input user_prompt user_message
messages conversations conversation history dialogue dialog
"""
PROMPTS = frozenset(_PROMPTS.split())
VERDICTS = (
    "better_response_id", "winner", "votes", "vote", "verdict", "preferred", "preference", "orig_preference",
    "choice", "label", "better", "selected", "comparison", "pw", "chosen",
)  # fmt: skip
"""Columns that hold who is better, in the order in which they are looked for."""
SYSTEM = ("system", "system_prompt")
_ABOUT = """
id ids uuid guid index idx hash source origin dataset subset split category type label labels task lang
language locale model models generator annotator worker judge date time timestamp at url link file path
license version score scores rating ratings rank margin confidence reason rationale explanation feedback
critique length tokens difficulty quality status
"""
_LABELS = frozenset(_ABOUT.split())  # last word of the name of a column that is about a row or an answer
_NUMBER = re.compile(r"\s*[-+]?[0-9.]+(e[-+]?[0-9]+)?\s*", re.IGNORECASE)  # as a CSV writes it


def is_empty(value: object) -> bool:
    """Whether a column holds nothing: a table of several formats leaves those of the others so."""
    return value is None or value in ("", [])


def prompt_in(row: Row) -> Any:
    """The prompt of a pair, None where both answers have to begin with it; ``prompt`` is given as it is.

    Raises:
        BadRow: it cannot be told which column holds it, or ``prompt`` is null.
    """
    if not is_empty(row.get("prompt")):
        return row["prompt"]
    texts = {name: value for name, value in row.items() if isinstance(value, str) and value.strip()}
    lists = [name for name, value in row.items() if isinstance(value, list) and value]
    found = {str(name).lower(): name for name in [*texts, *lists] if str(name).lower() in PROMPTS}
    behind = found.pop("input") if {"instruction", "input"} <= found.keys() else None
    if len(found) > 1:
        names = ", ".join(found.values())
        raise BadRow("the prompt can be in several columns", f"{names}; rename one of them to prompt")
    if not found:
        return _without_column(row, texts)
    ((_, name),) = found.items()
    value = row[name] if name in texts else messages(row[name], name)
    if behind is not None and name in texts:
        value = f"{value}\n\n{row[behind]}"
    for system in [column for column in SYSTEM if column in texts][:1]:
        dialogue = hh.before_answer(value) if hh.is_transcript(value) else prompt_of(value)
        value = dialogue if dialogue[0].role == "system" else (Message("system", row[system]), *dialogue)
    return value


def _without_column(row: Row, texts: Mapping[str, str]) -> Any:
    other = [x for x in texts if x not in ("chosen", "rejected") and not is_label(str(x), texts[x])]
    if other:
        names = ", ".join(map(ascii, sorted(other)[:5]))
        raise BadRow("no prompt, but other text", f"rename the column of the prompt ({names}?) to prompt")
    if "prompt" in row and row["prompt"] is None:
        raise BadRow("the prompt is null")
    return row.get("prompt")


def is_label(name: str, text: str) -> bool:
    """Whether a column is about a row or an answer, by its name, or because it holds a number."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    about_an_answer = words[0] in _LABELS and words[-1] in ("chosen", "rejected")
    return words[-1] in _LABELS or about_an_answer or _NUMBER.fullmatch(text) is not None
