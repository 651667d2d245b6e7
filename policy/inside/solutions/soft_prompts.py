"""Soft prompts: vectors in front of a row's embeddings that make one model respond like another.

Lester 2021 (arXiv 2104.08691): the vectors [n, D] alone learn, by Adam, and begin as the embeddings of random
tokens. The target is what PPO changed: the mean negative log-prob of a token of the policy's own responses.

Shape suffixes: ``_B`` row, ``_T`` token, ``_R`` response token, ``_P`` vector of the prompt, ``_D`` hidden
unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from policy.inside.patching import hooked
from policy.inside.questions import Inspection
from policy.inside.solutions.barriers import Point, compare, points_of
from policy.inside.subject import EMBEDDINGS, Batch, Subject, of_role
from rlhf.data.comparisons import Prompt
from rlhf.stats.intervals import cluster_mean_interval
from rlhf.training.progress import progress

LENGTH, STEPS = 8, 40
RATE = 0.5  # of Adam, in root mean squares of the embeddings
TRAINED_ON = 128  # responses, at most


def losses(subject: Subject, batch: Batch, prompt_PD: Tensor | None = None) -> Tensor:
    """Negative log-prob of each row's response behind these vectors, [B], with a gradient to them."""
    if prompt_PD is None:
        return -subject.measure(batch)
    rows, number = len(batch.ids_BT), len(prompt_PD)
    places_BP = batch.ids_BT.new_zeros(rows, number)
    longer = batch._replace(
        ids_BT=torch.cat([places_BP, batch.ids_BT], 1),
        mask_BT=torch.cat([torch.ones_like(places_BP, dtype=torch.bool), batch.mask_BT], 1),
        start=batch.start + number,
    )

    def put(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        first = prompt_PD.to(output.dtype).expand(rows, -1, -1)
        return torch.cat([first, output[:, number:]], 1)

    with hooked({subject.sites[EMBEDDINGS]: put}):
        return -subject.measure(longer)


def train(
    subject: Subject,
    batches: Sequence[Batch],
    seed: int,
    *,
    length: int = LENGTH,
    steps: int = STEPS,
    rate: float = RATE,
    tick: Callable[[], object] = int,
) -> Tensor:
    """A soft prompt [P, D], float32, that makes these responses probable.

    Args:
        subject: what it stands in front of; its weights get no gradient.
        batches: rows with the responses; a step reads one batch.
        seed: of the tokens that it begins with and of the order of the batches.
        length: vectors.
        steps: of Adam.
        rate: its learning rate, in root mean squares of the embeddings.
        tick: called after each step.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Any = subject.sites[EMBEDDINGS].weight
    tokens = torch.randint(len(weights), (length,), generator=generator).to(weights.device)
    prompt_PD = weights.detach()[tokens].float().clone().requires_grad_()
    size = float(weights.detach().float().square().mean().sqrt())
    optimizer = torch.optim.Adam([prompt_PD], lr=rate * size)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        batch = batches[order.pop()]
        with torch.enable_grad():
            loss = losses(subject, batch, prompt_PD).sum() / tokens_of(batch)
        (prompt_PD.grad,) = torch.autograd.grad(loss, [prompt_PD])
        optimizer.step()
        tick()
    return prompt_PD.detach()


def tokens_of(batch: Batch) -> int:
    """How many response tokens of a batch count."""
    own_BR = batch.mask_BT[:, batch.start : -1] if batch.targets_BR is None else batch.targets_BR
    return int(own_BR.sum())


def placed(prompts: Sequence[Tensor], point: Point, seed: int) -> Tensor:
    """The soft prompt at a point; random directions depend on the seed and on the pair."""
    found = torch.stack([w * x for w, x in zip(point.weights, prompts, strict=True)]).sum(0)
    if point.toward is None:
        return found
    i, j = point.toward
    generator = torch.Generator().manual_seed(seed + 1000 * i + j)
    way = torch.randn(found.shape, generator=generator).to(found)
    return found + point.share * (prompts[j] - prompts[i]).norm() * way / way.norm()


def compare_prompts(
    looked: Inspection, training: Sequence[Prompt], after: str, before: str
) -> dict[str, Any]:
    """Figures of ``inside.soft_prompts`` soft prompts that make ``before`` respond like ``after``.

    They are trained on responses to ``training`` and judged on those to the held-out prompts.
    """
    number, seed = looked.recipe.inside.soft_prompts, looked.recipe.seed
    old, new = of_role(looked.backbone, before), of_role(looked.backbone, after)
    unscored = dataclasses.replace(looked, reward_fn=None)
    taught = dataclasses.replace(unscored, prompts=training[:TRAINED_ON]).write(after).batches
    held_out = unscored.write(after).batches
    tokens = sum(map(tokens_of, held_out))

    @torch.no_grad()
    def by_row(subject: Subject, prompt_PD: Tensor | None = None) -> Tensor:
        return torch.cat([losses(subject, batch, prompt_PD).double().cpu() for batch in held_out])

    with progress("inside: soft prompts", total=number * STEPS + points_of(number), leave=True) as bar:
        tick: Callable[[], object] = bar.update
        prompts = [train(old, taught, seed + n, steps=STEPS, tick=tick) for n in range(number)]
        found = compare(
            number, lambda point: float(by_row(old, placed(prompts, point, seed)).sum()) / tokens, tick=tick
        )
    plain_B, own_B = by_row(old), by_row(new)
    with_B = torch.stack([by_row(old, prompt) for prompt in prompts]).mean(0)
    starts = [train(old, taught, seed + n, steps=0) for n in range(number)]
    return {
        **found,
        "rows": len(plain_B),
        "tokens": tokens,
        "taught": sum(len(batch.ids_BT) for batch in taught),
        "length": LENGTH,
        "steps": STEPS,
        "before": float(plain_B.sum()) / tokens,
        "after": float(own_B.sum()) / tokens,
        "untrained": float(torch.stack([by_row(old, x) for x in starts]).mean(0).sum()) / tokens,
        "recovered": cluster_mean_interval((plain_B - with_B).numpy(), (plain_B - own_B).numpy()).as_dict(),
    }
