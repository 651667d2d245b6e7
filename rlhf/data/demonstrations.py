"""Demonstrations: a prompt and an answer that is worth imitating, for supervised fine-tuning.

Chats as TRL defines them (huggingface.co/docs/trl, "Dataset formats and types"), the ``conversations`` of
ShareGPT, and every known format of comparisons, of which the best answer is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.comparisons import Comparison, Counts, Message, OnBadRows, Prompt, prompt_key, prompt_problem
from rlhf.data.readers import READERS as COMPARISONS
from rlhf.data.readers import Refuses, hh, no_refusal, read_distinct
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, merge_turns, messages, prompt_of


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


def _of_dialogue(dialogue: Sequence[Message], source: str) -> Demonstration:
    merged = merge_turns(dialogue)
    if not merged or merged[-1].role != "assistant":
        raise BadRow("the conversation does not end in an assistant turn")
    return Demonstration(merged[:-1], merged[-1].content, source)


def _of_prompt(prompt: object, completion: object, source: str) -> Demonstration:
    if hh.is_transcript(prompt):
        before = hh.before_answer(prompt)
        completion = completion.strip() if isinstance(completion, str) else completion
    else:
        before = prompt_of(prompt)
    if isinstance(completion, str):
        return Demonstration(before, completion, source)
    if not isinstance(completion, list):
        raise BadRow("the completion is neither a text nor messages", f"a {type(completion).__name__}")
    return _of_dialogue((*before, *messages(completion, "completion")), source)


def _has(row: Row, *names: str) -> bool:
    """Whether the fields are there; files of several formats in one table leave the others empty."""
    return all(row.get(name) is not None for name in names)


READERS: tuple[Reader[Demonstration], ...] = (
    Reader(
        'chats {"messages"} that end in an assistant turn',
        lambda row: _has(row, "messages"),
        lambda row, source: [_of_dialogue(messages(row["messages"], "messages"), source)],
    ),
    Reader(
        '{"conversations"} with "from" and "value"',
        lambda row: _has(row, "conversations"),
        lambda row, source: [_of_dialogue(messages(row["conversations"], "conversations"), source)],
    ),
    Reader(
        '{"prompt", "completion"} as texts or messages',
        lambda row: _has(row, "prompt", "completion"),
        lambda row, source: [_of_prompt(row["prompt"], row["completion"], source)],
    ),
    *(
        reader.then(lambda item: [item] if isinstance(item, LeftOut) else best_of(item))
        for reader in COMPARISONS
    ),
)


def read_demonstrations(
    specs: Sequence[str], *, on_bad_rows: OnBadRows, refuses: Refuses = no_refusal
) -> tuple[list[Demonstration], Counts]:
    """Read, check and de-duplicate the demonstrations of ``sft.data``, in their order.

    specs, on_bad_rows and refuses as in :func:`rlhf.data.readers.read_comparisons`. Raises UserError for
    the same mistakes, and when nothing is left.
    """
    return read_distinct(
        "demonstration", specs, READERS, lambda d: problem(d) or refuses(d.prompt),
        lambda d: (prompt_key(d.prompt), d.response.strip()),
        on_bad_rows=on_bad_rows, key="sft.data",
    )  # fmt: skip
