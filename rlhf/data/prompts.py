"""Prompts without responses: what a policy is trained and evaluated on.

Rows of comparisons are read too, for their prompts: the prompts of a preference data set are the usual ones
for PPO (Bai et al. 2022, section 4.2).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

from rlhf.data.comparisons import Counts, OnBadRows, Prompt, prompt_key, prompt_problem
from rlhf.data.readers import READERS, hh
from rlhf.data.readers.files import origins
from rlhf.data.readers.rows import Origin, Reader, Row, messages, sift
from rlhf.data.readers.trl import prompt_of
from rlhf.errors import UserError

__all__ = ["Prompt", "read_prompts"]

FORMAT = 'prompts {"prompt": text or messages} or {"messages"}, or any known format of comparisons'


def recognises(row: Row) -> bool:
    """Whether the row has a prompt, messages, or is a comparison."""
    return isinstance(row.get("prompt"), str | list) or "messages" in row or _is_comparison(row)


def parse(row: Row, source: str) -> Iterator[Prompt]:
    """The row's prompts, not yet checked; raises BadRow for values of another type.

    A conversation under "messages" that ends in answers is cut back to its last user turn. A text prompt in
    the form of an HH transcript becomes its turns.
    """
    if _is_comparison(row):
        reader = next(reader for reader in READERS if reader.recognises(row))
        for comparison in reader.parse(row, source):
            yield comparison.prompt
    elif "messages" in row:
        yield _without_answers(messages(row["messages"], "messages"))
    elif isinstance(row["prompt"], str) and hh.is_transcript(row["prompt"]):
        yield _without_answers(hh.turns(row["prompt"]))
    else:
        yield prompt_of(row["prompt"])


def _is_comparison(row: Row) -> bool:
    return any(reader.recognises(row) for reader in READERS)


def _without_answers(dialogue: Prompt) -> Prompt:
    end = len(dialogue)
    while end and dialogue[end - 1].role == "assistant":
        end -= 1
    return dialogue[:end]


def read_prompts(
    specs: Sequence[str], *, on_bad_rows: OnBadRows, key: str = "data.prompts"
) -> tuple[list[Prompt], Counts]:
    """Read, check and de-duplicate the prompts that the specs name, in their order.

    specs and on_bad_rows as in :func:`rlhf.data.readers.read_comparisons`; a .txt file holds one prompt a
    line. key: the recipe's key that holds the specs, named in messages.
    Raises UserError for the same mistakes, and when nothing is left.
    """
    counts = Counts()
    prompts: dict[str, Prompt] = {}
    this_module = cast(Reader[Prompt], sys.modules[__name__])
    for origin in origins(specs, key=key):
        for prompt in sift(_lines_as_rows(origin), [this_module], prompt_problem, on_bad_rows, counts):
            key = prompt_key(prompt)
            if key in prompts:
                counts.drop("duplicate prompt")
            else:
                prompts[key] = prompt
    if not prompts:
        raise UserError(f"no usable prompt in {', '.join(specs)}: {counts}")
    return list(prompts.values()), counts


def _lines_as_rows(origin: Origin) -> Origin:
    """Lines of a text file as rows; a line is taken as it is written, never as a transcript."""
    rows = (
        (number, {"prompt": [{"role": "user", "content": row}]} if isinstance(row, str) else row)
        for number, row in origin.rows
    )
    return replace(origin, rows=rows)
