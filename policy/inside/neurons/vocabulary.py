"""What directions of the residual stream say of the vocabulary, and how alike some tokens are.

Shape suffixes: ``_N`` row, ``_U`` neuron, ``_K`` token of a list, ``_D`` hidden unit, ``_V`` vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from policy.inside.subject import Site, Subject, part_of
from rlhf.errors import UserError

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


class Readout(NamedTuple):
    """The last norm's weight and the unembedding, as one linear map from the stream to the vocabulary."""

    gain_D: Tensor
    """What the last norm multiplies each hidden unit by."""
    head_VD: Tensor
    """The unembedding."""
    centered: bool
    """Whether the norm takes the mean off first, as a LayerNorm does."""

    def __call__(self, vectors_ND: Tensor) -> Tensor:
        """Logits [N, V] that these directions add where the stream has a root mean square of 1 before the
        last norm (logit lens, nostalgebraist 2020); what the norm divides by does not change their order."""
        return (self._centered(vectors_ND) * self.gain_D) @ self.head_VD.T

    def of_states(self, states_ND: Tensor) -> Tensor:
        """Logits [N, V] of whole states, as the model would give them if they were its last, biases apart."""
        return self(states_ND) / self.size_of(states_ND)

    def size_of(self, states_ND: Tensor) -> Tensor:
        """What the last norm divides states by, [N, 1], its epsilon apart."""
        return self._centered(states_ND).square().mean(-1, keepdim=True).sqrt()

    def _centered(self, vectors_ND: Tensor) -> Tensor:
        vectors_ND = vectors_ND.float()
        return vectors_ND - vectors_ND.mean(-1, keepdim=True) if self.centered else vectors_ND


@torch.no_grad()
def readout_of(decoder: Any, head: Any) -> Readout:
    """The readout of a decoder and the module of its output embeddings.

    Raises:
        UserError: the decoder has no last norm of a known name, or the unembedding reads something else.
    """
    norm: Any = part_of(decoder, decoder, _NORMS)
    head_VD = head.weight.detach().float()
    width = int(decoder.config.get_text_config().hidden_size)
    if head_VD.shape[-1] != width:
        raise UserError(
            f"inside: the unembedding reads {head_VD.shape[-1]} units and the stream has {width}: set "
            "inside.neurons=0, since this family's states cannot be read as tokens here"
        )
    if isinstance(norm, nn.LayerNorm):
        return Readout(norm.weight.detach().float(), head_VD, True)
    weight = next(norm.parameters(), head_VD)
    ones_1D = torch.ones(1, width, dtype=weight.dtype, device=weight.device)  # of root mean square 1
    return Readout(norm(ones_1D)[0].float(), head_VD, False)


def direct_effect(subject: Subject, site: Site, units: Tensor, readout: Readout) -> Tensor:
    """Logits [U, V] that one unit of a neuron's activation adds directly, past all later layers:
    W_out[n] diag(gain) W_U, in logits where the stream has a root mean square of 1 (Miller and Neo 2023).

    Args:
        subject: the model whose output map is read, an adapter's update with it.
        site: a layer's neurons.
        units: [U] their numbers.
        readout: of the same model.
    """
    map_ID = subject.maps[site]
    return readout(map_ID[units.to(map_ID.device)])


def relatedness(embeddings_KD: Tensor) -> float:
    """Mean cosine similarity over all pairs of some tokens' embeddings: 1 where all are the same (Lo 2023);
    NaN for fewer than two."""
    number = len(embeddings_KD)
    if number < 2:
        return math.nan
    unit_KD = nn.functional.normalize(embeddings_KD.detach().double(), dim=-1)
    return (float(unit_KD.sum(0).square().sum()) - number) / (number * (number - 1))
