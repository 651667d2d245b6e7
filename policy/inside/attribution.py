"""The effect of every component at once, estimated by one backward pass.

Attribution patching (AtP): the effect of patching a component is about (c_source - c_target) . dm/dc, with
the gradient at the target run (Nanda 2023; Syed 2023, arXiv 2310.10348); with ``steps`` K > 1 the mean of the
gradients with the input embeddings k/K of the way to the source's, k = 0..K-1 (EAP-IG on inputs, Hanna 2024,
arXiv 2403.17806). RelP: the same with the propagation rules of LRP in the place of the gradient: a norm's
divisor and a non-linearity's quotient act(x)/x are constants, and a product passes half to each factor
(Jafari 2025, arXiv 2508.21258). What a model computes stays the same to the bit under these rules.

Shape suffixes: ``_B`` row, ``_U`` head or neuron, ``_T`` token, ``_D`` hidden unit, ``_I`` input of an output
map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policy.inside.patching import Hook, Recording, hooked
from policy.inside.subject import EMBEDDINGS, Batch, Site, Subject

Rule = Literal["relp", "atp"]


def attribute(
    subject: Subject, batch: Batch, source: Recording, target: Recording, *, rule: Rule, steps: int = 1
) -> dict[Site, Tensor]:
    """Estimated changes of each row's number by patching each component alone, [B, U] a place.

    Args:
        subject: what is patched.
        batch: the rows of the target run.
        source: where patches come from.
        target: the subject's own run of the batch.
        rule: how it is propagated back.
        steps: gradients whose mean is taken, on the way of the input embeddings to the source's.
    """
    slopes: dict[Site, Tensor] = {}
    for step in range(steps):
        embeddings_BTD = torch.lerp(target.kept[EMBEDDINGS], source.kept[EMBEDDINGS], step / steps)
        for site, slope in gradients(subject, batch, embeddings_BTD, rule=rule).items():
            slopes[site] = slopes.get(site, 0) + slope / steps
    found = {EMBEDDINGS: _dot(source.kept[EMBEDDINGS] - target.kept[EMBEDDINGS], slopes[EMBEDDINGS])}
    for site in subject.writers:
        there_BTI = source.kept[site] * (slopes[site] @ source.maps[site].T)
        here_BTI = target.kept[site] * (slopes[site] @ target.maps[site].T)
        found[site] = (there_BTI - here_BTI).sum(1).unflatten(-1, (subject.units(site), -1)).sum(-1)
    return found


def gradients(subject: Subject, batch: Batch, embeddings_BTD: Tensor, *, rule: Rule) -> dict[Site, Tensor]:
    """Derivatives of each row's number by what the embeddings, attentions and MLPs add to the stream,
    [B, T, D] a place, with these input embeddings."""
    outputs: dict[Site, Tensor] = {}

    def keep(site: Site) -> Hook:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
            if site != EMBEDDINGS:
                outputs[site] = output
                return None
            outputs[site] = embeddings_BTD.to(output.dtype).detach().requires_grad_()
            return outputs[site]

        return hook

    sites = [EMBEDDINGS, *subject.writers]
    rules = relp_rules(subject.decoder) if rule == "relp" else contextlib.nullcontext()
    with torch.enable_grad(), rules, hooked({subject.sites[site]: keep(site) for site in sites}):
        total = subject.measure(batch).sum()
        found = torch.autograd.grad(total, [outputs[site] for site in sites])
    return {site: slope.float() for site, slope in zip(sites, found, strict=True)}


@contextlib.contextmanager
def relp_rules(decoder: nn.Module) -> Iterator[None]:
    """Have a decoder's backward pass follow RelP's rules: norm, non-linearity, product."""
    hooks: dict[nn.Module, Hook] = {}
    handles = []
    for module in decoder.modules():
        if "Norm" in type(module).__name__:
            hooks[module] = _norm
        for name in ("act_fn", "act"):
            if isinstance(act := getattr(module, name, None), nn.Module):
                hooks[act] = lambda _module, inputs, output: _proportional(output, inputs[0])
        if hasattr(module, "gate_proj") and hasattr(module, "down_proj"):
            handles.append(module.down_proj.register_forward_pre_hook(_halved))  # type: ignore[union-attr]
    try:
        with hooked(hooks):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _norm(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The output with a constant divisor; LayerNorm's mean still depends on its input."""
    x = inputs[0]
    if not isinstance(module, nn.LayerNorm):
        return _proportional(output, x)
    bias = 0 if module.bias is None else module.bias
    centered = x - x.mean(-1, keepdim=True)
    return _with_slope(output, _quotient(output - bias, centered) * centered)


def _halved(_module: nn.Module, inputs: Any) -> Any:
    return (0.5 * inputs[0] + 0.5 * inputs[0].detach(), *inputs[1:])


def _proportional(output: Tensor, x: Tensor) -> Tensor:
    """The output as a constant times x, element by element."""
    return _with_slope(output, _quotient(output, x) * x)


def _quotient(output: Tensor, x: Tensor) -> Tensor:
    return torch.where(x == 0, 0, output / torch.where(x == 0, 1, x)).detach()


def _with_slope(value: Tensor, like: Tensor) -> Tensor:
    """A value with another's derivative."""
    return value.detach() + (like - like.detach())


def _dot(change_BTD: Tensor, slope_BTD: Tensor) -> Tensor:
    return (change_BTD * slope_BTD).sum((1, 2))[:, None]
