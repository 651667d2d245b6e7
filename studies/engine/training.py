"""The loop that trains a rung: AdamW on a loss of the items of a step, in an order that is passed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Ints = NDArray[np.int64]


def start_worker() -> None:
    """Make a process fit for units: one thread, and nothing that is not deterministic."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up, then a cosine from learning_rate down to floor * learning_rate."""

    learning_rate: float
    steps: int
    warmup: int = 20  # optimizer steps
    floor: float = 0.1  # 1 = constant after the warm-up

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * warm * (self.floor + (1.0 - self.floor) * cosine)


def index_stream(n: int, batch: int, steps: int, rng: np.random.Generator) -> Ints:
    """The items of every step [steps, batch]: pass after pass over n items, each in a new random order."""
    passes = math.ceil(steps * batch / n)
    order = np.concatenate([rng.permutation(n) for _ in range(passes)])
    return order[: steps * batch].reshape(steps, batch)


def train(
    model: nn.Module,
    stream: Ints,
    loss_of: Callable[[Any], Tensor],
    schedule: Schedule,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimize loss_of(items of the step) over the rows of ``stream``; returns the loss of every step.

    after_step: called with the number of steps taken. Gradients are clipped to norm 1.

    Raises:
        FloatingPointError: the last loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    model.train()
    for step, items in enumerate(stream):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(items)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step + 1)
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(
            f"the loss is not finite after {len(losses)} steps at {schedule.learning_rate}"
        )
    return losses
