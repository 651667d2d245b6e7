"""The optimizers a recipe can name, and DeepSpeed's configuration for several processes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf.errors import UserError
from rlhf.recipe.ppo import check_optimizer
from rlhf.recipe.quick import laid_over
from rlhf.recipe.schema import Distributed
from rlhf.runs.processes import processes


def make_optimizer(
    kind: Literal["adamw", "paged_adamw_8bit"],
    groups: list[dict[str, Any]],
    *,
    epsilon: float,
    zero_stage: int = 0,
) -> torch.optim.Optimizer:
    """AdamW over parameter groups that carry their learning rates; no weight decay.

    ``paged_adamw_8bit`` is bitsandbytes' (Dettmers 2021, arXiv 2110.02861; paging: Dettmers 2023, arXiv
    2305.14314). It needs CUDA; it has not been run on such hardware here.

    Raises:
        UserError: there is no GPU for it, or it does not go with the ZeRO stage.
    """
    check_optimizer(kind, zero_stage=zero_stage, gpu=torch.cuda.is_available())
    if kind == "adamw":
        return torch.optim.AdamW(groups, eps=epsilon, weight_decay=0.0, foreach=False)
    from bitsandbytes.optim import PagedAdamW8bit

    optimizer: torch.optim.Optimizer = PagedAdamW8bit(groups, eps=epsilon, weight_decay=0.0)
    return optimizer


def lbfgs(loss: Callable[[Tensor], Tensor], start: Tensor, **options: Any) -> Tensor:
    """Weights that minimize a convex loss of them, by L-BFGS. options: ``torch.optim.LBFGS``'s."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach()


def deepspeed_config(section: Distributed, *, batch: int, clip: float) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe, with ``distributed.deepspeed`` laid over it.

    Args:
        section: the recipe's ``distributed`` section.
        batch: rows of a process in an optimizer step.
        clip: global gradient-norm clip.

    Raises:
        UserError: DeepSpeed does not know a key, or not such a value.
    """
    zero: dict[str, Any] = {"stage": section.zero_stage}
    for name in ("offload_optimizer", "offload_param"):
        if (device := getattr(section, name)) != "none":
            zero[name] = {"device": device}
    own = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # The base may be bf16 while the adapters are float32: DeepSpeed must cast neither.
        "bf16": {"enabled": False},
    }
    whole = laid_over(own, section.deepspeed)
    if section.deepspeed and processes() > 1:
        _check_deepspeed(whole)
    return whole


class _Read(dict[str, Any]):
    """A mapping that remembers which keys somebody looked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.looked_for: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.looked_for.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.looked_for.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_for.add(key)
        return super().get(key, default)

    def keys(self) -> Any:  # DeepSpeed asks `in config.keys()` too
        return self


def _check_deepspeed(values: dict[str, Any]) -> None:
    """Let DeepSpeed read a configuration; it takes no notice of a key at the top that it does not know."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**values["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key, near = ".".join(map(str, ("zero_optimization", *first["loc"]))), ""
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            near = _near(str(first["loc"][0]), DeepSpeedZeroConfig.model_fields)
        raise UserError(f"distributed.deepspeed: {key}: {first['msg']}{near}; mend or remove it") from None
    read = _Read(values)
    DeepSpeedConfig(read)
    unknown = [key for key in values if key not in read.looked_for]
    if unknown:
        near = _near(unknown[0], read.looked_for)
        raise UserError(
            f"distributed.deepspeed: DeepSpeed knows no key {unknown[0]}{near}; mend or remove it"
        )


def _near(key: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
