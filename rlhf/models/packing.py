"""Several sequences in one row, each blind to the others: rows, masks, forward passes, log-probabilities.

A row may begin with a part that all its sequences look back at, as a prompt before its responses; every
sequence counts its positions on from there. So packed rows give what separate rows give.

Shape suffixes: ``_N`` row, ``_T`` token, ``_D`` hidden unit, ``_B`` sequence, ``_S`` token whose
log-probability is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import first_line, out_of_memory
from rlhf.models.backbone import layers_of
from rlhf.models.log_probs import chunk_of, token_log_probs
from rlhf.models.masks import attention_masks, masked_mean
from rlhf.models.token_batches import token_batches

SHARED = 1  # segment that the others of a row may look back at; 0 is padding, 2 and up stand for themselves
_TOLERANCE = 1e-3  # between the states of packed and separate rows, in units of their length


class Row(NamedTuple):
    """A sequence and the tokens of it that are learned."""

    ids: list[int]
    counts: list[bool]
    """True = the log-probability of this token is wanted; the first token has none unless a shared part is
    before it."""


@dataclass(frozen=True)
class PackedBatch:
    """Sequences as right-padded rows."""

    ids_NT: Tensor
    positions_NT: Tensor
    """Of each token in its own sequence, the shared part included."""
    segments_NT: Tensor
    """0 = padding, 1 = the part that all sequences of the row share, 2 and up = one sequence each."""
    rows_B: Tensor
    columns_B: Tensor
    """Row and column of the last token of each sequence."""
    starts_B: Tensor
    """Column of the first token of each sequence."""
    rows_S: Tensor
    columns_S: Tensor
    """Row and column of the state that predicts each wanted token."""
    targets_S: Tensor
    """The wanted tokens."""
    owners_S: Tensor
    """Index of the sequence that each belongs to."""

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def attention_mask(
    segments_NT: Tensor, positions_NT: Tensor, config: Any, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Who may look at whom.

    Rows with one segment, or one behind the shared part, need no more than the plain mask [N, T] (1 = a real
    token; causality and windows are the model's own business). Otherwise :func:`attention_masks`: a token
    looks back at the shared part and at its own segment, as far as the window of a layer goes, and padding at
    itself, so that no row is all masked.
    """
    if not bool((segments_NT > SHARED + 1).any()):
        return (segments_NT > 0).long()
    query, key = segments_NT[:, :, None], segments_NT[:, None, :]
    columns = torch.arange(segments_NT.shape[1], device=segments_NT.device)
    back = columns[None, :, None] >= columns[None, None, :]
    may = back & ((key == query) | (key == SHARED))
    return attention_masks(may, positions_NT, positions_NT, config, dtype)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of sequences by row: the longest first, each into the first row that has room (Johnson 1973).

    A sequence that is longer than ``capacity`` has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((r for r, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = -1
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def micro_batches(lengths: Sequence[int], budget: int, *, packing: bool) -> list[list[list[int]]]:
    """Indices of sequences by row and by micro-batch; a batch is at most ``budget`` tokens with its padding.

    Args:
        lengths: tokens of each sequence, at least one.
        budget: a sequence that is longer by itself goes alone.
        packing: let short ones share a row, which is as wide as the longest of all; else a row each.
    """
    bins = first_fit(lengths, max(lengths)) if packing else [[index] for index in range(len(lengths))]
    widths = [sum(lengths[i] for i in row) for row in bins]
    return [[bins[r] for r in batch] for batch in token_batches(widths, budget, ties=bins)]


def pack(
    sequences: Sequence[Row],
    bins: Sequence[Sequence[int]],
    pad_id: int,
    shared: Sequence[Sequence[int]] | None = None,
) -> PackedBatch:
    """Lay sequences out as rows.

    Args:
        sequences: all of them; ``rows_B`` and ``owners_S`` count in this order. One that is in no bin has its
            first and last token at 0, 0.
        bins: the indices of those that share a row, for each row.
        pad_id: fills the rows up.
        shared: tokens with which each row begins; None = none.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, segments
    ends = [(0, 0, 0)] * len(sequences)  # row, column of the last token, column of the first
    wanted: list[tuple[int, int, int, int]] = []  # row, column, target, owner
    for n, members in enumerate(bins):
        prefix = [] if shared is None else shared[n]
        first = len(prefix)
        ids, positions, segments = list(prefix), list(range(first)), [SHARED] * first
        for place, index in enumerate(members):
            row, begin = sequences[index], len(ids)
            before = [first - 1, *range(begin, begin + len(row.ids) - 1)]  # where each token is predicted
            wanted += [
                (n, column, token, index)
                for column, token, counts in zip(before, row.ids, row.counts, strict=True)
                if counts and column >= 0
            ]
            ids += row.ids
            positions += range(first, first + len(row.ids))
            segments += [SHARED + 1 + place] * len(row.ids)
            ends[index] = n, len(ids) - 1, begin
        rows.append((ids, positions, segments))
    longest = max(len(ids) for ids, _, _ in rows)
    ids_NT, positions_NT, segments_NT = (
        torch.tensor([row[part] + [fill] * (longest - len(row[part])) for row in rows])
        for part, fill in enumerate((pad_id, 0, 0))
    )
    ends_B3 = torch.tensor(ends, dtype=torch.long).reshape(-1, 3)
    wanted_S4 = torch.tensor(wanted, dtype=torch.long).reshape(-1, 4)
    return PackedBatch(ids_NT, positions_NT, segments_NT, *ends_B3.T, *wanted_S4.T)


class HiddenStates:
    """Mixed into a Hugging Face model: its hidden states, and a classifier's scores, on packed rows.

    Called as anybody calls it, the model is what it was. With ``part`` it returns hidden states [N, T, D]:
    the last ones (``all``), those that enter layer ``cut`` (``trunk``), or the last ones as they follow from
    ``hidden_NTD`` that enter layer ``cut`` (``top``). With ``rows_B``, ``columns_B`` and ``starts_B`` a
    sequence classifier adds its head's outputs [B]: at the last token of each sequence, or their mean over
    its tokens where ``pooling`` says ``mean`` (the head is linear, so that is its output for the mean state).
    """

    pooling = "last"

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        part: str | None = None,
        cut: int = 0,
        hidden_NTD: Tensor | None = None,
        rows_B: Tensor | None = None,
        columns_B: Tensor | None = None,
        starts_B: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """See the class."""
        if part is None:
            return super().forward(input_ids=input_ids, **options)  # type: ignore[misc]
        inside: Any = self
        decoder = inside.get_decoder()
        inputs = {name: options[name] for name in ("attention_mask", "position_ids")}  # peft adds others
        inputs |= {"input_ids": input_ids} if hidden_NTD is None else {"inputs_embeds": hidden_NTD}
        with layers_of(decoder, part, cut):
            out_NTD = decoder(**inputs, use_cache=False).last_hidden_state
        if rows_B is None:
            return out_NTD
        if self.pooling == "last":
            return out_NTD, inside.score(out_NTD[rows_B, columns_B].float()).squeeze(-1)
        scores_NT = inside.score(out_NTD.float()).squeeze(-1)
        columns_T = torch.arange(scores_NT.shape[1], device=scores_NT.device)
        own_BT = (columns_T >= starts_B[:, None]) & (columns_T <= columns_B[:, None])  # type: ignore[index]
        return out_NTD, masked_mean(scores_NT[rows_B], own_BT, dim=-1)


def with_hidden_states(base: PreTrainedModel) -> PreTrainedModel:
    """Let a loaded model give its hidden states (:class:`HiddenStates`); weights and saved form stay."""
    kind = type(base)
    base.__class__ = type(f"Packed{kind.__name__}", (HiddenStates, kind), {})
    return base


def dtype_of(model: Any) -> torch.dtype:
    """Type of the base's weights below peft, and below what DeepSpeed wraps around it."""
    return getattr(model, "module", model).base_model.model.dtype


def inputs_of(model: Any, batch: PackedBatch) -> dict[str, Any]:
    """What the base reads of a packed batch."""
    config = getattr(model, "module", model).base_model.model.config.get_text_config()
    mask = attention_mask(batch.segments_NT, batch.positions_NT, config, dtype_of(model))
    return {"input_ids": batch.ids_NT, "attention_mask": mask, "position_ids": batch.positions_NT}


def packed_log_probs(hidden_NTD: Tensor, batch: PackedBatch, head: Any) -> tuple[Tensor, Tensor]:
    """Log-probability of every wanted token, and the entropy that it was predicted with, nats, [S] each.

    hidden_NTD: last hidden states. head: maps states to logits, which are computed for these tokens alone, a
    chunk at a time.
    """
    states_1SD = hidden_NTD[batch.rows_S, batch.columns_S][None]
    chunk = chunk_of(head.weight.shape[0])
    both = token_log_probs(states_1SD, head, batch.targets_S[None], temperature=1.0, chunk=chunk)
    return both[0][0], both[1][0]


def sequence_log_probs(hidden_NTD: Tensor, batch: PackedBatch, head: Any) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each sequence's wanted tokens, and their number, [B] each; 0 where none."""
    logps_S, _ = packed_log_probs(hidden_NTD, batch, head)
    zeros_B = logps_S.new_zeros(len(batch.rows_B))
    counts_B = zeros_B.index_add(0, batch.owners_S, torch.ones_like(logps_S))
    return zeros_B.index_add(0, batch.owners_S, logps_S), counts_B


@torch.no_grad()
def compare_packing(states: Callable[[bool], Tensor], model: Any) -> str | None:
    """Compare packed with separate rows on a few real examples; returns a warning where they differ.

    An architecture may ignore a four-dimensional mask or positions of its own; its rows must stay separate.
    The examples have to be those in which that would show: the longest, with the shortest beside them.

    Args:
        states: hidden states of the examples [..., D], packed (True) or in rows of their own.
        model: see :func:`dtype_of`.
    """
    try:
        packed, separate = states(True), states(False)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        if out_of_memory(error):
            raise
        reason = first_line(error, 100)
        return f"this architecture does not take packed rows ({reason}): nothing shares a row"
    gap = difference(packed, separate)
    if gap <= tolerance(model):
        return None
    return f"packed rows give other outputs with this architecture (by {gap:.2g}): nothing shares a row"


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest distance of a state [..., D] from the one that it should be, in units of that one's length.

    Relative, and of states rather than of what a head makes of them, because a head that has not learned yet
    gives next to nothing for every state.
    """
    gap = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-9)
    return float(gap.max())


def tolerance(model: Any) -> float:
    """The :func:`difference` that rounding alone can make: 150 times as much in half precision, and in a
    quantized base, whose scales depend on what else is in a batch.

    Over the 30 layers of SmolLM2-135M in bfloat16 rounding made 0.06, and a mask that is ignored 1.2.
    """
    base = getattr(model, "module", model).base_model.model
    exact = base.dtype == torch.float32 and not getattr(base, "is_quantized", False)
    return _TOLERANCE * (1 if exact else 150)
