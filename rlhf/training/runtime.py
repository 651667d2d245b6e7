"""Devices, processes, seeds, and the optimizer step: the file that knows accelerate and DeepSpeed's engine.

One process runs plain PyTorch. Several processes (started by the DeepSpeed launcher) share one DeepSpeed
engine with the recipe's ZeRO stage; gloo on CPUs, NCCL on GPUs. The loop above sees the same four verbs:
``forward`` through ``model``, ``backward``, ``step``, ``all_sum``.

A checkpoint holds whole tensors by name, gathered from whatever shards them, so that a run can go on with
another number of processes or another ZeRO stage.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from rlhf.recipe.schema import Distributed
from rlhf.runs.processes import processes, rank
from rlhf.training.optimizer import deepspeed_config, make_optimizer


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; what is sampled per row has generators of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def leave_out_kernel() -> None:
    """Keep DeepSpeed from compiling its shared-memory kernel, for which it needs a C++ compiler.

    Only its tensor-parallel inference uses it (``deepspeed/comm/torch.py``); training reduces through gloo.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def join_cpu_processes(section: Distributed) -> bool:
    """Join DeepSpeed's CPU processes before a Hugging Face trainer does, which would count only one.

    Returns:
        Whether they were joined, so that the trainer has to take the state as it is.
    """
    if processes() == 1 or torch.cuda.is_available():
        return False
    leave_out_kernel()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes()))
    PartialState(backend="gloo", timeout=datetime.timedelta(minutes=section.timeout_minutes))
    return True


def all_max(number: int, device: torch.device) -> int:
    """The largest of a number over all processes."""
    if processes() == 1:
        return number
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], *, changed: bool = True) -> Iterator[None]:
    """Have parameters in one piece inside; ZeRO-3 keeps them in parts. All processes must enter it.

    changed: rank 0 may write to them, and hands its values on at the end.
    """
    some = list(parameters)
    if not any(hasattr(p, "ds_id") for p in some):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(some, modifier_rank=0 if changed else None):
        yield


def clear_zero3_init() -> None:
    """Let a base be loaded in one piece, whatever the ZeRO stage: it is looked at before it is sharded.

    transformers remembers the configuration that a plugin or a trainer was made with, and at stage 3 hands
    out parameters of size 0 from then on.
    """
    unset_hf_deepspeed_config()


def clear_deepspeed() -> None:
    """Forget the engine of a trainer that has run in this process before: accelerate takes no second one."""
    if AcceleratorState._shared_state and AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        AcceleratorState._reset_state()


