"""From hidden states to the log-probabilities of chosen tokens, without a [B, T, V] tensor.

Shape suffixes: ``_B`` sequence, ``_T`` token, ``_D`` hidden unit, ``_V`` vocabulary entry, ``_N`` counted
position, ``_C`` position of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.errors import UserError
from rlhf.models.kernels.onednn import linear

_LOGITS_AT_ONCE = 2**24  # logits in memory at once, 64 MiB in float32
_LOGITS_IN_CACHE = 2**18  # 1 MiB in float32


def chunk_of(vocabulary: int) -> int:
    """Positions whose logits are in memory at once."""
    return max(1, _LOGITS_AT_ONCE // vocabulary)


def token_log_probs(
    hidden_BTD: Tensor,
    head: Callable[[Tensor], Tensor],
    targets_BT: Tensor,
    mask_BT: Tensor | None = None,
    *,
    temperature: float,
    chunk: int,
    differentiable_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every target token, and the entropy it was drawn with.

    hidden_BTD: the state that predicts targets_BT at the SAME index (the caller has shifted them).
    head: maps states [N, D] to logits [N, V]; called on at most ``chunk`` counted positions at a time.
    mask_BT: True = compute this position; the others return 0 and never reach the head. None = all.
    differentiable_entropy: let the entropy carry a gradient, as a bonus on it needs.
    Returns float32 logp_BT = log softmax(logits / temperature)[target] and entropy_BT of the same
    distribution in nats. No reduction. Gradients flow to the hidden states, and to a head only if it learns.

    With a frozen linear head the gradient is worked out beside the value, a chunk at a time, since it is
    known up to one factor a position: nothing of width V outlives its chunk. With any other head and more
    than one chunk, each is checkpointed: backward runs the head a second time. Under ZeRO-3 each call of the
    head is a collective: ranks with unequal numbers of counted positions must gather the head's weights
    before calling this.
    """
    if temperature <= 0 or chunk < 1:
        raise ValueError(f"temperature {temperature} and chunk {chunk} must be positive")
    shape = targets_BT.shape
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    if mask_BT is not None:
        hidden_ND, targets_N = hidden_BTD[mask_BT], targets_BT[mask_BT]
    if is_frozen_linear(head):
        logp_N, entropy_N = _FrozenHeadLogProbs.apply(
            hidden_ND,
            head.weight,  # type: ignore[attr-defined]
            targets_N,
            temperature,
            chunk,
            differentiable_entropy,
        )
    else:
        logp_N, entropy_N = _by_any_head(hidden_ND, head, targets_N, temperature, chunk)
    if not differentiable_entropy:
        entropy_N = entropy_N.detach()
    if mask_BT is None:
        return logp_N.view(shape), entropy_N.view(shape)
    zeros_BT = torch.zeros(shape, dtype=torch.float32, device=hidden_BTD.device)
    where = mask_BT.nonzero(as_tuple=True)
    return zeros_BT.index_put(where, logp_N), zeros_BT.index_put(where, entropy_N)


def is_frozen_linear(head: Any) -> bool:
    """Whether a head is one whole matrix that does not learn."""
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    return (
        not head.weight.requires_grad
        and not hasattr(head.weight, "ds_id")
        and head.weight.is_floating_point()
    )


