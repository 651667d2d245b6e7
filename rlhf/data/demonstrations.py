"""Demonstrations: a prompt and an answer that is worth imitating, for supervised fine-tuning.

Chats as TRL defines them (huggingface.co/docs/trl, "Dataset formats and types"), the ``conversations`` of
ShareGPT, and every known format of comparisons, of which the best answer is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from rlhf.data.comparisons import Comparison, Counts, Message, OnBadRows, Prompt, prompt_key, prompt_problem
from rlhf.data.readers import READERS, hh
from rlhf.data.readers.files import origins
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, is_text, merge_turns, messages, sift
from rlhf.data.readers.trl import prompt_of
from rlhf.errors import UserError

FORMAT = (
    'chats {"messages"} that end in an assistant turn, {"prompt", "completion"} as texts or messages, '
    '{"conversations"} with "from" and "value", or any known format of comparisons'
)
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}  # of ShareGPT


@dataclass(frozen=True)
class Demonstration:
    """One answer to one prompt. source: the data set, for statistics."""

    prompt: Prompt
    response: str
    source: str


def problem(demonstration: Demonstration) -> str | None:
    """The reason why a demonstration cannot be used, or None; reasons are fixed phrases."""
    if not demonstration.response.strip():
        return "empty response"
    return prompt_problem(demonstration.prompt) or prompt_problem((Message("user", demonstration.response),))


def best_of(comparison: Comparison) -> list[Demonstration]:
    """The best response of a comparison, several where the best are tied."""
    best = min(comparison.ranks)
    return [
        Demonstration(comparison.prompt, response, comparison.source)
        for response, rank in zip(comparison.responses, comparison.ranks, strict=True)
        if rank == best
    ]


def recognises(row: Row) -> bool:
    """Whether the row is a chat, or a comparison."""
    return (
        _has(row, "messages")
        or _has(row, "conversations")
        or _has(row, "prompt", "completion")
        or _is_comparison(row)
    )


def parse(row: Row, source: str) -> Iterator[Demonstration | LeftOut]:
    """The row's demonstrations, not yet checked; raises BadRow where the row does not hold together."""
    if _has(row, "messages"):
        yield _of_dialogue(messages(row["messages"], "messages"), source)
    elif _has(row, "conversations"):
        yield _of_dialogue(_conversation(row["conversations"]), source)
    elif _has(row, "prompt", "completion"):
        yield _of_prompt(row["prompt"], row["completion"], source)
    else:
        reader = next(reader for reader in READERS if reader.recognises(row))
        for item in reader.parse(row, source):
            if isinstance(item, LeftOut):
                yield item
            else:
                yield from best_of(item)


def _has(row: Row, *names: str) -> bool:
    """Whether the fields are there; files of several formats in one table leave the others empty."""
    return all(row.get(name) is not None for name in names)


def _is_comparison(row: Row) -> bool:
    return any(reader.recognises(row) for reader in READERS)


def _of_dialogue(dialogue: Sequence[Message], source: str) -> Demonstration:
    merged = merge_turns(dialogue)
    if not merged or merged[-1].role != "assistant":
        raise BadRow("the conversation does not end in an assistant turn")
    return Demonstration(merged[:-1], merged[-1].content, source)


def _of_prompt(prompt: object, completion: object, source: str) -> Demonstration:
    if not isinstance(prompt, str | list):
        raise BadRow("the prompt is neither a text nor messages", f"a {type(prompt).__name__}")
    if isinstance(prompt, str) and hh.is_transcript(prompt):
        turns = hh.turns(prompt)  # "\n\nAssistant:" at the end is where the answer begins, not a turn
        before = turns[:-1] if turns[-1] == Message("assistant", "") else turns
        completion = completion.strip() if isinstance(completion, str) else completion
    else:
        before = prompt_of(prompt)
    if isinstance(completion, str):
        return Demonstration(before, completion, source)
    if not isinstance(completion, list):
        raise BadRow("the completion is neither a text nor messages", f"a {type(completion).__name__}")
    return _of_dialogue((*before, *messages(completion, "completion")), source)


def _conversation(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise BadRow("messages are not a list", f'"conversations" is a {type(value).__name__}')
    if not all(isinstance(item, Mapping) and is_text(item, "from", "value") for item in value):
        return messages(value, "conversations")  # role and content under this name, or no messages at all
    return tuple(Message(_ROLES.get(item["from"], item["from"]), item["value"]) for item in value)


def read_demonstrations(
    specs: Sequence[str], *, on_bad_rows: OnBadRows, key: str = "sft.data"
) -> tuple[list[Demonstration], Counts]:
    """Read, check and de-duplicate the demonstrations that the specs name, in their order.

    specs and on_bad_rows as in :func:`rlhf.data.readers.read_comparisons`; key: the recipe's key that holds
    the specs, named in messages. Raises UserError for the same mistakes, and when nothing is left.
    """
    counts = Counts()
    kept: dict[tuple[str, str], Demonstration] = {}
    this_module = cast(Reader[Demonstration], sys.modules[__name__])
    for origin in origins(specs, key=key):
        for found in sift(origin, [this_module], problem, on_bad_rows, counts):
            same = prompt_key(found.prompt), found.response.strip()
            if same in kept:
                counts.drop("duplicate demonstration")
            else:
                kept[same] = found
    if not kept:
        raise UserError(f"no usable demonstration in {', '.join(specs)}: {counts}")
    return list(kept.values()), counts
