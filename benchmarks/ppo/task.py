"""What both sides of the PPO benchmark do alike, how a run is timed, and how many operations it needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from benchmarks.harness import Figures, peak_bytes, weights_dtype
from rlhf.recipe.load import Recipe
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
    dtype: str = "float32"
    """Of the base: a type of torch's, or of theirs ``autocast``: float32 weights, products in bfloat16."""
    seed: int = 0
    samples: int = 1
    """Responses to a prompt, whose rows stand together; with more than one it is RLOO, without a value."""

    def recipe(self, rows: int) -> Recipe:
        """The recipe that does this with so many responses a step."""
        return Recipe.model_validate(
            {
                "name": "benchmark",
                "seed": self.seed,
                "model": {"path": self.base, "dtype": weights_dtype(self.dtype)},
                "lora": {"rank": 8, "alpha": 16, "layers": self.layers},
                "dialogue": {"template": "plain", "max_response_tokens": self.response_tokens},
                "data": {"comparisons": "none"},
                "ppo": {
                    "steps": self.steps,
                    "batch_size": rows,
                    "rollout_batch_size": rows,
                    "micro_batch_size": min(self.micro_batch, rows),
                    "epochs": self.epochs,
                    "temperature": 1.0,
                    "learning_rate": 1e-5,
                    "adam_epsilon": 1e-5,
                    "kl_coef": 0.05,
                    "missing_eos": "subtract",
                    "missing_eos_penalty": 1.0,
                    "checkpoint_every": 1_000_000,
                    **({"algorithm": "rloo", "samples_per_prompt": self.samples} if self.samples > 1 else {}),
                },
            }
        )


def dialogue_of(base: str, response_tokens: int = 48) -> Dialogue:
    """The token contract of both sides: plain text in, EOS behind a response."""
    return Dialogue(
        load_tokenizer(base), template="plain", max_prompt_tokens=4096, max_response_tokens=response_tokens
    )


def classifier_of(path: str, dialogue: Dialogue, dtype: str = "float32") -> Any:
    """The base with a fresh scalar head."""
    return AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=getattr(torch, dtype), pad_token_id=dialogue.pad_id
    )


# ---------------------------------------------------------------- time


def now() -> float:
    """Seconds of a clock, read when a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Step(NamedTuple):
    """One PPO step, seconds of wall time."""

    seconds: float
    """All of it, logging and book-keeping included."""
    cpu: float
    """Processor seconds of all threads."""
    phases: dict[str, float]
    """By name, those of :data:`PHASES` that can be told apart."""
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
        self.wall, self.cpu = now(), time.process_time()

    def end_step(self, phases: dict[str, float], response_tokens: float) -> None:
        """A step ends, the next begins."""
        wall, cpu = self.wall, self.cpu
        self.start()
        self.steps.append(Step(self.wall - wall, self.cpu - cpu, phases, response_tokens))


# ---------------------------------------------------------------- operations


class Linear(NamedTuple):
    """One linear map of a layer."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Sizes:
    """The linear maps of a model, all layers alike."""

    layers: int
    linears: tuple[Linear, ...]
    """Those of one layer."""
    head: int
    """Weights of the vocabulary head."""


def sizes_of(base: Any) -> Sizes:
    """The sizes of a causal language model without adapters."""
    layers: Sequence[nn.Module] = base.get_decoder().layers
    linears = tuple(
        Linear(name.rpartition(".")[2], m.in_features, m.out_features)
        for name, m in layers[0].named_modules()
        if isinstance(m, nn.Linear)
    )
    return Sizes(len(layers), linears, int(base.get_output_embeddings().weight.numel()))


@dataclass(frozen=True)
class Method:
    """What one side does in a step."""

    epochs: int
    rank: int
    adapted: int
    """Layers with an adapter, the last ones."""
    passes: int
    """Forward passes over the finished responses that score them: of policy, reference, value, reward."""
    heads: int
    """How many of these need the vocabulary."""
    adapters: int
    """How many of these run an adapter."""
    cached: bool = False
    """The layers below the first adapter are computed once a rollout."""
    full_value: bool = False
    """The value learns with all its weights, and has no adapter."""
    value: bool = True
    """There is one."""


