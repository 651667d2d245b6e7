"""Learning rates over the PPO steps."""

from __future__ import annotations

import math
from typing import Literal

_FLOOR = 0.1  # of the peak: where a warm-up begins and cosine_with_min_lr ends


def learning_rate_factor(
    step: int,
    steps: int,
    *,
    kind: Literal["linear", "cosine", "cosine_with_min_lr", "constant"],
    warmup: int = 0,
) -> float:
    """Factor of the peak learning rate in a step.

    Args:
        step: from 0.
        steps: of the whole stage.
        kind: after the warm-up: ``linear`` to 0 (1 at its first step, Huang 2024, detail 2), ``cosine`` to
            0, ``cosine_with_min_lr`` to a tenth (Ouyang 2022, App. C), or ``constant``.
        warmup: steps that rise linearly from a tenth to the peak (Ouyang 2022, C.4).
    """
    if step < warmup:
        return _FLOOR + (1.0 - _FLOOR) * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return 1.0 - done
    if kind in ("cosine", "cosine_with_min_lr"):
        floor = _FLOOR if kind == "cosine_with_min_lr" else 0.0
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0
