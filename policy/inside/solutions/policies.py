"""Policies of several runs as solutions of one target, and the models between and beyond them.

What is between two adapters is the weighted sum of their updates s B A, not of their matrices A and B, whose
products would mix (as for averages: Ramé 2023, "Rewarded soups", arXiv 2306.04488).

Shape suffixes: ``_r`` rank, ``_I`` input feature, ``_O`` output feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from policy.inside.questions import Inspection, Written
from policy.inside.solutions.barriers import Point, compare, points_of
from policy.inside.solutions.soft_prompts import losses, tokens_of
from policy.inside.subject import of_role
from rlhf.models.backbone import Backbone
from rlhf.models.lora import read_adapter
from rlhf.training.progress import progress

BETWEEN = "between"  # the role of the model at a point
Adapter = dict[str, Tensor]
"""Tensors by saved name: ``lora_A`` [r, I] and ``lora_B`` [O, r]."""


def times_of(policies: int) -> int:
    """How many times a policy's rank the role at a point has: all of them and a direction of twice that."""
    return policies + 2


def weighted(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The adapter whose update is the weighted sum of theirs, of all their ranks together: with equal scaling
    s [w_1 B_1 ... w_M B_M] times the rows of A_1 to A_M."""
    return {
        name: torch.cat([a[name] for a in adapters])
        if ".lora_A." in name
        else torch.cat([w * a[name] for w, a in zip(weights, adapters, strict=True)], dim=1)
        for name in adapters[0]
    }


def random_direction(first: Adapter, second: Adapter, seed: int) -> Adapter:
    """Random factors with the ranks of second - first and, map by map, the norm of its update (Frobenius)."""
    difference = weighted([second, first], [1.0, -1.0])
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor) for name, tensor in difference.items()
    }
    for name in drawn:
        if ".lora_B." in name:
            norm, own = (_norm(x[name], x[name.replace(".lora_B.", ".lora_A.")]) for x in (difference, drawn))
            drawn[name] *= norm / own
    return drawn


def _norm(b_Or: Tensor, a_rI: Tensor) -> Tensor:
    """Frobenius norm of B A: |B A|^2 = sum of the elements of (B^T B) times those of (A A^T)."""
    return ((b_Or.T @ b_Or) * (a_rI @ a_rI.T)).sum().clamp(min=0).sqrt()


@torch.no_grad()
def set_point(backbone: Backbone, policies: Sequence[Adapter], point: Point, seed: int) -> None:
    """Let the role ``between`` be the model at a point."""
    i, j = point.toward or (0, len(policies) - 1)
    way = random_direction(policies[i], policies[j], seed + 1000 * i + j)
    made = weighted([*policies, way], [*point.weights, point.share])
    for name, parameter in backbone.parameters_of(BETWEEN).items():
        parameter.copy_(made[name])


def read_policies(backbone: Backbone, others: Sequence[str]) -> list[Adapter]:
    """The role ``policy`` and the policies in these folders.

    Raises:
        UserError: one does not fit the base or the recipe's adapters.
    """
    own = {name: parameter.detach() for name, parameter in backbone.parameters_of("policy").items()}
    found: list[Adapter] = [own]
    for folder in others:
        into = {name: nn.Parameter(torch.empty_like(tensor)) for name, tensor in own.items()}
        read_adapter(Path(folder), into, "policy")
        found.append({name: parameter.detach() for name, parameter in into.items()})
    return found


def compare_policies(looked: Inspection, others: Sequence[str]) -> dict[str, Any]:
    """Figures of this run's policy and others: the log-prob of responses of all, and the sampled reward."""
    backbone, seed = looked.backbone, looked.recipe.seed
    policies = read_policies(backbone, others)
    number, subject = len(policies), of_role(backbone, BETWEEN)

    def sampled(point: Point) -> Written:
        set_point(backbone, policies, point, seed)
        return looked.write(BETWEEN)

    own = [sampled(Point(tuple(float(n == i) for n in range(number)))) for i in range(number)]
    batches = [batch for written in own for batch in written.batches]
    tokens = sum(map(tokens_of, batches))

    @torch.no_grad()
    def log_prob(point: Point) -> float:
        set_point(backbone, policies, point, seed)
        with backbone.folded(BETWEEN):
            return sum(float(losses(subject, batch).double().sum()) for batch in batches) / tokens

    asked = {"log_prob": log_prob}
    if looked.reward_fn is not None:
        asked["reward"] = lambda point: -float(sampled(point).scores_N.mean())
    found: dict[str, Any] = {"others": list(others), "rows": len(looked.prompts)}
    with progress("inside: policies", total=len(asked) * points_of(number), leave=True) as bar:
        tick: Any = bar.update
        return found | {key: compare(number, loss, tick=tick) for key, loss in asked.items()}