class TransformedHead(nn.Module):
    """The logits of a family that scales or caps what its matrix gives.

    Args:
        matrix: the model's own output embeddings; shared, not copied.
        factor: multiplies the logits (Cohere's ``logit_scale``).
        divisor: divides them (Granite's ``logits_scaling``).
        cap: logits become ``cap * tanh(logits / cap)`` (Gemma 2, arXiv 2408.00118); None = they stay.
    """

    def __init__(self, matrix: nn.Module, factor: float, divisor: float, cap: float | None) -> None:
        super().__init__()
        self.matrix, self.factor, self.divisor, self.cap = matrix, factor, divisor, cap

    @property
    def weight(self) -> Tensor:
        """The matrix, [V, D]."""
        return self.matrix.weight  # type: ignore[return-value]

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Logits of hidden states, [N, V]."""
        logits_NV = self.matrix(hidden_ND) * self.factor / self.divisor
        return logits_NV if self.cap is None else torch.tanh(logits_NV / self.cap) * self.cap


def logits_head(model: PreTrainedModel, matrix: Any = None) -> Any:
    """The map from a causal model's last hidden states to its logits: its matrix alone where that is all.

    Whether it is all that the family does is proved by :func:`check_head`.

    Args:
        model: for its configuration.
        matrix: another module in the place of its output embeddings.
    """
    matrix = model.get_output_embeddings() if matrix is None else matrix
    config = model.config.get_text_config()
    factor, divisor = (float(getattr(config, name, None) or 1) for name in ("logit_scale", "logits_scaling"))
    cap = getattr(config, "final_logit_softcapping", None)
    return matrix if factor == divisor == 1 and cap is None else TransformedHead(matrix, factor, divisor, cap)


def check_head(model: PreTrainedModel) -> None:
    """A model's logits must be its vocabulary head's map of the last hidden state (:func:`logits_head`).

    Raises:
        UserError: they are not: the family changes them in a way that is not known here.
    """
    head: Any = logits_head(model)
    decoder: Any = model.get_decoder()
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % int(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        hidden, logits = decoder(**inputs).last_hidden_state, model(**inputs).logits
    if not torch.allclose(head(hidden), logits, atol=1e-3):
        raise UserError(
            f"{model.config.name_or_path}: this architecture changes its logits behind the vocabulary head "
            "in a way that the log-probs here do not know; use another model"
        )


def _rows_at_once(logits_CV: Tensor) -> list[slice]:
    """All rows of a chunk, or a few at a time where float32 copies of them then stay in a CPU's cache."""
    whole = logits_CV.dtype == torch.float32 or logits_CV.device.type != "cpu"
    size = len(logits_CV) if whole else max(1, _LOGITS_IN_CACHE // logits_CV.shape[1])
    return [slice(first, first + size) for first in range(0, len(logits_CV), size)]


class _FrozenHeadLogProbs(torch.autograd.Function):
    """Chosen log-probs and entropies under softmax(W h / temperature); W is a constant.

    d logp / d h = (W[target] - p W) / temperature, and d entropy / d h = -(p * (log p + entropy)) W /
    temperature, so both are computed where p is at hand and only scaled on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        temperature: float,
        chunk: int,
        bonus: bool,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        logp_N = torch.empty(len(targets_N), device=hidden_ND.device)
        entropy_N = torch.empty_like(logp_N)
        slope_ND = torch.empty_like(hidden_ND) if wanted else None
        bend_ND = torch.empty_like(hidden_ND) if wanted and bonus else None
        half = weight_VD.dtype != torch.float32
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            targets_C1 = targets_N[part, None]
            raw_CV = linear(hidden_ND[part], weight_VD)
            bend_CV = torch.empty_like(raw_CV) if half and bend_ND is not None else raw_CV
            for rows in _rows_at_once(raw_CV):
                logits_CV = raw_CV[rows].float()
                if temperature != 1.0:
                    logits_CV /= temperature
                logits_CV -= logits_CV.logsumexp(dim=-1, keepdim=True)  # log-probs from here on
                logp_N[part][rows] = logits_CV.gather(-1, targets_C1[rows]).squeeze(-1)
                p_CV = logits_CV.exp()
                entropy_C1 = -torch.linalg.vecdot(p_CV, logits_CV)[:, None]
                entropy_N[part][rows] = entropy_C1[:, 0]
                if half and wanted:  # in float32 these are whole tensors already, and worked out below
                    if bend_ND is not None:
                        bend_CV[rows] = logits_CV.add_(entropy_C1).mul_(p_CV)
                    # rounded here, a slope that is nearly 0 keeps its digits
                    raw_CV[rows] = p_CV.neg_().scatter_add_(-1, targets_C1[rows], torch.ones_like(entropy_C1))
            if slope_ND is not None and half:
                slope_ND[part] = linear(raw_CV, weight_VD.T) / temperature
            elif slope_ND is not None:
                slope_ND[part] = (weight_VD[targets_C1[:, 0]] - linear(p_CV, weight_VD.T)) / temperature
                bend_CV = logits_CV.add_(entropy_N[part, None]).mul_(p_CV) if bend_ND is not None else bend_CV
            if bend_ND is not None:
                bend_ND[part] = linear(bend_CV, weight_VD.T) / -temperature
        ctx.save_for_backward(slope_ND, bend_ND)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_N: Tensor, grad_entropy_N: Tensor) -> Any:
        slope_ND, bend_ND = ctx.saved_tensors
        grad_ND = grad_logp_N[:, None] * slope_ND
        if bend_ND is not None:
            grad_ND = grad_ND + grad_entropy_N[:, None] * bend_ND
        return grad_ND.to(slope_ND.dtype), None, None, None, None, None


def _by_any_head(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], targets_N: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """The same through autograd, for a head that learns, is sharded, or is more than a matrix."""

    def score(hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        logp_CV = torch.log_softmax(head(hidden_CD).float() / temperature, dim=-1)
        logp_C = logp_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1)
        return logp_C, torch.special.entr(logp_CV.exp()).sum(dim=-1)

    parts = []
    for start in range(0, targets_N.shape[0], chunk):
        piece = hidden_ND[start : start + chunk], targets_N[start : start + chunk]
        if torch.is_grad_enabled() and targets_N.shape[0] > chunk:
            parts.append(checkpoint(score, *piece, use_reentrant=False))
        else:
            parts.append(score(*piece))
    if parts:
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    nothing = hidden_ND.float().sum(dim=-1)  # empty, but still attached to the graph, so that backward works
    return nothing, nothing
