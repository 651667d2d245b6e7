"""Prompts that the comparisons stage has written, for the stages that start from them.

No torch before a prompt is tokenized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.data.comparisons import Counts, Message, Prompt
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import read_jsonl, write_jsonl
from rlhf.runs.folder import StageFolder

if TYPE_CHECKING:
    from rlhf.tokenization.dialogue import Dialogue

COLUMNS = "columns.jsonl"
"""The file of the prompts' columns in the comparisons stage."""
T = TypeVar("T")


def write_prompts(file: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSON lines {"messages": [{"role", "content"}, ...]}."""
    write_jsonl(file, ({"messages": [asdict(message) for message in prompt]} for prompt in prompts))


def stored_prompts(run: StageFolder, name: str) -> list[Prompt]:
    """Prompts that the comparisons stage of the same run has written, in their order."""
    rows = read_jsonl(run.parent("comparisons") / name)
    return [tuple(Message(**message) for message in row["messages"]) for row in rows]


def write_columns(file: Path, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what reward functions get besides prompts, by the prompts' keys."""
    write_jsonl(file, ({"prompt": key, "columns": row} for key, row in columns.items()))


def stored_columns(run: StageFolder) -> dict[str, dict[str, Any]]:
    """The columns of ``data.prompt_columns`` by :func:`prompt_key`, as the comparisons stage wrote them."""
    return {row["prompt"]: row["columns"] for row in read_jsonl(run.parent("comparisons") / COLUMNS)}


def held_out_prompts(run: StageFolder, number: int) -> list[Prompt]:
    """The first held-out prompts of the run; says so where there are fewer than asked for."""
    prompts = stored_prompts(run, "held_out_prompts.jsonl")
    if len(prompts) < number:
        run.say(f"{run.stage}: {len(prompts)} held-out prompts, fewer than the {number} asked for")
    return prompts[:number]


def within_prompt_limit(
    items: Sequence[T], prompt_of: Callable[[T], Prompt], recipe: Recipe, dialogue: Dialogue, counts: Counts
) -> list[T]:
    """Items whose prompt has at most ``dialogue.max_prompt_tokens``; others are counted, or refused.

    Raises:
        UserError: a prompt is longer, and ``dialogue.on_long_prompts`` is ``error``.
    """
    from rlhf.tokenization.dialogue import PromptTooLongError

    kept = []
    for item in items:
        try:
            dialogue.encode_prompt(prompt_of(item))
        except PromptTooLongError as error:
            if recipe.dialogue.on_long_prompts != "skip":
                start = prompt_of(item)[-1].content[:60]
                raise UserError(
                    f"{error} (it ends in the turn {start!r}...): raise the limit, or set "
                    "dialogue.on_long_prompts=skip or truncate"
                ) from None
            counts.drop("prompt longer than dialogue.max_prompt_tokens")
            continue
        kept.append(item)
    return kept
