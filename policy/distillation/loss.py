"""The Kullback-Leibler divergence that context distillation minimizes, teacher first, on k + 1 classes.

The teacher's k most likely tokens are a class each, all other tokens together are one more (Bai 2022, arXiv
2204.05862, A.1: k = 50). With S those tokens, p the teacher and q the student:

    KL = sum_{i in S} p_i log(p_i / q_i) + p_r log(p_r / q_r),   p_r = 1 - sum_S p_i,   q_r = 1 - sum_S q_i

Joining classes can only lower a divergence, so it is a lower bound of the KL over the whole vocabulary, and
0 where both agree on the classes. 1 - sum is never computed: the rest is a logsumexp over the complement, so
that neither a rest near 0 nor one near 1 loses digits.

Shape suffixes: ``_N`` place, ``_K`` stored token, ``_D`` hidden unit, ``_V`` vocabulary entry, ``_C`` place
of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf.models.kernels.onednn import linear
from rlhf.models.log_probs import is_frozen_linear


class TopKLogProbs(NamedTuple):
    """Log-probabilities of k tokens and of all others together at N places, natural logarithm."""

    indices_NK: Tensor
    """The tokens, long; a teacher's most likely ones."""
    log_probs_NK: Tensor
    log_rest_N: Tensor
    """Of all other tokens together."""

    def at(self, places: slice) -> TopKLogProbs:
        """The same at some of the places."""
        return TopKLogProbs(*(x[places] for x in self))


def top_k_log_probs(logits_NV: Tensor, indices_NK: Tensor) -> TopKLogProbs:
    """Join all tokens but the indexed ones into one class.

    logits_NV: finite, any dtype, computed in float32 or better. indices_NK: different ones, K < V.
    """
    return _join(logits_NV, indices_NK)[0]


def _join(
    logits_NV: Tensor, indices_NK: Tensor, *, overwrite: bool = False
) -> tuple[TopKLogProbs, Tensor, Tensor]:
    """:func:`top_k_log_probs`, logsumexp of the other logits, and of all.

    overwrite: put -inf at the indices of the logits, instead of into a copy.
    """
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    chosen_NK = logits_NV.gather(-1, indices_NK)
    cover = logits_NV.scatter_ if overwrite else logits_NV.scatter
    rest_N = cover(-1, indices_NK, -torch.inf).logsumexp(-1)
    total_N = torch.logaddexp(chosen_NK.logsumexp(-1), rest_N)
    return TopKLogProbs(indices_NK, chosen_NK - total_N[:, None], rest_N - total_N), rest_N, total_N


def top_k_kl(teacher: TopKLogProbs, student: TopKLogProbs) -> Tensor:
    """KL(teacher || student) in nats at each place [N], no reduction; the formula above."""
    p_NK, p_N = teacher.log_probs_NK.exp(), teacher.log_rest_N.exp()
    tokens_N = (p_NK * (teacher.log_probs_NK - student.log_probs_NK)).sum(-1)
    return tokens_N + p_N * (teacher.log_rest_N - student.log_rest_N)


def full_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(teacher || student) in nats over the whole vocabulary at each place [N], from logits."""
    teacher_NV, student_NV = teacher_NV.float().log_softmax(-1), student_NV.float().log_softmax(-1)
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)


def distill_kl(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], teacher: TopKLogProbs, *, chunk: int
) -> Tensor:
    """KL(teacher || student) of states that a vocabulary head maps to the student's logits, [N], nats.

    hidden_ND: the student's states at the places of ``teacher``. head: called on at most ``chunk`` states.
    No reduction. Gradients flow to the states, and to the head if it learns. Nothing of width V outlives its
    chunk: with a frozen linear head the gradient is worked out beside the value; any other head runs a second
    time in the backward pass.
    """
    if is_frozen_linear(head):
        return _Distil.apply(hidden_ND, head.weight, *teacher, chunk)  # type: ignore[attr-defined]

    def part(hidden_CD: Tensor, *classes: Tensor) -> Tensor:
        teacher = TopKLogProbs(*classes)
        return top_k_kl(teacher, top_k_log_probs(head(hidden_CD), teacher.indices_NK))

    pieces = []
    for start in range(0, len(hidden_ND), chunk):
        places = slice(start, start + chunk)
        inputs = (hidden_ND[places], *teacher.at(places))
        several = torch.is_grad_enabled() and len(hidden_ND) > chunk
        pieces.append(checkpoint(part, *inputs, use_reentrant=False) if several else part(*inputs))
    return torch.cat(pieces) if pieces else hidden_ND.float().sum(-1)


def _logits(head: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> Tensor:
    """Logits without gradients, in float32; by the product that the student's loss takes, to the bit."""
    return (linear(hidden_ND, head.weight) if is_frozen_linear(head) else head(hidden_ND)).float()  # type: ignore[attr-defined]


