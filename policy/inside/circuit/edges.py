"""The effect of every edge at once, estimated by one backward pass, or by a few.

Edge attribution patching (EAP, Syed 2023, arXiv 2310.10348): replacing what a writer u adds to the input of
a reader v by what it adds in another run changes the number by about (z_u source - z_u target) . dm/de_v,
with e_v the reader's own input, before its norm. EAP-IG on inputs (Hanna 2024, arXiv 2403.17806): the mean of
the gradients with the input embeddings k/K of the way to the source's, k = 0..K-1. RelP: its rules in the
place of the gradient (:mod:`policy.inside.attribution`).

The reader's gradient is that by its columns of the query, key or value, taken back through the map and the
norm for this reader alone; a layer's readers are dealt with together, and dropped.

Shape suffixes: as in :mod:`policy.inside.circuit.wiring`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from policy.inside.attribution import Rule, relp_rules
from policy.inside.circuit.wiring import Wiring, keep_first
from policy.inside.subject import EMBEDDINGS, Batch


def edge_scores(
    wiring: Wiring,
    target: Batch,
    source: Batch,
    weights_B: Tensor,
    *,
    rule: Rule,
    steps: int = 1,
    by_position: bool = False,
) -> Tensor:
    """Estimated changes of the rows' weighted sum by replacing each edge alone, [E].

    Args:
        wiring: of the subject.
        target: the rows of the run that is patched.
        source: as many rows, of as many tokens, of the run that patches come from.
        weights_B: how much each row counts.
        rule: how it is propagated back.
        steps: gradients whose mean is taken, on the way of the input embeddings to the source's.
        by_position: one score a token, [E, T]; their sum is the edge's (Haklay 2025, arXiv 2502.04577).
    """
    change_WBTD, here_WBTD = wiring.written(source)[1], wiring.written(target)[1]
    here_BTD = here_WBTD[0].clone()
    there_BTD = change_WBTD[0].clone()
    change_WBTD -= here_WBTD
    del here_WBTD
    change_WBTD *= weights_B[:, None, None]
    total: Tensor | float = 0.0
    for step in range(steps):
        embeddings_BTD = torch.lerp(here_BTD, there_BTD, step / steps)
        slopes = reader_slopes(wiring, target, embeddings_BTD, rule=rule)
        parts = [
            _products(slope_RBTD, change_WBTD[: block.before], by_position).flatten(0, 1)
            for block, slope_RBTD in zip(wiring.blocks, slopes, strict=True)
        ]
        total = total + torch.cat(parts) / steps
    assert isinstance(total, Tensor), "at least one step"
    return total


def _products(slope_RBTD: Tensor, change_WBTD: Tensor, by_position: bool) -> Tensor:
    """Every reader's slope times every writer's change, [R, W] or [R, W, T]."""
    if by_position:
        return torch.einsum("rbtd,wbtd->rwt", slope_RBTD, change_WBTD)
    return slope_RBTD.flatten(1) @ change_WBTD.flatten(1).T  # einsum would copy the changes, block by block


def reader_slopes(wiring: Wiring, batch: Batch, embeddings_BTD: Tensor, *, rule: Rule) -> Iterator[Tensor]:
    """Derivatives of each row's number by each reader's own input, [R, B, T, D] a block, with these input
    embeddings."""
    streams: dict[nn.Module, Tensor] = {}
    read: dict[int, Tensor] = {}

    def embed(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return embeddings_BTD.to(output.dtype).detach().requires_grad_()

    def copy(number: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, inputs: Any) -> Any:
            read[number] = inputs[0].clone()
            return (read[number], *inputs[1:])

        return hook

    def keep(number: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: read.__setitem__(number, output)

    with relp_rules(wiring.subject.decoder) if rule == "relp" else contextlib.nullcontext():
        with torch.enable_grad(), contextlib.ExitStack() as hooks:
            hooks.enter_context(wiring.subject.sites[EMBEDDINGS].register_forward_hook(embed))
            for number, block in enumerate(wiring.blocks):
                if block.map is None:
                    hooks.enter_context(block.norm.register_forward_pre_hook(copy(number)))
                    continue
                hooks.enter_context(block.norm.register_forward_pre_hook(keep_first(streams)))
                hooks.enter_context(block.map.register_forward_hook(keep(number)))
            measured = wiring.subject.measure(batch).sum()
        numbers = range(len(wiring.blocks))
        slopes = torch.autograd.grad(measured, [read[number] for number in numbers])
        for block, slope in zip(wiring.blocks, slopes, strict=True):
            if block.map is None:
                yield slope[None].float()
                continue
            stream_BTD = streams[block.norm]
            with torch.enable_grad():
                own = stream_BTD.expand(len(block.names), *stream_BTD.shape).clone().requires_grad_()
                again = block.read(own)
            yield torch.autograd.grad(again, own, slope)[0].float()
