"""Prompts without responses: what a policy is trained and evaluated on.

Rows of comparisons are read too, for their prompts: the prompts of a preference data set are the usual ones
for PPO (Bai et al. 2022, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rlhf.data.comparisons import Comparison, Counts, OnBadRows, Prompt, prompt_key, prompt_problem
from rlhf.data.readers import READERS as COMPARISONS
from rlhf.data.readers import Refuses, hh, no_refusal, read_distinct
from rlhf.data.readers.rows import LeftOut, Origin, Reader, Row, messages, prompt_of
from rlhf.errors import UserError

__all__ = ["Prompt", "read_prompts"]


def _of_item(item: Comparison | LeftOut) -> list[Prompt]:
    return [item.prompt]


def _without_answers(dialogue: Prompt) -> Prompt:
    end = len(dialogue)
    while end and dialogue[end - 1].role == "assistant":
        end -= 1
    return dialogue[:end]


def _of_field(value: str | list) -> Prompt:
    return _without_answers(hh.turns(value)) if hh.is_transcript(value) else prompt_of(value)


READERS: tuple[Reader[Prompt], ...] = (
    *(reader.then(_of_item) for reader in COMPARISONS),
    Reader(
        '{"messages"}, cut back to the last user turn where it ends in answers',
        lambda row: "messages" in row,
        lambda row, _: [_without_answers(messages(row["messages"], "messages"))],
    ),
    Reader(
        'prompts {"prompt": text or messages}; a transcript of HH becomes its turns',
        lambda row: isinstance(row.get("prompt"), str | list),
        lambda row, _: [_of_field(row["prompt"])],
    ),
    Reader(
        '{"conversations"} with "from" and "value"',
        lambda row: isinstance(row.get("conversations"), list),
        lambda row, _: [_without_answers(messages(row["conversations"], "conversations"))],
    ),
)


def read_prompts(
    specs: Sequence[str],
    *,
    on_bad_rows: OnBadRows,
    key: str = "data.prompts",
    refuses: Refuses = no_refusal,
    columns: Sequence[str] = (),
    kept: dict[str, dict[str, Any]] | None = None,
) -> tuple[list[Prompt], Counts]:
    """Read, check and de-duplicate the prompts that the specs name, in their order.

    specs, on_bad_rows and refuses as in :func:`rlhf.data.readers.read_comparisons`; a .txt file holds one
    prompt a line. key: the recipe's key that holds the specs, named in messages. columns: further columns of
    the rows, which are put into ``kept`` by :func:`prompt_key`; a row without one has None there. Raises
    UserError for the same mistakes, for a column that is in no row, and when nothing is left.
    """
    found: dict[str, dict[str, Any]] = {}
    readers = [_noting(reader, columns, found) for reader in READERS] if columns else READERS
    read = read_distinct(
        "prompt", specs, readers, lambda prompt: prompt_problem(prompt) or refuses(prompt), prompt_key,
        on_bad_rows=on_bad_rows, key=key, prepare=_lines_as_rows,
    )  # fmt: skip
    for name in columns:
        if all(row[name] is None for row in found.values()):
            raise UserError(f"data.prompt_columns: no row of {', '.join(specs)} ({key}) has a column {name}")
    if kept is not None:
        kept.update({name: row for name, row in found.items() if name not in kept})
    return read


def _noting(
    reader: Reader[Prompt], columns: Sequence[str], kept: dict[str, dict[str, Any]]
) -> Reader[Prompt]:
    """The reader, which also notes columns of the rows by the prompts that they give; the first row stays."""

    def parse(row: Row, source: str) -> Iterator[Prompt | LeftOut]:
        for item in reader.parse(row, source):
            if isinstance(item, tuple):
                kept.setdefault(prompt_key(item), {name: row.get(name) for name in columns})
            yield item

    return replace(reader, parse=parse)


def _lines_as_rows(origin: Origin) -> Origin:
    """Lines of a text file as rows; a line is taken as it is written, never as a transcript."""
    rows = (
        (number, {"prompt": [{"role": "user", "content": row}]} if isinstance(row, str) else row)
        for number, row in origin.rows
    )
    return replace(origin, rows=rows)
