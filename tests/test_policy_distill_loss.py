"""The divergence of context distillation against torch's own, a naive version, and what must always hold."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from policy.distillation.loss import (
    TopKLogProbs,
    distill_kl,
    full_kl,
    kl_and_log_probs,
    teacher_log_probs,
    top_k_kl,
    top_k_log_probs,
)

V, K, D, N = 40, 6, 12, 30


def random(seed, *shape, scale=1.0, dtype=torch.float32):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def most_likely(logits_NV, k=K):
    return logits_NV.topk(k).indices


def classes(logits_NV, indices_NK):
    """Probabilities of k + 1 classes in float64, by a softmax and a subtraction."""
    p_NV = logits_NV.double().softmax(-1)
    chosen_NK = p_NV.gather(-1, indices_NK)
    return torch.cat([chosen_NK, 1 - chosen_NK.sum(-1, keepdim=True)], dim=-1)


def naive(teacher_NV, student_NV, indices_NK):
    """The KL by torch's own function, float64."""
    p, q = classes(teacher_NV, indices_NK), classes(student_NV, indices_NK)
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def head_of(seed=9, *, learns=False, bias=False, scale=1.0):
    head = nn.Linear(D, V, bias=bias)
    with torch.no_grad():
        head.weight.copy_(random(seed, V, D, scale=scale))
        if bias:
            head.bias.copy_(random(seed + 1, V))
    return head.requires_grad_(learns)


def classes_of(teacher_NV, k=K):
    return top_k_log_probs(teacher_NV, most_likely(teacher_NV, k))


# ---- the value


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 8.0), k=st.integers(1, V - 1))
def test_it_is_torchs_own_divergence_of_the_joined_classes(seed, scale, k):
    teacher, student = random(seed, 5, V, scale=scale), random(seed + 1, 5, V, scale=scale)
    indices = most_likely(teacher, k)
    found = top_k_kl(top_k_log_probs(teacher.double(), indices), top_k_log_probs(student.double(), indices))
    torch.testing.assert_close(found, naive(teacher, student, indices), rtol=1e-6, atol=1e-9)


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), scales=st.tuples(*[st.floats(0.01, 12.0)] * 2), k=st.integers(1, V - 1))
def test_joining_classes_never_raises_it_and_it_is_never_negative(seed, scales, k):
    teacher, student = (random(seed + n, 5, V, scale=scale) for n, scale in enumerate(scales))
    indices = most_likely(teacher, k)
    joined = top_k_kl(top_k_log_probs(teacher, indices), top_k_log_probs(student, indices))
    whole = full_kl(teacher, student)
    assert (joined <= whole + 1e-5 * (1 + whole)).all()
    assert (joined >= -1e-5).all()


def test_the_whole_divergence_is_torchs_own():
    teacher, student = random(0, N, V, scale=3), random(1, N, V, scale=3)
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(full_kl(teacher, student), expected.sum(-1), rtol=1e-4, atol=1e-5)


def test_the_teacher_comes_first():
    teacher, student = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    p, q = teacher.softmax(-1)[0].tolist(), student.softmax(-1)[0].tolist()
    joined = [(p[0], q[0]), (p[1], q[1]), (p[2], q[2])]
    forward = sum(a * math.log(a / b) for a, b in joined)
    backward = sum(b * math.log(b / a) for a, b in joined)
    top_k = classes_of(teacher, 2)
    found = float(top_k_kl(top_k, top_k_log_probs(student, top_k.indices_NK)))
    assert found == pytest.approx(forward, rel=1e-5)
    assert found != pytest.approx(backward, rel=1e-2)


def test_equal_distributions_give_exactly_0():
    head, hidden = head_of(), random(0, N, D)
    top_k, _ = teacher_log_probs(hidden, head, torch.zeros(N, dtype=torch.long), k=K, chunk=7, vocabulary=V)
    assert distill_kl(hidden, head, top_k, chunk=7).tolist() == [0.0] * N
    # a head that learns goes through another library's product: 0 to rounding
    learned = distill_kl(hidden, head_of(learns=True), top_k, chunk=7)
    assert learned.tolist() == pytest.approx([0.0] * N, abs=1e-6)


