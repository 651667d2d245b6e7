"""The parts of the check; each returns its figures or raises :class:`~benchmarks.gpu_check.roads.Failure`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.roads import (
    ASSISTANT,
    HIDDEN,
    PREPARE,
    Deadline,
    Failure,
    Missing,
    Road,
    call,
    largest_difference,
    weights,
)
from benchmarks.harness import Figures, peer_folder, peer_path
from rlhf.errors import UserError
from rlhf.runs.artifacts import read_json, write_json
from rlhf.training.launch import visible_gpus

TOLERANCE = 1e-4
"""Between the losses of two devices in float32, relative to the largest of them."""
_REWARD, _PPO, _SFT = "reward.training", "policy.ppo", "policy.sft"
_FRESH = ("reward.start=null", "ppo.start=null")  # of the assistant's recipe: no stage of it before
_LOSSES = {"sft": "sft/loss", "reward": "reward/loss", "ppo": "policy/loss"}


@dataclass(frozen=True)
class Machine:
    """What parts need to know of the machine."""

    gpus: int
    quick: bool


@dataclass(frozen=True)
class Part:
    """One thing that is checked."""

    name: str
    what: str
    do: Callable[[Machine, Deadline], Figures]
    seconds: float
    """It is given up after so many with a GPU, and after three times as many without."""
    gpu_only: bool = False
    quick: bool = True
    """Also part of the quick form."""


def child(kind: str, values: Figures, deadline: Deadline, told: Mapping[str, str] | None = None) -> Figures:
    """Have :mod:`benchmarks.gpu_check.child` measure something in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        task, result = Path(scratch) / "task.json", Path(scratch) / "result.json"
        write_json(task, values)
        words = ["benchmarks.gpu_check.child", kind, str(task), str(result)]
        call([sys.executable, "-m", *words], deadline, told)
        return dict(read_json(result))


def device(machine: Machine, deadline: Deadline) -> Figures:
    """Card, version of CUDA, memory, and the matrix products a second that it reaches."""
    return child("device", {"size": 512 if machine.quick or not machine.gpus else 8192}, deadline)


def parity(machine: Machine, deadline: Deadline) -> Figures:
    """Losses of fine-tuning, the reward model and (not quick) PPO in float32, on the GPU and on the CPU."""
    stages = {_SFT: "sft", _REWARD: "reward", **({} if machine.quick else {_PPO: "ppo"})}
    found: list[dict[str, list[float]]] = []
    for environment in (HIDDEN, {}):
        with Road("parity", deadline, _FRESH, recipe=ASSISTANT, environment=environment) as road:
            road.run(*PREPARE, *stages)
            found.append({stage: road.column(stage, _LOSSES[stage]) for stage in stages.values()})
    figures: Figures = {
        f"{stage}_difference": largest_difference(found[0][stage], found[1][stage]) for stage in found[0]
    }
    worst = max(figures.values())
    if worst > TOLERANCE:
        raise Failure(f"losses on the GPU and on the CPU are {worst:.1e} apart, allowed {TOLERANCE:.0e}")
    return figures | {"steps": sum(map(len, found[0].values()))}


def road(*overrides: str, processes: Callable[[Machine], int] = lambda machine: 1) -> Callable[..., Figures]:
    """A part that trains a reward model and a policy with these overrides of the tiny recipe."""

    def do(machine: Machine, deadline: Deadline) -> Figures:
        number = processes(machine)
        with Road("road", deadline, overrides, processes=number) as run:
            run.run(*PREPARE, _REWARD, _PPO)
            gap = run.column("ppo", "policy/sampler_gap")
            return {
                "processes": number,
                "reward_loss": run.column("reward", "reward/loss")[-1],
                "policy_loss": run.column("ppo", "policy/loss")[-1],
                "mean_ratio_of_step_1": run.column("ppo", "policy/ratio")[0],
                "sampler_gap": max(gap),
            }

    return do


def checkpointed(machine: Machine, deadline: Deadline) -> Figures:
    """Fine-tuning with and without gradient checkpointing: the same losses."""
    found = []
    for key in ("false", "true"):
        overrides = (*_FRESH, f"model.gradient_checkpointing={key}")
        with Road("checkpointing", deadline, overrides, recipe=ASSISTANT) as run:
            run.run(*PREPARE, _SFT, _REWARD)
            found.append([*run.column("sft", "sft/loss"), *run.column("reward", "reward/loss")])
    difference = largest_difference(*found)
    if difference > TOLERANCE:
        raise Failure(f"losses with and without it are {difference:.1e} apart, allowed {TOLERANCE:.0e}")
    return {"difference": difference}


def killed(machine: Machine, deadline: Deadline) -> Figures:
    """PPO killed behind its third step and resumed, against PPO left alone."""
    kept: list[bytes] = []
    for kill in (False, True):
        with Road("killed", deadline) as run:
            run.run(*PREPARE, _REWARD)
            if kill:
                run.run(_PPO, until=lambda: run.steps("ppo") >= 3)
            run.run(_PPO)
            if (steps := run.steps("ppo")) != 6:
                raise Failure(f"its log has {steps} steps, not 6")
            kept.append(weights(run.folder / "ppo"))
    equal = kept[0] == kept[1]
    if not equal and not machine.gpus:
        raise Failure("the adapters of the two runs differ")
    return {"equal_adapters": equal}


