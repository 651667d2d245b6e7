"""Comparisons to token rows in which a prompt stands once for all its responses.

A packed row is ``prompt + response 1 + response 2 + ...``; a block mask lets each response see the prompt and
itself, and every response goes on counting positions where the prompt ends. Scores and gradients are those of
separate rows, without forwarding the prompt K times. The same class holds separate rows: they are packed rows
of one response.

Shape suffixes: ``_B`` comparison, ``_K`` response of a comparison, ``_N`` row, ``_T`` token, ``_S`` token
whose log-probability is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.data.comparisons import Comparison
from rlhf.models.packing import SHARED
from rlhf.models.token_batches import token_batches
from rlhf.tokenization.dialogue import Dialogue

Example = dict[str, Any]
"""An encoded comparison: ``prompt`` (ids), ``responses`` (ids of each with its closing), ``spoken`` (how many
of those each writer said: the closing EOS counts unless the response was cut), ``ranks``, and ``index``, its
number among the examples of a stage."""
Wanted = Literal["none", "best", "all"]


class Packed(NamedTuple):
    """A few comparisons as right-padded rows."""

    ids_NT: Tensor
    positions_NT: Tensor
    """Of each token in its own sequence."""
    segments_NT: Tensor
    """0 = padding, 1 = the part that all responses of the row share, 2 and up = one response each."""
    rows_BK: Tensor
    """Row of each response; 0 where there is none."""
    columns_BK: Tensor
    """Column of its last token, where the score is read."""
    ranks_BK: Tensor
    """0 = best, equal = tie."""
    mask_BK: Tensor
    """True = a real response."""
    states_2S: Tensor
    """Row and column of the state that predicts each wanted token."""
    targets_S: Tensor
    """The wanted tokens of the responses."""
    owners_S: Tensor
    """Index b * K + k of the response that each belongs to."""
    index_N: Tensor
    """Number of the example that each row comes from; a row a response if rows are separate."""

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        return Packed(*(t.to(device) for t in self))


def encode(comparisons: Sequence[Comparison], dialogue: Dialogue, first: int = 0) -> list[Example]:
    """Token ids of comparisons, each response closed the way the reward model reads it, numbered on from
    ``first``."""
    rows: list[Example] = []
    for comparison in comparisons:
        closed, spoken = [], []
        for text in comparison.responses:
            ids = dialogue.encode_response(text)
            closed.append(dialogue.close([], ids))
            said = len(closed[-1]) - len(dialogue.closing)
            spoken.append(said + (said < dialogue.max_response_tokens))
        rows.append(
            {
                "prompt": dialogue.encode_prompt(comparison.prompt),
                "responses": closed,
                "spoken": spoken,
                "ranks": list(comparison.ranks),
                "index": first + len(rows),
            }
        )
    return rows


def width(example: Example, share: bool) -> int:
    """Tokens of the longest row that an example makes."""
    prompt, lengths = len(example["prompt"]), [len(r) for r in example["responses"]]
    return prompt + (sum(lengths) if share else max(lengths))


def rows_of(example: Example, share: bool) -> int:
    """Number of rows that an example makes."""
    return 1 if share else len(example["responses"])


def micro_batches(examples: Sequence[Example], budget: int, *, share: bool) -> list[list[int]]:
    """Indices of examples of similar length; a batch is at most ``budget`` tokens with its padding."""
    return token_batches(
        [width(e, share) for e in examples], budget, rows=[rows_of(e, share) for e in examples]
    )


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


def pack(examples: Sequence[Example], pad_id: int, *, share: bool = True, wanted: Wanted = "none") -> Packed:
    """Lay examples out as rows.

    Args:
        examples: at least one.
        pad_id: fills the rows up.
        share: one row a comparison, its responses behind one copy of the prompt; False = a row a response.
        wanted: whose tokens' log-probabilities will be asked for: nobody's, the best (rank 0), or all.
    """
    _, ranks_BK, mask_BK = layout(examples)
    rows_BK, columns_BK = torch.zeros_like(ranks_BK), torch.zeros_like(ranks_BK)
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, segments
    states: list[tuple[int, int]] = []
    targets: list[int] = []
    owners: list[int] = []
    for b, example in enumerate(examples):
        prompt = example["prompt"]
        for k, response in enumerate(example["responses"]):
            if k == 0 or not share:
                rows.append((list(prompt), list(range(len(prompt))), [SHARED] * len(prompt)))
            ids, positions, segments = rows[-1]
            start = len(ids)
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
            segments += [SHARED + 1 + k if share else SHARED] * len(response)
            rows_BK[b, k], columns_BK[b, k] = len(rows) - 1, len(ids) - 1
            if wanted == "all" or (wanted == "best" and example["ranks"][k] == min(example["ranks"])):
                said = example["spoken"][k]
                before = [len(prompt) - 1, *range(start, start + said - 1)]
                states += [(len(rows) - 1, column) for column in before[:said]]
                targets += response[:said]
                owners += [b * ranks_BK.shape[1] + k] * said
    longest = max(len(ids) for ids, _, _ in rows)
    fills = (pad_id, 0, 0)
    ids_NT, positions_NT, segments_NT = (
        torch.tensor([row[part] + [fills[part]] * (longest - len(row[part])) for row in rows])
        for part in range(3)
    )
    return Packed(
        ids_NT,
        positions_NT,
        segments_NT,
        rows_BK,
        columns_BK,
        ranks_BK,
        mask_BK,
        torch.tensor(states, dtype=torch.long).reshape(-1, 2).T,
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(owners, dtype=torch.long),
        torch.tensor([e["index"] for e in examples for _ in range(rows_of(e, share))]),
    )


def as_example(row: Sequence[int]) -> Example:
    """A closed sequence that stands for itself, to be scored."""
    return {"prompt": [], "responses": [list(row)], "spoken": [len(row)], "ranks": [0], "index": -1}