class _Distil(torch.autograd.Function):
    """The KL under softmax(W h); W is a constant.

    With m = sum_S p_i + p_r, which is 1 to rounding, the slope of the KL in a logit is m q_i - p_i inside S,
    and (m q_r - p_r) q_v / q_r outside: the rest's error, shared out as the student shares out the rest.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        indices_NK: Tensor,
        log_probs_NK: Tensor,
        log_rest_N: Tensor,
        chunk: int,
    ) -> Tensor:
        kl_N = torch.empty(len(hidden_ND), device=hidden_ND.device)
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        whole = TopKLogProbs(indices_NK, log_probs_NK, log_rest_N)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            teacher = whole.at(part)
            logits_CV = linear(hidden_ND[part], weight_VD).float()  # as _logits
            student, rest_C, _ = _join(logits_CV, teacher.indices_NK, overwrite=True)
            kl_N[part] = top_k_kl(teacher, student)
            if slope_ND is not None:
                p_CK, p_C = teacher.log_probs_NK.exp(), teacher.log_rest_N.exp()
                mass_C = p_CK.sum(-1) + p_C
                error_C = mass_C * student.log_rest_N.exp() - p_C
                logits_CV.sub_(rest_C[:, None]).exp_().mul_(error_C[:, None])
                error_CK = mass_C[:, None] * student.log_probs_NK.exp() - p_CK
                logits_CV.scatter_(-1, teacher.indices_NK, error_CK)
                slope_ND[part] = linear(logits_CV.to(weight_VD.dtype), weight_VD.T)
        ctx.save_for_backward(slope_ND)
        return kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        (slope_ND,) = ctx.saved_tensors
        return (grad_N[:, None] * slope_ND).to(slope_ND.dtype), None, None, None, None, None


@torch.no_grad()
def teacher_log_probs(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    targets_N: Tensor,
    *,
    k: int,
    chunk: int,
    vocabulary: int,
) -> tuple[TopKLogProbs, Tensor]:
    """The k most likely tokens where a teacher has these states, and the log-prob [N] of the next token.

    hidden_ND, head, chunk as in :func:`distill_kl`. targets_N: the next tokens. vocabulary: logits beyond it,
    which some models have for padding, are cut off; k is below it. All log-probs are float32.
    """
    number = len(hidden_ND)
    indices_NK = targets_N.new_empty(number, k)
    log_probs_NK = torch.empty(number, k, device=hidden_ND.device)
    log_rest_N, target_N = (torch.empty(number, device=hidden_ND.device) for _ in range(2))
    for start in range(0, number, chunk):
        part = slice(start, start + chunk)
        logits_CV = _logits(head, hidden_ND[part])[:, :vocabulary]
        target_C = logits_CV.gather(-1, targets_N[part, None])[:, 0]
        found, _, total_C = _join(logits_CV, logits_CV.topk(k).indices, overwrite=True)
        indices_NK[part], log_probs_NK[part], log_rest_N[part] = found
        target_N[part] = target_C - total_C
    return TopKLogProbs(indices_NK, log_probs_NK, log_rest_N), target_N


@torch.no_grad()
def kl_and_log_probs(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    teacher: TopKLogProbs,
    targets_N: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The KL of :func:`distill_kl`, and the student's log-prob of the next token ``targets_N``, [N] each."""
    kl_N, target_N = (torch.empty(len(hidden_ND), device=hidden_ND.device) for _ in range(2))
    for start in range(0, len(hidden_ND), chunk):
        part = slice(start, start + chunk)
        logits_CV, own = _logits(head, hidden_ND[part]), teacher.at(part)
        target_C = logits_CV.gather(-1, targets_N[part, None])[:, 0]
        student, _, total_C = _join(logits_CV, own.indices_NK, overwrite=True)
        kl_N[part] = top_k_kl(own, student)
        target_N[part] = target_C - total_C
    return kl_N, target_N