def size(name: str) -> Callable[..., Figures]:
    """Seconds, tokens a second and memory of PPO steps of a random model with a known shape, in bfloat16."""

    def do(machine: Machine, deadline: Deadline) -> Figures:
        values: Figures = {"shape": name, "quick": machine.quick or not machine.gpus}
        return child("ppo", values, deadline)

    return do


def beside(side: str, samples: int) -> Callable[..., Figures]:
    """Seconds, tokens a second and memory of our steps and of a trainer of trl's, on one device.

    Args:
        side: of :data:`benchmarks.gpu_check.beside.SIDES`, other than ours.
        samples: responses to a prompt; 1 = PPO, more = RLOO.
    """

    def do(machine: Machine, deadline: Deadline) -> Figures:
        quick = machine.quick or not machine.gpus
        told = {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus(os.environ)[:1])}
        if side == "theirs":
            try:
                folder = peer_folder(seconds=0 if machine.quick else min(20, deadline.left / 2))
            except UserError as error:
                raise Missing(f"not in place: {error}") from None
            told["PYTHONPATH"] = peer_path(folder)
        found: Figures = {}
        with tempfile.TemporaryDirectory() as scratch:
            # the model is written by a process of its own, so that each side's memory is its own too
            for names in [["ours", side]] if quick else [[], ["ours"], [side]]:
                values = {"folder": scratch, "names": names, "samples": samples, "quick": quick}
                found |= child("sides", values, deadline, told)
        return compared(found, side)

    return do


def compared(found: Mapping[str, Figures], side: str) -> Figures:
    """The figures of both sides, with the costs of theirs over those of ours."""
    a, b = found["ours"], found[side]
    if (a["rows"], a["prompt_tokens"]) != (b["rows"], b["prompt_tokens"]):
        raise Failure("the two sides had other prompts")
    kept = ("s_per_step", "sampled_per_s", "trained_per_s", "response_tokens", "gpu_bytes", "peak_bytes")
    costs = {"time_a_step": "s_per_step", "time_a_token": "s_per_token", "gpu_memory": "gpu_bytes"}
    return {
        **{f"their_{name}_over_ours": b[key] / a[key] for name, key in costs.items() if a[key]},
        "sides": {name: {key: values[key] for key in kept} for name, values in found.items()},
    }


def everyone(machine: Machine) -> int:
    """A process a GPU; two on the CPU. One alone would start without DeepSpeed, and nothing would be seen."""
    if machine.gpus == 1:
        raise Missing("needs two GPUs: one process runs without DeepSpeed")
    return machine.gpus or 2


PARTS: Sequence[Part] = (
    Part("device", "what there is, and its matrix products a second", device, 60),
    Part("float32", "losses on the GPU as on the CPU", parity, 180),
    Part("bfloat16", "reward model and PPO in bfloat16", road("model.dtype=bfloat16"), 90),
    Part("0.6b", "PPO steps at the shape of Qwen3-0.6B, bfloat16", size("0.6b"), 120, quick=False),
    Part("trl-ppo", "our PPO beside PPOTrainer of trl 1.12, shape of 0.6B", beside("theirs", 1), 150,
         quick=False),
    Part("trl-rloo", "our RLOO beside RLOOTrainer of the installed trl", beside("rloo", 4), 120),
    Part("8b", "PPO steps at the shape of Llama-3.1-8B, bfloat16", size("8b"), 240, gpu_only=True,
         quick=False),
    Part("rloo", "RLOO in bfloat16", road("model.dtype=bfloat16", "ppo.algorithm=rloo",
         "ppo.samples_per_prompt=2", "ppo.value=adapter", "ppo.value_warmup=0"), 90, quick=False),
    Part("int8", "reward model and PPO over an int8 base", road("model.quantization=int8"), 90, quick=False),
    Part("nf4", "reward model and PPO over an nf4 base", road("model.quantization=nf4"), 90, quick=False),
    Part("checkpointing", "the same losses with gradient checkpointing", checkpointed, 150, quick=False),
    *(
        Part(f"zero-{stage}", f"a process a GPU under ZeRO {stage}",
             road(f"distributed.zero_stage={stage}", processes=everyone), 120, quick=False)
        for stage in range(4)
    ),
    Part("offload", "ZeRO 3 with weights and optimizer in the machine's memory",
         road("distributed.zero_stage=3", "distributed.offload_optimizer=cpu",
              "distributed.offload_param=cpu", processes=everyone), 120, quick=False),
    Part("resume", "PPO killed and resumed", killed, 150),
)  # fmt: skip


def run(part: Part, machine: Machine, left: float) -> Figures:
    """Do a part; returns its figures under ``state`` ``passed``, ``failed`` or ``skipped``, with ``why``.

    Args:
        part: of :data:`PARTS`.
        machine: where.
        left: seconds that the whole check has left.
    """
    if part.gpu_only and not machine.gpus:
        return {"state": "skipped", "why": "needs a GPU"}
    if left < 5:
        return {"state": "skipped", "why": "no time left: --minutes gives more"}
    deadline = Deadline(min(part.seconds * (1 if machine.gpus else 3), left))
    try:
        figures = part.do(machine, deadline)
    except Missing as missing:
        return {"state": "skipped", "why": str(missing)}
    except Failure as failure:
        return {"state": "failed", "why": str(failure)}
    except Exception as error:  # a fault of the check itself: the other parts still run
        return {"state": "failed", "why": f"{type(error).__name__}: {error}"}
    return {"state": "passed", "figures": figures}
