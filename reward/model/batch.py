"""Comparisons to token rows in which a prompt stands once for all its responses.

A packed row is ``prompt + response 1 + response 2 + ...``; a block mask lets each response see the prompt and
itself, and every response goes on counting positions where the prompt ends. Scores and gradients are those of
separate rows, without forwarding the prompt K times. The same class holds separate rows: they are packed rows
of one response.

Shape suffixes: ``_B`` comparison, ``_K`` response of a comparison, ``_R`` response of all, ``_N`` row,
``_T`` token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.data.comparisons import Comparison, distinct_responses
from rlhf.errors import UserError
from rlhf.models import packing
from rlhf.models.packing import PackedBatch, Row
from rlhf.models.token_batches import token_batches
from rlhf.tokenization.dialogue import Dialogue

Example = dict[str, Any]
"""An encoded comparison: ``prompt`` (ids), ``responses`` (ids of each with its closing), ``spoken`` (how many
of those each writer said: the closing EOS counts unless the response was cut), ``ranks``, ``index``, its
number among the examples of a stage, and ``group``, what it belongs to beyond its prompt, or None."""
Wanted = Literal["none", "best", "all"]
_ROW = 512  # tokens of a row with several responses


@dataclass(frozen=True)
class PackedComparisons(PackedBatch):
    """A few comparisons as rows; a sequence is a response, flat and in order, behind its prompt."""

    ranks_BK: Tensor
    """0 = best, equal = tie."""
    mask_BK: Tensor
    """True = a real response."""

    def by_comparison(self, values_R: Tensor) -> Tensor:
        """One value a response, flat, as [B, K]; 0 where there is no response."""
        zeros_BK = torch.zeros(self.mask_BK.shape, dtype=values_R.dtype, device=values_R.device)
        return zeros_BK.masked_scatter(self.mask_BK, values_R)


def encode(comparisons: Sequence[Comparison], dialogue: Dialogue, first: int = 0) -> list[Example]:
    """Token ids of comparisons, each response closed the way the reward model reads it, numbered on from
    ``first``.

    Responses whose ids are equal, as a cut can leave them, are one with the better rank; a comparison in
    which nothing is left to tell apart is left out.
    """
    rows: list[Example] = []
    for whole in comparisons:
        ids = {text: dialogue.close([], dialogue.encode_response(text)) for text in whole.responses}
        comparison = distinct_responses(whole, lambda text, ids=ids: tuple(ids[text]))  # type: ignore[misc]
        if len(set(comparison.ranks)) < 2:
            continue
        closed = [ids[text] for text in comparison.responses]
        said = [len(response) - len(dialogue.closing) for response in closed]
        spoken = [number + (number < dialogue.max_response_tokens) for number in said]
        rows.append(
            {
                "prompt": dialogue.encode_prompt(comparison.prompt),
                "responses": closed,
                "spoken": spoken,
                "ranks": list(comparison.ranks),
                "index": first + len(rows),
                "group": comparison.group,
            }
        )
    return rows


def group_of(example: Example) -> Hashable:
    """What an example must not be parted from the others of: its group, or its prompt where it has none."""
    return example.get("group") or tuple(example["prompt"])


def encode_split(
    train: Sequence[Comparison],
    held_out: Sequence[Comparison],
    dialogue: Dialogue,
    say: Callable[[str], None],
    key: str = "dialogue.max_response_tokens",
) -> tuple[list[Example], list[Example]]:
    """Both parts as examples, numbered through; says how many :func:`encode` has left out; ``key`` names the
    limit of the responses.

    Raises:
        UserError: nothing is left of a part.
    """
    rows = encode(train, dialogue)
    exam = encode(held_out, dialogue, first=len(rows))
    limit = f"{key}={dialogue.max_response_tokens}"
    for name, given, kept in (("training", train, rows), ("held-out", held_out, exam)):
        if not kept:
            raise UserError(
                f"all {len(given)} {name} comparisons have responses that are equal within {limit}: raise it"
            )
    lost = [len(train) - len(rows), len(held_out) - len(exam)]
    if any(lost):
        say(
            f"left out: {lost[0]} of {len(train)} training and {lost[1]} of {len(held_out)} held-out "
            f"comparisons, whose responses are equal within {limit}"
        )
    return rows, exam


def bins_of(example: Example, share: bool) -> list[list[int]]:
    """Which of its responses stand in each row that an example makes.

    Attention costs the square of a row's length, so a row is not longer than 512 tokens, or four prompts: a
    ranking of many long responses repeats its prompt instead. They are dealt, the longest first, to as few
    rows, each response to the shortest, so that these are about equally long and little is padded; one may
    then be somewhat longer than that.
    """
    prompt, lengths = len(example["prompt"]), [len(r) for r in example["responses"]]
    number = len(lengths)
    if share:
        number = min(number, max(1, -(-sum(lengths) // (max(_ROW, 4 * prompt) - prompt))))
    bins: list[list[int]] = [[] for _ in range(number)]
    sizes = [0] * number
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        shortest = min(range(number), key=lambda row: (sizes[row], len(bins[row])))
        bins[shortest].append(k)
        sizes[shortest] += lengths[k]
    return sorted(map(sorted, bins))


def width(example: Example, share: bool) -> int:
    """Tokens of the longest row that an example makes."""
    longest = max(sum(len(example["responses"][k]) for k in row) for row in bins_of(example, share))
    return len(example["prompt"]) + longest


def rows_of(example: Example, share: bool) -> int:
    """Number of rows that an example makes."""
    return len(bins_of(example, share))


def micro_batches(examples: Sequence[Example], budget: int, *, share: bool) -> list[list[int]]:
    """Indices of examples of similar length; a batch is at most ``budget`` tokens with its padding."""
    return token_batches(
        [width(e, share) for e in examples], budget, rows=[rows_of(e, share) for e in examples]
    )


class Distinct(NamedTuple):
    """Examples in which every response to a prompt stands once."""

    examples: list[Example]
    places_R: Tensor
    """Of each response of what they were made of, flat: its place among theirs, flat."""


def distinct(examples: Sequence[Example], budget: int) -> Distinct:
    """Put the responses of each prompt together, each once, however many examples hold it.

    Examples that hold no response twice stay as they are. Ranks mean nothing any more.

    Args:
        examples: any number.
        budget: tokens of the longest row that the responses of a prompt are put together in.
    """
    keys = [(tuple(e["prompt"]), tuple(r)) for e in examples for r in e["responses"]]
    if len(set(keys)) == len(keys):
        return Distinct(list(examples), torch.arange(len(keys)))
    said = [spoken for e in examples for spoken in e["spoken"]]
    merged: list[Example] = []
    newest: dict[tuple[int, ...], Example] = {}  # of each prompt
    places: dict[Any, tuple[int, int]] = {}
    for key, spoken in zip(keys, said, strict=True):
        if key in places:
            continue
        prompt, response = key
        example = newest.get(prompt)
        if example is None or len(prompt) + sum(map(len, example["responses"])) + len(response) > budget:
            example = {name: [] for name in ("responses", "spoken", "ranks")}
            example |= {"prompt": list(prompt), "index": len(merged)}
            newest[prompt] = example
            merged.append(example)
        places[key] = example["index"], len(example["responses"])
        for name, value in (("responses", list(response)), ("spoken", spoken), ("ranks", 0)):
            example[name].append(value)
    starts = [0]
    for example in merged:
        starts.append(starts[-1] + len(example["responses"]))
    return Distinct(merged, torch.tensor([starts[places[key][0]] + places[key][1] for key in keys]))


def layout(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Where each response stands in the flat list of all responses: index, ranks and mask, [B, K] each."""
    widest = max(len(e["ranks"]) for e in examples)
    flat_BK = torch.zeros(len(examples), widest, dtype=torch.long)
    ranks_BK = torch.zeros_like(flat_BK)
    mask_BK = torch.zeros_like(flat_BK, dtype=torch.bool)
    first = 0
    for b, example in enumerate(examples):
        k = len(example["ranks"])
        flat_BK[b, :k] = torch.arange(first, first + k)
        ranks_BK[b, :k] = torch.tensor(example["ranks"])
        mask_BK[b, :k] = True
        first += k
    return flat_BK, ranks_BK, mask_BK


