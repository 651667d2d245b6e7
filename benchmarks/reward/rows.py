"""The rows of the benchmark of the reward stage: chosen, encoded, and as trl takes them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.synthetic_hh import hh_shaped
from reward.model.batch import Example, encode
from rlhf.data.comparisons import Comparison
from rlhf.data.readers import read_comparisons
from rlhf.errors import UserError
from rlhf.tokenization.dialogue import Dialogue, PromptTooLongError, load_tokenizer


@dataclass(frozen=True)
class Wanted:
    """Which comparisons ``prepare`` is to write."""

    base: str
    files: list[str]
    """Data files; none = made of the seed."""
    responses: int
    number: int
    max_tokens: int
    seed: int
    scale: float = 1.0
    """Of the lengths of made comparisons."""


def dialogue_of(base: str, max_tokens: int) -> Dialogue:
    """The token contract of both sides: the chat template, EOS behind every response."""
    return Dialogue(
        load_tokenizer(base), template="chat", max_prompt_tokens=max_tokens, max_response_tokens=max_tokens
    )


def prepare(wanted: Wanted) -> list[Example]:
    """Encode comparisons with the wanted number of responses, none of whose sequences is too long.

    Raises:
        UserError: the files hold too few of them.
    """
    dialogue = dialogue_of(wanted.base, wanted.max_tokens)
    rows: list[Example] = []
    for comparison in _source(wanted):
        some = _best(comparison, wanted.responses)
        if some is None:
            continue
        try:
            row = encode([some], dialogue, first=len(rows))[0]
        except PromptTooLongError:
            continue
        if len(row["prompt"]) + max(map(len, row["responses"])) <= wanted.max_tokens:
            rows.append(row)
        if len(rows) == wanted.number:
            return rows
    raise UserError(
        f"{', '.join(Path(f).name for f in wanted.files)}: {len(rows)} comparisons with {wanted.responses} "
        f"untied responses of at most {wanted.max_tokens} tokens, {wanted.number} are wanted: ask for fewer"
    )


def _source(wanted: Wanted) -> Iterable[Comparison]:
    if not wanted.files:
        return hh_shaped(wanted.seed, wanted.responses, wanted.scale)
    comparisons, _ = read_comparisons(wanted.files, on_bad_rows="skip")
    random.Random(wanted.seed).shuffle(comparisons)
    return comparisons


def _best(comparison: Comparison, number: int) -> Comparison | None:
    """The best responses of a comparison in their order, None where it has not as many without a tie."""
    ranked = sorted(zip(comparison.ranks, comparison.responses, strict=True))
    if len(ranked) < number or len(set(comparison.ranks)) < len(ranked) or (number == 2 < len(ranked)):
        return None
    texts = tuple(text for _, text in ranked[:number])
    return Comparison(comparison.prompt, texts, tuple(range(number)), comparison.source)


def pairs_of(rows: Sequence[Example]) -> Iterator[dict[str, Any]]:
    """All pairs of every comparison in the columns that ``trl.RewardTrainer`` takes as tokenised already.

    The others say where a pair comes from; the trainer leaves them alone.
    """
    for row in rows:
        whole = [[*row["prompt"], *response] for response in row["responses"]]
        for better, worse in itertools.combinations(range(len(whole)), 2):
            yield {
                "chosen_ids": whole[better],
                "rejected_ids": whole[worse],
                "comparison": row["index"],
                "numbers": [better, worse],
                "prompt_tokens": len(row["prompt"]),
            }


def response_tokens_of(rows: Iterable[Example]) -> int:
    """Tokens of all responses of comparisons, their closings included."""
    return sum(len(response) for row in rows for response in row["responses"])


def response_tokens_in(pairs: Iterable[dict[str, Any]]) -> int:
    """The same of the comparisons that pairs are made of, each response counted once."""
    found: dict[tuple[int, int], int] = {}
    for pair in pairs:
        for number, ids in zip(pair["numbers"], (pair["chosen_ids"], pair["rejected_ids"]), strict=True):
            found[pair["comparison"], number] = len(ids) - pair["prompt_tokens"]
    return sum(found.values())
