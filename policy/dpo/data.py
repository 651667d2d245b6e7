"""Comparisons to pairs of token rows, in the one template of all stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from rlhf.data.comparisons import Comparison
from rlhf.tokenization.dialogue import Dialogue


def ordered_pairs(comparison: Comparison, which: Literal["all", "best"]) -> Iterator[tuple[int, int]]:
    """Indices (better, worse) of the responses of a comparison; ties are no pairs.

    which: every pair of unequal rank, or those in which the better one has the best rank of all.
    """
    ranks = comparison.ranks
    for one, other in itertools.permutations(range(len(ranks)), 2):
        if ranks[one] < ranks[other] and (which == "all" or ranks[one] == min(ranks)):
            yield one, other


def encode(
    comparisons: Sequence[Comparison], dialogue: Dialogue, which: Literal["all", "best"]
) -> tuple[list[dict[str, Any]], int]:
    """Token rows of the pairs, in order, and the number of pairs left out because both rows are the same.

    A row has ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, as trl's collator reads them, and
    ``index``, the comparison's. A response closes with the end of the turn, unless it was cut at
    ``max_response_tokens``: then its writer had not ended it there.

    Raises:
        PromptTooLongError: a prompt has too many tokens and is not to be truncated.
    """
    rows, same = [], 0
    for index, comparison in enumerate(comparisons):
        prompt = dialogue.encode_prompt(comparison.prompt)
        responses = [closed(text, dialogue) for text in comparison.responses]
        for better, worse in ordered_pairs(comparison, which):
            if responses[better] == responses[worse]:
                same += 1
                continue
            rows.append(
                {
                    "prompt_ids": prompt,
                    "chosen_ids": responses[better],
                    "rejected_ids": responses[worse],
                    "index": index,
                }
            )
    return rows, same


def closed(text: str, dialogue: Dialogue) -> list[int]:
    """A response as the policy says it: its tokens, and what ends the turn where they are all there."""
    ids = dialogue.until_end(dialogue.encode_response(text))
    return [*ids, dialogue.end_id] if len(ids) < dialogue.max_response_tokens else ids
