"""What both sides of the PPO benchmark do alike, and how a run is timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.harness import Figures, peak_bytes
from benchmarks.ppo.work import Method, Sizes, step_flops
from rlhf.tokenization.dialogue import Dialogue, load_tokenizer

PHASES = ("generate", "score", "update")


@dataclass(frozen=True)
class Task:
    """What both sides do alike."""

    base: str
    """Folder of the base model."""
    rows: str
    """File of the prompts; every step takes all of them."""
    layers: str
    """``all`` or ``top_<k>``: which layers have an adapter."""
    response_tokens: int = 48
    """Longest response, EOS included."""
    epochs: int = 4
    steps: int = 3
    """Of a run; the first is not measured."""
    micro_batch: int = 8
    """Responses that go through an update at once."""
    value: str = "full"
    """Theirs only: their value model learns with all its weights (``full``) or with ``lora``."""
    rank: int = 8
    alpha: int = 16
    temperature: float = 1.0
    learning_rate: float = 1e-5
    adam_epsilon: float = 1e-5
    kl_coef: float = 0.05
    missing_eos_penalty: float = 1.0
    threads: int = 2
    seed: int = 0

    def adapted(self, layers: int) -> int:
        """How many of a model's layers have an adapter."""
        return layers if self.layers == "all" else int(self.layers.removeprefix("top_"))


class Step(NamedTuple):
    """One PPO step, seconds of wall time."""

    seconds: float
    """All of it, logging and book-keeping included."""
    cpu: float
    """Processor seconds of all threads."""
    phases: dict[str, float]
    """``update``, and ``generate`` and ``score`` or, where they are not told apart, ``rollout``."""
    response_tokens: float
    """Of all responses, EOS included."""


class Clock:
    """Cuts a run into steps.

    The first reading is taken where the training begins, the others where a step ends.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.start()

    def start(self) -> None:
        """The next step begins now."""
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def end_step(self, phases: dict[str, float], response_tokens: float) -> None:
        """A step ends, the next begins."""
        wall, cpu = self.wall, self.cpu
        self.start()
        self.steps.append(Step(self.wall - wall, self.cpu - cpu, phases, response_tokens))


def figures(steps: Sequence[Step], sizes: Sizes, method: Method, *, rows: int, prompt_tokens: int) -> Figures:
    """The measurement of a run; all but ``step_s`` leaves out its first step.

    Args:
        steps: all steps.
        sizes: the model.
        method: what the side does.
        rows: responses of a step.
        prompt_tokens: of all prompts of a step.

    Returns:
        Means a step: seconds in all and by phase, processor seconds, response tokens; tokens (prompt and
        response, without padding) a second, peak memory, and the operations needed.
    """
    measured = steps[1:]
    seconds = _mean([s.seconds for s in measured])
    response = _mean([s.response_tokens for s in measured])
    flops = step_flops(sizes, method, rows=rows, prompt_tokens=prompt_tokens, response_tokens=response)
    found = {
        f"{name}_s": _mean([s.phases[name] for s in measured])
        for name in (*PHASES, "rollout")
        if name in measured[0].phases
    }
    if "rollout_s" not in found:
        found["rollout_s"] = found["generate_s"] + found["score_s"]
    return {
        "step_s": [s.seconds for s in steps],
        "measured_steps": len(measured),
        "s_per_step": seconds,
        "cpu_s_per_step": _mean([s.cpu for s in measured]),
        **found,
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response,
        "mean_response_tokens": response / rows,
        "tokens_per_s": (prompt_tokens + response) / seconds,
        "s_per_token": seconds / (prompt_tokens + response),
        "flops_per_step": sum(flops.values()),
        "flops_by_phase": flops,
        "flops_per_s": sum(flops.values()) / seconds,
        "peak_bytes": peak_bytes(),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def dialogue_of(base: str, response_tokens: int = 48, prompt_tokens: int = 4096) -> Dialogue:
    """The token contract of both sides: plain text in, EOS behind a response."""
    return Dialogue(
        load_tokenizer(base),
        template="plain",
        max_prompt_tokens=prompt_tokens,
        max_response_tokens=response_tokens,
    )