def step_flops(
    sizes: Sizes, method: Method, *, rows: int, prompt_tokens: int, response_tokens: float
) -> dict[str, float]:
    """Operations of the matrix products of one PPO step by phase: ``generate``, ``score``, ``update``.

    Counted: the linear maps of the layers, their adapters, and the vocabulary head on response positions, all
    on real tokens. Not counted: attention scores, norms, softmax, scalar heads, padding, anything done twice.
    So it is what the step has to do, and the share of the machine's peak that it reaches is a lower bound.

    A product of [t, i] with [i, o] is 2·t·i·o operations. A frozen map needs it forwards, and once more for
    the gradient of its input; an adapter's two maps, and maps that learn, once more for their own gradient.
    The maps that read the input of the lowest adapted layer need no gradient of it. Notation: t tokens, W
    weights of a layer, A = Σ rank·(in + out) weights of a layer's adapter, L layers, k adapted, c the layers
    of a pass (k with a cached trunk, else L), VD weights of the head.

        generate  2·(L·W + k·A)·(t - rows) + 2·VD·response                   (the last token is not fed)
        score     2·t·(passes·c·W + (L - c)·W + adapters·k·A) + heads·2·VD·response
        policy    2·t·(c·W + k·A + k·W - W₁ + k·A + k·A - A₁) + 2·2·VD·response        an epoch
        value     the same without the vocabulary; with all its weights 3·2·t·L·W      an epoch

    W₁ and A₁: the maps that read the layer's input, and the first halves of their adapters.

    Args:
        sizes: the model.
        method: what is done with it.
        rows: responses of the step.
        prompt_tokens: of all prompts.
        response_tokens: of all responses, EOS included.
    """
    k, layers = method.adapted, sizes.layers
    weights = sum(m.inputs * m.outputs for m in sizes.linears)
    adapter = method.rank * sum(m.inputs + m.outputs for m in sizes.linears)
    first = [m for m in sizes.linears if m.name in ("q_proj", "k_proj", "v_proj")]
    without = sum(m.inputs * m.outputs + method.rank * m.inputs for m in first)
    tokens = prompt_tokens + response_tokens
    in_pass = k if method.cached else layers
    head = 2.0 * sizes.head * response_tokens

    scored = (method.passes * in_pass + layers - in_pass) * weights + method.adapters * k * adapter
    learner = 2.0 * tokens * ((in_pass + k) * weights + 3 * k * adapter - without)
    value = 6.0 * tokens * layers * weights if method.full_value else learner
    return {
        "generate": 2.0 * (layers * weights + k * adapter) * (tokens - rows) + head,
        "score": 2.0 * tokens * scored + method.heads * head,
        "update": method.epochs * (learner + 2.0 * head + value * method.value),
    }


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
        response, without padding) a second, and those sampled and, over all epochs, trained on; peak memory
        of the process and of its GPU (the most that tensors held), bytes; the operations needed.
    """
    measured = steps[1:]
    seconds = statistics.fmean(s.seconds for s in measured)
    response = statistics.fmean(s.response_tokens for s in measured)
    flops = step_flops(sizes, method, rows=rows, prompt_tokens=prompt_tokens, response_tokens=response)
    return {
        "step_s": [s.seconds for s in steps],
        "measured_steps": len(measured),
        "s_per_step": seconds,
        "cpu_s_per_step": statistics.fmean(s.cpu for s in measured),
        **{f"{name}_s": statistics.fmean(s.phases[name] for s in measured) for name in steps[0].phases},
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response,
        "mean_response_tokens": response / rows,
        "tokens_per_s": (prompt_tokens + response) / seconds,
        "sampled_per_s": response / seconds,
        "trained_per_s": method.epochs * (prompt_tokens + response) / seconds,
        "s_per_token": seconds / (prompt_tokens + response),
        "flops_per_step": sum(flops.values()),
        "flops_by_phase": flops,
        "flops_per_s": sum(flops.values()) / seconds,
        "peak_bytes": peak_bytes(),
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
