"""Pure tensor helpers for padded token sequences: masks, positions, log-probabilities, masked moments.

One convention for every mask: bool, True = counts. Suffixes name the axes: ``_B`` sequence in the batch,
``_T`` token, ``_D`` hidden unit, ``_V`` vocabulary. Whatever stands where a mask is False, NaN included,
changes no result and no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8  # added to the variance (Ziegler et al. 2019, official code)
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size")


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack token rows so that all of them END in the same column.

    Returns ids_BT (long) and mask_BT (True = a token of the row, False = padding). T is the longest row.
    """
    return _pad(rows, pad_id, left=True)


def right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack token rows so that all of them START in the first column.

    Returns ids_BT (long) and mask_BT (True = a token of the row, False = padding). T is the longest row.
    """
    return _pad(rows, pad_id, left=False)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max((len(row) for row in rows), default=0)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids_BT[index, start : start + len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask_BT[index, start : start + len(row)] = True
    return ids_BT, mask_BT


def positions_from_mask(mask_BT: Tensor) -> Tensor:
    """Number the counted tokens of every row 0, 1, 2, ... wherever the padding stands.

    mask_BT: True = a real token. Returns long positions_BT, 0 at padding.
    """
    return (mask_BT.long().cumsum(dim=-1) - 1) * mask_BT


def attention_window(config: Any) -> int | None:
    """Tokens that the narrowest layers of a text model look back at, the reading one included.

    None where every layer reads all that fits into the model (within 8 tokens, which a probe reads beyond the
    window), as far as the configuration says.
    """
    windows = [getattr(config, name, None) for name in _WINDOWS]
    known = [n for n in windows if isinstance(n, int) and n > 0]
    limit = getattr(config, "max_position_embeddings", None)
    return min((n for n in known if limit is None or n + 8 <= limit), default=None)


def attention_masks(
    may_NQK: Tensor, query_NQ: Tensor, key_NK: Tensor, config: Any, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Masks that are added to attention scores, [N, 1, Q, K] in ``dtype``: 0 = may look, else the lowest.

    A ready-made mask takes the place of the model's own, so a sliding window (Beltagy et al. 2020, arXiv
    2004.05150) or a chunk of its layers has to be in it. Both count positions in a sequence, not columns.

    Args:
        may_NQK: True = the key may be looked at, were there no window.
        query_NQ: position of each query in its own sequence.
        key_NK: position of each key, likewise.
        config: of the text model: its ``layer_types``, ``sliding_window`` and ``attention_chunk_size``.
        dtype: of the model's weights.

    Returns:
        One mask for all layers, or one for each type of layer where these differ.

    Raises:
        ValueError: some layers are of a type that reads no mask of this kind.
    """

    def additive(may_NQK: Tensor) -> Tensor:
        out = torch.zeros(may_NQK.shape, dtype=dtype, device=may_NQK.device)
        return out.masked_fill_(~may_NQK, torch.finfo(dtype).min)[:, None]

    kinds = set(getattr(config, "layer_types", None) or [_only_layer_type(config)])
    if unknown := kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise ValueError(f"layers of type {min(unknown)}")
    masks: dict[str, Tensor] = {}
    for kind in sorted(kinds):
        may = may_NQK
        if kind == "sliding_attention":
            may = may & (query_NQ[:, :, None] - key_NK[:, None, :] < config.sliding_window)
        elif kind == "chunked_attention":
            size = config.attention_chunk_size
            may = may & (query_NQ[:, :, None] // size == key_NK[:, None, :] // size)
        masks[kind] = additive(may)
    return masks if len(masks) > 1 else masks.popitem()[1]


def _only_layer_type(config: Any) -> str:
    """What all layers are where a configuration has no ``layer_types``, as transformers reads it."""
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


def last_true_index(mask_BT: Tensor) -> Tensor:
    """Find the column of the last counted token of every row.

    mask_BT: True = counts; holes and padding on either side are allowed. Returns long index_B.
    A row in which nothing counts is a ValueError.
    """
    if not bool(mask_BT.any(dim=-1).all()):
        empty = (~mask_BT.any(dim=-1)).nonzero().flatten().tolist()
        raise ValueError(f"rows {empty} of the mask have no counted token, so they have no last one")
    columns_T = torch.arange(mask_BT.shape[-1], device=mask_BT.device)
    return torch.where(mask_BT, columns_T, -1).amax(dim=-1)


def append_token(ids_BT: Tensor, mask_BT: Tensor, token_id: int) -> tuple[Tensor, Tensor]:
    """Put one more token behind the last counted one of every row.

    ids_BT; mask_BT: True = a real token. Returns ids and mask of T + 1 columns; padding stays padding, on
    both sides. A row in which nothing counts is a ValueError.
    """
    rows_B, behind_B = torch.arange(len(ids_BT), device=ids_BT.device), last_true_index(mask_BT) + 1
    # Where a row ends in padding, its last column repeated is padding; elsewhere the token takes its place.
    ids_BT, mask_BT = (torch.cat([x_BT, x_BT[:, -1:]], dim=1) for x_BT in (ids_BT, mask_BT))
    ids_BT[rows_B, behind_B], mask_BT[rows_B, behind_B] = token_id, True
    return ids_BT, mask_BT


def action_mask(response_BT: Tensor, eos_id: int | Sequence[int]) -> Tensor:
    """Mark the actions of every response: its tokens up to and including the first EOS.

    response_BT: ids of the response alone. eos_id: one id or several, any of which ends a response.
    Returns bool mask_BT, True = an action; all True in a row without EOS. Only the place of the first EOS
    decides, so a pad id that equals EOS is harmless behind it; a row that was padded WITHOUT an EOS must
    be and-ed with the mask it was padded with.
    """
    is_eos_BT = _is_eos(response_BT, eos_id)
    seen_before_BT = is_eos_BT.long().cumsum(dim=-1) - is_eos_BT.long()
    return seen_before_BT == 0


def ended(response_BT: Tensor, eos_id: int | Sequence[int]) -> Tensor:
    """Tell which responses contain an EOS.

    response_BT: ids of the response alone. eos_id: one id or several. Returns bool ended_B, True = it ended.
    """
    return _is_eos(response_BT, eos_id).any(dim=-1)


def _is_eos(response_BT: Tensor, eos_id: int | Sequence[int]) -> Tensor:
    ids = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    return torch.isin(response_BT, torch.tensor(ids, dtype=response_BT.dtype, device=response_BT.device))


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the counted entries, in float32 or better.

    x and mask: one shape, mask True = counts. dim None reduces everything, else that axis.
    """
    kept = torch.where(mask, _at_least_float32(x), 0.0)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the counted entries; 0 where nothing counts.

    x and mask: one shape, mask True = counts. dim None reduces everything, else that axis.
    """
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_whiten(
    x_BT: Tensor,
    mask_BT: Tensor,
    *,
    shift_mean: bool,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scale the counted entries to variance 1: (x - mean) / sqrt(var + 1e-8), population variance.

    x_BT; mask_BT: True = counts, the others return 0. shift_mean True leaves mean 0 (advantages); False
    adds the old mean back (rewards, whose level carries meaning).
    all_reduce: sums a tensor over ranks; with it the moments are those of all ranks together, so that
    sharding a batch does not change the result. Every rank must call it, also one where nothing counts.

    Ziegler et al. 2019 (arXiv 1909.08593), official code, ``whiten``.
    """
    reduce = all_reduce if all_reduce is not None else _itself
    x_BT = torch.where(mask_BT, _at_least_float32(x_BT), 0.0)
    count, total = reduce(torch.stack([mask_BT.sum().to(x_BT.dtype), masked_sum(x_BT, mask_BT)])).unbind()
    count = count.clamp(min=1)
    mean = total / count
    variance = reduce(masked_sum((x_BT - mean).square(), mask_BT)) / count
    white_BT = (x_BT - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    if not shift_mean:
        white_BT = white_BT + mean
    return torch.where(mask_BT, white_BT, 0.0)


def _itself(x: Tensor) -> Tensor:
    return x


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