def clear_mixed_precision() -> None:
    """Forget the autocast of a trainer that has run in this process before: accelerate keeps one for all."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != "no":
        AcceleratorState._reset_state()


class Runtime:
    """The processes of a run and the one optimizer.

    Args:
        section: the recipe's ``distributed`` section.
        seed: the recipe's seed.
        max_grad_norm: global gradient-norm clip.
        micro_batch_size: rows of a forward pass, for DeepSpeed's book-keeping.
    """

    def __init__(
        self, section: Distributed, *, seed: int, max_grad_norm: float, micro_batch_size: int
    ) -> None:
        self.world = processes()
        self.rank = rank()
        self.max_grad_norm = max_grad_norm
        self.stage = section.zero_stage if self.world > 1 else 0
        self._offloads = self.stage > 0 and section.offload_optimizer != "none"
        cpu = not torch.cuda.is_available()
        plugin = None
        handlers = []
        if self.world > 1:
            leave_out_kernel()
            if cpu:  # the processes share the cores
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.world))
            config = deepspeed_config(section, batch=micro_batch_size, clip=max_grad_norm)
            plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
            wait = datetime.timedelta(minutes=section.timeout_minutes)
            # accelerate finds no backend for DeepSpeed on CPUs, and would count one process
            handlers = [InitProcessGroupKwargs(backend="gloo" if cpu else None, timeout=wait)]
        # accelerate takes `cpu=True` for plain DistributedDataParallel and then ignores DeepSpeed
        alone_on_cpu = cpu and self.world == 1
        clear_mixed_precision()
        self.accelerator = Accelerator(
            cpu=alone_on_cpu, mixed_precision="no", deepspeed_plugin=plugin, kwargs_handlers=handlers
        )
        clear_zero3_init()
        self.device = self.accelerator.device
        seed_everything(seed)
        self.model: Any = None
        self.optimizer: Any = None
        self._engine: Any = None
        self._named: dict[str, nn.Parameter] = {}

    # ---------------------------------------------------------------- model and optimizer

    def prepare(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        named: dict[str, nn.Parameter],
        *,
        epsilon: float,
        kind: Literal["adamw", "paged_adamw_8bit"] = "adamw",
    ) -> None:
        """Put the module on its device and make the optimizer over the groups; then use ``self.model``.

        Args:
            module: holds every parameter of the groups.
            groups: parameter groups with their learning rates.
            named: the learning parameters by the names that a checkpoint gives them.
            epsilon: AdamW's epsilon.
            kind: which AdamW; ZeRO 1 to 3 split the moments of the plain one only.

        Raises:
            UserError: the kind does not go with the machine or the ZeRO stage.
        """
        self._named = named
        optimizer = make_optimizer(kind, groups, epsilon=epsilon, zero_stage=self.stage)
        self.model, wrapped = self.accelerator.prepare(module, optimizer)
        self.optimizer = wrapped.optimizer
        if self.world > 1:
            self._engine = self.model
            self.optimizer = self._engine.optimizer

    @property
    def shards_weights(self) -> bool:
        """Whether weights are gathered for each forward pass, which then is a collective call."""
        return self.stage == 3

    def set_learning_rates(self, rates: list[float]) -> None:
        """One learning rate for each parameter group, in their order."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a loss's gradients; ``last`` marks the final one before :meth:`step`.

        Losses are shares of a sum over all processes, while DeepSpeed averages over them: hence the factor.
        """
        if self._engine is None:
            loss.backward()
            return
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        self._engine.backward(loss * self.world)

    def step(self) -> float:
        """Clip, step and clear; returns the gradient norm before clipping.

        A norm that is not finite leaves the weights as they are; the caller counts it.
        """
        if self.stage > 0:
            if self._offloads:  # at the last backward pass DeepSpeed hands over what that one reached, alone
                self.optimizer.finalize_gradient_accumulation_boundary()
            self._engine.step()
            self._clear_buffer()
            return math.inf if self.optimizer.overflow else float(self._engine.get_global_grad_norm())
        for parameter in self._named.values():  # one that this loss does not reach steps like the others
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # without ZeRO the gradients are whole here, and DeepSpeed would not tell their norm
        norm = float(torch.nn.utils.clip_grad_norm_(self._named.values(), self.max_grad_norm))
        if not np.isfinite(norm):
            self.discard_gradients()
        elif self._engine is None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._engine.step()
        return norm

    def discard_gradients(self) -> None:
        """Forget gradients that are not to be used."""
        self.model.zero_grad()
        if self._engine is not None and hasattr(self.optimizer, "zero_grad"):
            self.optimizer.zero_grad()
        self._clear_buffer()

    def _clear_buffer(self) -> None:
        """Start the next sum from zero: DeepSpeed does so only for parameters in the first backward pass."""
        if self.stage == 3:
            self.optimizer.grad_partitions_flat_buffer.zero_()
        elif self._offloads:
            for buffer in self.optimizer.accumulated_grads_in_cpu.values():
                buffer.zero_()

    # ---------------------------------------------------------------- talking to the other processes

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def any_process(self, flag: bool) -> bool:
        """Whether the flag holds on any process."""
        return bool(self.all_sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    # ---------------------------------------------------------------- checkpoints

    def gather_state(self) -> dict[str, Tensor]:
        """Every learning parameter in float32, in one piece. All processes must call it."""
        with gathered(self._named.values(), changed=False):
            return {name: p.detach().float().cpu().clone() for name, p in self._named.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts by parameter name, in one piece. All processes must call it."""
        tensors: dict[str, Tensor] = {}
        if not self._flat_states():
            for name, parameter in self._named.items():
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"{key}:{name}"] = torch.as_tensor(value).detach().cpu().clone()
            return tensors
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        step = torch.as_tensor(self._flat_states()[0]["step"]).detach().cpu().float()
        for name, parameter in self._named.items():
            tensors[f"step:{name}"] = step.clone()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}:{name}"] = safe_get_full_optimizer_state(parameter, key).cpu().clone()
        return tensors

    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put moments and step counts back, sharded as this run shards them.

        Raises:
            KeyError: a tensor is missing; a fresh optimizer is never put in its place.
        """
        if self.stage == 0:
            kept = sorted({name.partition(":")[0] for name in tensors} | {"step"})
            for name, parameter in self._named.items():
                state = {key: tensors[f"{key}:{name}"] for key in kept}
                device = parameter.device
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(device, copy=True)
                    for key, value in state.items()
                }
            return
        self._make_flat_states(next(t for n, t in tensors.items() if n.startswith("step:")))
        for name, parameter in self._named.items():
            for key in ("exp_avg", "exp_avg_sq"):
                self._set_flat(parameter, key, tensors[f"{key}:{name}"])

    def _flats(self) -> list[Tensor]:
        """The flat float32 partitions that ZeRO's inner optimizer steps."""
        name = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, name))

    def _flat_states(self) -> list[dict[str, Any]]:
        return [] if self.stage == 0 else [self.optimizer.optimizer.state[flat] for flat in self._flats()]

    def _make_flat_states(self, step: Tensor) -> None:
        """ZeRO makes its states at the first step; a resumed run needs them before."""
        for flat in self._flats():
            self.optimizer.optimizer.state[flat] = {
                "step": step.clone(),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._link_states()

    def _link_states(self) -> None:
        """Let each parameter find its states: DeepSpeed links all groups once, when only one has any."""
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_flat(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage != 3:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value.to(self.device), key)
            return
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

        size = safe_get_local_optimizer_state(parameter, key).numel()
        padded = torch.zeros(size * self.world, dtype=torch.float32)
        padded[: value.numel()] = value.flatten()
        part = padded[size * self.rank : size * (self.rank + 1)]
        safe_set_local_optimizer_state(parameter, part.to(self.device), key)