def pack(
    examples: Sequence[Example], pad_id: int, *, share: bool = True, wanted: Wanted = "none"
) -> PackedComparisons:
    """Lay examples out as rows.

    Args:
        examples: at least one.
        pad_id: fills the rows up.
        share: the responses of a comparison behind one copy of the prompt, as far as :func:`bins_of` lets
            them; False = a row a response.
        wanted: whose tokens' log-probabilities will be asked for: nobody's, the best (rank 0), or all.
    """
    sequences: list[Row] = []
    bins: list[list[int]] = []
    prompts: list[list[int]] = []
    for example in examples:
        best = min(example["ranks"])
        own = bins_of(example, share)
        bins += [[len(sequences) + k for k in row] for row in own]
        prompts += [example["prompt"]] * len(own)
        for k, response in enumerate(example["responses"]):
            asked = wanted == "all" or (wanted == "best" and example["ranks"][k] == best)
            said = example["spoken"][k] if asked else 0
            sequences.append(Row(response, [t < said for t in range(len(response))]))
    rows = packing.pack(sequences, bins, pad_id, prompts)
    _, ranks_BK, mask_BK = layout(examples)
    return PackedComparisons(**vars(rows), ranks_BK=ranks_BK, mask_BK=mask_BK)


def only(example: Example, kept: Sequence[int]) -> Example:
    """An example with some of its responses."""
    lists: Any = {name: [example[name][k] for k in kept] for name in ("responses", "spoken", "ranks")}
    return {**example, **lists}


def as_example(response: Sequence[int], prompt: Sequence[int] = ()) -> Example:
    """A closed sequence that stands for itself, to be scored behind its prompt."""
    responses = [list(response)]
    return {
        "prompt": list(prompt),
        "responses": responses,
        "spoken": [len(response)],
        "ranks": [0],
        "index": -1,
    }
