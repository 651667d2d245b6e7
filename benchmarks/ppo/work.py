"""How many floating-point operations the matrix products of one PPO step need.

Counted: the linear maps of the layers, their adapters, and the vocabulary head on response positions, all on
real tokens. Not counted: attention scores, norms, softmax, scalar heads, padding, anything done twice. So it
is what the step has to do, and the share of the machine's peak that it reaches is a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

READS_THE_LAYERS_INPUT = ("q_proj", "k_proj", "v_proj")


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
    hidden: int
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Weights of the linear maps of one layer."""
        return sum(m.inputs * m.outputs for m in self.linears)


def sizes_of(base: Any) -> Sizes:
    """The sizes of a causal language model without adapters."""
    layers: Sequence[nn.Module] = base.get_decoder().layers
    linears = tuple(
        Linear(name.rpartition(".")[2], m.in_features, m.out_features)
        for name, m in layers[0].named_modules()
        if isinstance(m, nn.Linear)
    )
    head = base.get_output_embeddings()
    return Sizes(len(layers), linears, int(head.in_features), int(head.out_features))


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


def step_flops(
    sizes: Sizes, method: Method, *, rows: int, prompt_tokens: int, response_tokens: float
) -> dict[str, float]:
    """Operations of one PPO step by phase: ``generate``, ``score``, ``update``.

    A product of [t, i] with [i, o] is 2·t·i·o operations. A frozen map needs it forwards, and once more for
    the gradient of its input; an adapter's two maps, and maps that learn, once more for their own gradient.
    The maps that read the input of the lowest adapted layer need no gradient of it. Notation: t tokens, W
    weights of a layer, A = Σ rank·(in + out) weights of a layer's adapter, L layers, k adapted, c the layers
    of a pass (k with a cached trunk, else L).

        generate  2·(L·W + k·A)·(t - rows) + 2·V·D·response                  (the last token is not fed)
        score     2·t·(passes·c·W + (L - c)·W + adapters·k·A) + heads·2·V·D·response
        policy    2·t·(c·W + k·A + k·W - W₁ + k·A + k·A - A₁) + 2·2·V·D·response       an epoch
        value     the same without the vocabulary; with all its weights 3·2·t·L·W      an epoch

    W₁ and A₁: the maps that read the layer's input, and the first halves of their adapters.

    Args:
        sizes: the model.
        method: what is done with it.
        rows: responses of the step.
        prompt_tokens: of all prompts.
        response_tokens: of all responses, EOS included.
    """
    k, weights = method.adapted, sizes.layer_weights
    adapter = method.rank * sum(m.inputs + m.outputs for m in sizes.linears)
    first = [m for m in sizes.linears if m.name in READS_THE_LAYERS_INPUT]
    first_weights = sum(m.inputs * m.outputs for m in first)
    first_adapter = method.rank * sum(m.inputs for m in first)
    tokens = prompt_tokens + response_tokens
    in_pass = k if method.cached else sizes.layers
    head = 2.0 * sizes.vocabulary * sizes.hidden * response_tokens

    generate = 2.0 * (sizes.layers * weights + k * adapter) * (tokens - rows) + head
    once = (sizes.layers - in_pass) * weights
    score = 2.0 * tokens * (method.passes * in_pass * weights + once + method.adapters * k * adapter)
    learner = 2.0 * tokens * (
        (in_pass + k) * weights - first_weights + 3 * k * adapter - first_adapter
    )  # fmt: skip
    value = 6.0 * tokens * sizes.layers * weights if method.full_value else learner
    return {
        "generate": generate,
        "score": score + method.heads * head,
        "update": method.epochs * (learner + 2.0 * head + value),
    }
