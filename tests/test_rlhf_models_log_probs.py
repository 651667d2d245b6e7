"""Log-probs of chosen tokens: equal to the full log-softmax, value and gradient, a chunk at a time."""

import copy

import pytest
import torch

from rlhf.models import log_probs
from rlhf.models.log_probs import token_log_probs


def _log_prob_case():
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(3, 5, 4, generator=generator)
    weight_VD = torch.randn(11, 4, generator=generator)
    targets_BT = torch.randint(11, (3, 5), generator=generator)
    mask_BT = torch.rand(3, 5, generator=generator) < 0.6
    weights_BT = torch.randn(3, 5, generator=generator)
    return hidden_BTD, weight_VD, targets_BT, mask_BT, weights_BT


@pytest.mark.parametrize("chunk", [1, 4, 15, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_token_log_probs_equal_the_full_log_softmax_with_their_gradients(chunk, masked):
    hidden_BTD, weight_VD, targets_BT, mask_BT, weights_BT = _log_prob_case()
    mask_BT = mask_BT if masked else torch.ones_like(mask_BT)

    hidden_1, weight_1 = hidden_BTD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    logp_BTV = torch.log_softmax(hidden_1 @ weight_1.T / 0.7, dim=-1)
    expected_BT = logp_BTV.gather(-1, targets_BT[..., None])[..., 0] * mask_BT
    entropy_BT = -(logp_BTV.exp() * logp_BTV).sum(-1).detach() * mask_BT
    (expected_BT * weights_BT).sum().backward()

    hidden_2, weight_2 = hidden_BTD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    logp_BT, got_entropy_BT = token_log_probs(
        hidden_2,
        lambda h: h @ weight_2.T,
        targets_BT,
        mask_BT if masked else None,
        temperature=0.7,
        chunk=chunk,
    )
    (logp_BT * weights_BT).sum().backward()
    torch.testing.assert_close(logp_BT, expected_BT)
    torch.testing.assert_close(got_entropy_BT, entropy_BT)
    assert not got_entropy_BT.requires_grad
    torch.testing.assert_close(hidden_2.grad, hidden_1.grad)
    torch.testing.assert_close(weight_2.grad, weight_1.grad)
    with torch.no_grad():
        silent_BT, _ = token_log_probs(
            hidden_2, lambda h: h @ weight_2.T, targets_BT, mask_BT, temperature=0.7, chunk=chunk
        )
    torch.testing.assert_close(silent_BT, expected_BT.detach())


def test_the_head_sees_only_counted_positions_a_chunk_at_a_time_and_its_logits_are_not_kept():
    hidden_BTD, weight_VD, targets_BT, mask_BT, _ = _log_prob_case()
    hidden_BTD.requires_grad_()
    sizes, saved = [], []

    def head(h):
        sizes.append(h.shape[0])
        return h @ weight_VD.T

    def remember(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        logp_BT, _ = token_log_probs(hidden_BTD, head, targets_BT, mask_BT, temperature=1.0, chunk=4)
    assert sum(sizes) == int(mask_BT.sum())
    assert max(sizes) <= 4
    assert not [shape for shape in saved if len(shape) > 1 and shape[-1] == 11]
    calls = len(sizes)
    logp_BT.sum().backward()
    assert len(sizes) == 2 * calls  # recomputed, not kept


def test_log_probs_of_half_precision_states_are_float32_and_bear_logits_of_minus_infinity():
    hidden_BTD, _, targets_BT, _, _ = _log_prob_case()
    bias_V = torch.zeros(11, dtype=torch.bfloat16).index_fill(0, torch.tensor([3]), -torch.inf)
    head = torch.nn.Linear(4, 11, dtype=torch.bfloat16)
    logp_BT, entropy_BT = token_log_probs(
        hidden_BTD.bfloat16(), lambda h: head(h) + bias_V, targets_BT, temperature=1.0, chunk=7
    )
    assert logp_BT.dtype == entropy_BT.dtype == torch.float32
    assert entropy_BT.isfinite().all()
    assert (logp_BT[targets_BT != 3]).isfinite().all()


def test_when_no_position_counts_the_log_probs_are_zero_and_backward_still_works():
    hidden_BTD, weight_VD, targets_BT, mask_BT, _ = _log_prob_case()
    hidden_BTD.requires_grad_()
    logp_BT, _ = token_log_probs(
        hidden_BTD, lambda h: h @ weight_VD.T, targets_BT, torch.zeros_like(mask_BT), temperature=1.0, chunk=4
    )
    logp_BT.sum().backward()
    assert (logp_BT == 0).all()
    assert (hidden_BTD.grad == 0).all()


@pytest.mark.parametrize(("temperature", "chunk"), [(0.0, 4), (-1.0, 4), (1.0, 0)])
def test_a_temperature_or_chunk_that_is_not_positive_is_an_error(temperature, chunk):
    hidden_BTD, weight_VD, targets_BT, _, _ = _log_prob_case()
    with pytest.raises(ValueError, match="must be positive"):
        token_log_probs(
            hidden_BTD, lambda h: h @ weight_VD.T, targets_BT, temperature=temperature, chunk=chunk
        )


def frozen(weight_VD, bias=None):
    head = torch.nn.Linear(weight_VD.shape[1], weight_VD.shape[0], bias=bias is not None)
    head.weight.data = weight_VD.clone()
    if bias is not None:
        head.bias.data = bias
    return head.requires_grad_(False)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_a_frozen_head_gives_the_values_and_gradients_of_autograd_for_log_probs_and_entropy(chunk, masked):
    hidden_BTD, weight_VD, targets_BT, mask_BT, weights_BT = _log_prob_case()
    mask_BT = mask_BT if masked else torch.ones_like(mask_BT)
    grads, outs = [], []
    for head in (frozen(weight_VD), frozen(weight_VD, torch.zeros(11))):  # the second takes the general way
        states = hidden_BTD.clone().requires_grad_()
        logp_BT, entropy_BT = token_log_probs(
            states, head, targets_BT, mask_BT, temperature=0.7, chunk=chunk, differentiable_entropy=True
        )
        (logp_BT * weights_BT - 0.3 * weights_BT.square() * entropy_BT).sum().backward()
        grads.append(states.grad)
        outs.append((logp_BT.detach(), entropy_BT.detach()))
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(grads[0], grads[1])
    assert float(grads[0].abs().max()) > 0.1


def test_the_entropy_carries_a_gradient_only_where_it_is_asked_for():
    hidden_BTD, weight_VD, targets_BT, _, _ = _log_prob_case()
    hidden_BTD.requires_grad_()
    for bias in (None, torch.zeros(11)):
        _, entropy_BT = token_log_probs(
            hidden_BTD, frozen(weight_VD, bias), targets_BT, temperature=1.0, chunk=4
        )
        assert not entropy_BT.requires_grad


def test_nothing_of_vocabulary_width_is_kept_for_the_backward_pass_of_a_frozen_head():
    hidden_BTD, weight_VD, targets_BT, mask_BT, _ = _log_prob_case()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        token_log_probs(
            hidden_BTD.requires_grad_(), frozen(weight_VD), targets_BT, mask_BT, temperature=1.0, chunk=100
        )
    assert saved
    assert not [shape for shape in saved if len(shape) > 1 and shape[-1] == 11]


def test_a_head_that_learns_gets_its_gradient():
    hidden_BTD, weight_VD, targets_BT, _, _ = _log_prob_case()
    head = frozen(weight_VD).requires_grad_()
    token_log_probs(hidden_BTD, head, targets_BT, temperature=1.0, chunk=4)[0].sum().backward()
    assert float(head.weight.grad.abs().max()) > 0.1


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_a_frozen_head_in_bfloat16_is_that_of_float64_but_for_rounding(rows, monkeypatch):
    """Also the gradient of a token that is all but certain, which is the difference of two near vectors."""
    monkeypatch.setattr(log_probs, "_LOGITS_IN_CACHE", 11 * rows)
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 11, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    targets_BT = torch.randint(11, (2, 4))
    hidden_BTD = torch.randn(2, 4, 4).bfloat16()
    hidden_BTD[0, 0] = 25 * head.weight[targets_BT[0, 0]] / head.weight[targets_BT[0, 0]].norm()
    found, wanted = [], []
    for out, kind in ((found, torch.bfloat16), (wanted, torch.float64)):
        states, own = hidden_BTD.to(kind, copy=True).requires_grad_(), copy.deepcopy(head).to(kind)
        options = {"temperature": 0.9, "chunk": 3, "differentiable_entropy": True}
        both = token_log_probs(states, own, targets_BT, **options)
        (both[0].sum() + 0.3 * both[1].sum()).backward()
        out += [*both, *states.grad.flatten(0, 1)]
    assert found[0].dtype == torch.float32
    assert -1e-3 < float(wanted[0][0, 0].detach()) < -1e-4
    for mine, exact in zip(found, wanted, strict=True):
        assert (mine.double() - exact).norm() < 0.2 * exact.norm()
