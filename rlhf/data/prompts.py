"""Prompts without responses: what a policy is trained and evaluated on.

Rows of comparisons are read too, for their prompts: the prompts of a preference data set are the usual ones
for PPO (Bai et al. 2022, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf.data.comparisons import Comparison, Counts, OnBadRows, Prompt, prompt_key, prompt_problem
from rlhf.data.readers import READERS as COMPARISONS
from rlhf.data.readers import Refuses, hh, no_refusal, read_distinct
from rlhf.data.readers.rows import LeftOut, Origin, Reader, messages, prompt_of

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
) -> tuple[list[Prompt], Counts]:
    """Read, check and de-duplicate the prompts that the specs name, in their order.

    specs, on_bad_rows and refuses as in :func:`rlhf.data.readers.read_comparisons`; a .txt file holds one
    prompt a line. key: the recipe's key that holds the specs, named in messages. Raises UserError for the
    same mistakes, and when nothing is left.
    """
    return read_distinct(
        "prompt", specs, READERS, lambda prompt: prompt_problem(prompt) or refuses(prompt), prompt_key,
        on_bad_rows=on_bad_rows, key=key, prepare=_lines_as_rows,
    )  # fmt: skip


def _lines_as_rows(origin: Origin) -> Origin:
    """Lines of a text file as rows; a line is taken as it is written, never as a transcript."""
    rows = (
        (number, {"prompt": [{"role": "user", "content": row}]} if isinstance(row, str) else row)
        for number, row in origin.rows
    )
    return replace(origin, rows=rows)
