"""The optimizers a recipe can name."""

from __future__ import annotations

from typing import Any, Literal

import torch

from rlhf.errors import UserError


def make_optimizer(
    kind: Literal["adamw", "paged_adamw_8bit"], groups: list[dict[str, Any]], *, epsilon: float
) -> torch.optim.Optimizer:
    """AdamW over parameter groups that carry their learning rates; no weight decay.

    ``paged_adamw_8bit`` is bitsandbytes' (Dettmers 2021, arXiv 2110.02861; paging: Dettmers 2023, arXiv
    2305.14314). It needs CUDA; it has not been run on such hardware here.

    Raises:
        UserError: there is no GPU for it.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, eps=epsilon, weight_decay=0.0, foreach=False)
    if not torch.cuda.is_available():
        raise UserError(f"ppo.optimizer: {kind} needs a CUDA GPU, and there is none; use adamw")
    from bitsandbytes.optim import PagedAdamW8bit

    optimizer: torch.optim.Optimizer = PagedAdamW8bit(groups, eps=epsilon, weight_decay=0.0)
    return optimizer