EXTREMES = {  # logits of the stored tokens and of the others: teacher, student
    "the student's rest is nearly 0": ((1.0, 0.0), (300.0, 0.0)),
    "the teacher's rest is nearly 0": ((300.0, 0.0), (1.0, 0.0)),
    "both rests are nearly 0": ((300.0, 0.0), (250.0, 0.0)),
    "the student's rest is nearly 1": ((1.0, 0.0), (-300.0, 0.0)),
    "the teacher's rest is nearly 1": ((0.001, 0.0), (1.0, 0.0)),
}


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("learns", [False, True])
def test_at_the_extremes_value_and_gradient_are_finite_and_right(kind, learns):
    """Against log_softmax and a logsumexp over the others alone, in float64."""
    (teacher_in, teacher_out), (student_in, student_out) = EXTREMES[kind]
    indices = torch.arange(K).repeat(3, 1)
    inside = torch.arange(V) < K

    def logits(high, low, seed):
        return torch.where(inside, high, low) + random(seed, 3, V)

    teacher, student = logits(teacher_in, teacher_out, 0), logits(student_in, student_out, 1)
    exact = student.double().requires_grad_()
    p, q = (x.double().log_softmax(-1) for x in (teacher, exact))
    log_q = torch.cat([q[:, inside], q[:, ~inside].logsumexp(-1, keepdim=True)], -1)
    log_p = torch.cat([p[:, inside], p[:, ~inside].logsumexp(-1, keepdim=True)], -1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected.sum().backward()

    hidden = student.clone().requires_grad_()  # the head is the identity
    head = nn.Linear(V, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(V))
    head.requires_grad_(learns)
    found = distill_kl(hidden, head, top_k_log_probs(teacher, indices), chunk=2)
    found.sum().backward()
    assert found.isfinite().all()
    assert hidden.grad.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)  # float32 near 300
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


# ---- the gradient


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 2.0), chunk=st.sampled_from([1, 7, N, 10 * N]))
def test_gradients_are_those_of_a_naive_float64_version(seed, scale, chunk):
    hidden, teacher = random(seed, N, D, scale=scale), random(seed + 1, N, V, scale=2.0)
    top_k, weights = classes_of(teacher), random(seed + 2, N).double()
    exact_hidden = hidden.double().requires_grad_()
    exact_weight = head_of().weight.double().clone().requires_grad_()
    exact = naive(teacher, exact_hidden @ exact_weight.T, top_k.indices_NK)
    (exact * weights).sum().backward()
    for learns in (False, True):
        head, mine = head_of(learns=learns), hidden.clone().requires_grad_()
        found = distill_kl(mine, head, top_k, chunk=chunk)
        (found * weights.float()).sum().backward()
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(mine.grad.double(), exact_hidden.grad, rtol=1e-3, atol=1e-4)
        if learns:
            torch.testing.assert_close(head.weight.grad.double(), exact_weight.grad, rtol=1e-3, atol=1e-3)
        else:
            assert head.weight.grad is None


def test_any_head_will_do():
    hidden, top_k = random(0, N, D), classes_of(random(1, N, V))
    head = head_of(bias=True)
    expected = top_k_kl(top_k, top_k_log_probs(head(hidden), top_k.indices_NK))
    for chunk in (1, 8, N):
        torch.testing.assert_close(distill_kl(hidden, head, top_k, chunk=chunk), expected)


# ---- what the teacher says, and what is measured


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_teachers_words_are_its_most_likely_tokens(chunk):
    head, hidden = head_of(), random(0, N, D)
    targets = torch.arange(N) % V
    top_k, taught = teacher_log_probs(hidden, head, targets, k=K, chunk=chunk, vocabulary=V)
    log_p = head(hidden).double().log_softmax(-1)
    expected = np.sort(log_p.numpy(), axis=-1)[:, ::-1]
    np.testing.assert_allclose(top_k.log_probs_NK, expected[:, :K], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(top_k.log_rest_N.exp(), np.exp(expected[:, K:]).sum(-1), rtol=1e-4, atol=1e-6)
    mine = log_p.gather(-1, top_k.indices_NK)
    torch.testing.assert_close(top_k.log_probs_NK.double(), mine, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taught.double(), log_p[torch.arange(N), targets], rtol=1e-5, atol=1e-5)


def test_logits_beyond_the_vocabulary_do_not_count():
    head, hidden = head_of(), random(0, N, D)
    short = nn.Linear(D, V - 5, bias=False)
    with torch.no_grad():
        short.weight.copy_(head.weight[: V - 5])
    targets = torch.zeros(N, dtype=torch.long)
    cut, whole = (
        teacher_log_probs(hidden, h.requires_grad_(False), targets, k=K, chunk=8, vocabulary=V - 5)
        for h in (head, short)
    )
    assert torch.equal(cut[0].indices_NK, whole[0].indices_NK)
    torch.testing.assert_close(cut[1], whole[1])


@pytest.mark.parametrize("chunk", [3, 100])
def test_what_is_measured_is_the_loss_and_the_log_probs(chunk):
    head, hidden, top_k = head_of(), random(0, N, D), classes_of(random(1, N, V))
    targets = (3 * torch.arange(N)) % V
    kl, log_prob = kl_and_log_probs(hidden, head, top_k, targets, chunk=chunk)
    torch.testing.assert_close(kl, distill_kl(hidden, head, top_k, chunk=chunk))
    torch.testing.assert_close(log_prob, head(hidden).log_softmax(-1)[torch.arange(N), targets])


def test_no_places_are_no_error():
    head, none = head_of(), torch.zeros(0, D)
    top_k, taught = teacher_log_probs(
        none, head, torch.zeros(0, dtype=torch.long), k=K, chunk=4, vocabulary=V
    )
    assert top_k.indices_NK.shape == (0, K)
    assert len(taught) == len(distill_kl(none, head, top_k, chunk=4)) == 0
    assert isinstance(top_k, TopKLogProbs)
