"""The 8-bit optimizer, by stand-ins (there is no GPU here), and the keys of DeepSpeed."""

import bitsandbytes.optim
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from rlhf.errors import UserError
from rlhf.recipe.schema import Distributed
from rlhf.training.optimizer import deepspeed_config, make_optimizer
from rlhf.training.runtime import Runtime


def test_the_paged_optimizer_gets_the_groups_with_their_rates(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW8bit", lambda *a, **o: made.append((a, o)) or "made")
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate} for rate in (1e-3, 1e-4)]
    assert make_optimizer("paged_adamw_8bit", groups, epsilon=1e-5) == "made"
    assert made == [((groups,), {"eps": 1e-5, "weight_decay": 0.0})]


def test_the_paged_optimizer_is_refused_on_a_cpu_and_over_zero():
    with pytest.raises(UserError, match="paged_adamw_8bit needs a CUDA GPU, and there is none; use adamw"):
        make_optimizer("paged_adamw_8bit", [], epsilon=1e-8)
    runtime = Runtime(Distributed(), seed=0, max_grad_norm=1.0, micro_batch_size=1)
    runtime.stage = 2
    with pytest.raises(UserError, match="does not go with ZeRO 2; use zero_stage 0"):
        runtime.prepare(torch.nn.Linear(1, 1), [], {}, epsilon=1e-8, kind="paged_adamw_8bit")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"wall_clock_breakdwn": True}, "DeepSpeed knows no key wall_clock_breakdwn (did you mean "
         "wall_clock_breakdown?)"),
        ({"xyz": 1}, "DeepSpeed knows no key xyz; mend"),
        ({"zero_optimization": {"reduce_buket_size": 1}}, "zero_optimization.reduce_buket_size: Extra inputs "
         "are not permitted (did you mean reduce_bucket_size?)"),
        ({"zero_optimization": {"sub_group_size": "many"}}, "zero_optimization.sub_group_size: Input"),
    ],
)  # fmt: skip
def test_a_key_that_deepspeed_does_not_know_is_told_with_the_nearest(given, line, monkeypatch):
    section = Distributed(deepspeed=given)
    deepspeed_config(section, batch=2, clip=1.0)  # one process has no use for it
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as caught:
        deepspeed_config(section, batch=2, clip=1.0)
    assert str(caught.value).startswith(f"distributed.deepspeed: {line}")


def test_keys_that_deepspeed_knows_are_taken(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    known = {key: {} for key in ("aio", "flops_profiler", "compile")} | {"wall_clock_breakdown": True}
    known["zero_optimization"] = {"reduce_bucket_size": 1000}
    found = deepspeed_config(Distributed(deepspeed=known, zero_stage=3), batch=2, clip=1.0)
    assert found["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000}
    assert found["wall_clock_breakdown"] is True


def test_the_autocast_of_another_trainer_does_not_reach_ours():
    AcceleratorState._reset_state()
    Accelerator(cpu=True, mixed_precision="bf16")  # as trl's and transformers' trainers with bf16=True do
    try:
        runtime = Runtime(Distributed(), seed=0, max_grad_norm=1.0, micro_batch_size=1)
        module = torch.nn.Linear(4, 4)
        groups = [{"params": list(module.parameters()), "lr": 0.1}]
        runtime.prepare(module, groups, dict(module.named_parameters()), epsilon=1e-8)
        assert runtime.model(torch.ones(2, 4)).dtype == torch.float32
        assert runtime.accelerator.mixed_precision == "no"
    finally:
        AcceleratorState._reset_state()


def test_an_accelerate_variable_does_not_switch_autocast_on(monkeypatch):
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    runtime = Runtime(Distributed(), seed=0, max_grad_norm=1.0, micro_batch_size=1)
    assert runtime.accelerator.mixed_precision == "no"
