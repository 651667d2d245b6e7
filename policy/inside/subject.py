"""What is looked into: a model, or a role of the backbone, that gives one number a row, and its components.

The components of a decoder write into its residual stream: attention heads (the input of the attention's
output map, one slice a query head, so that grouped key and value heads change nothing), neurons (the input of
the MLP's output map), and the embeddings. What a head or a neuron contributes is its activation times its
rows of that map. The map is read off the module by what it gives for unit vectors: the same for a plain
layer, one of peft's, one folded or quantized.

Shape suffixes: ``_B`` row, ``_T`` token, ``_R`` response token, ``_D`` hidden unit, ``_I`` input of an output
map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.models.backbone import Backbone, stack_of
from rlhf.models.masks import positions_from_mask

_WRITERS = (  # output maps of attention and MLP, as families call them: Llama, GPT-2, GPT-NeoX
    ("self_attn.o_proj", "mlp.down_proj"),
    ("attn.c_proj", "mlp.c_proj"),
    ("attention.dense", "mlp.dense_4h_to_h"),
)
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")


class Site(NamedTuple):
    """A place in a decoder."""

    layer: int
    """-1 for the embeddings."""
    kind: str
    """``heads``, ``neurons``, ``state`` (a layer's output) or ``embeddings``."""

    def name(self, unit: int) -> str:
        """One component of it, as in L3.H2 or L3.N17."""
        return f"L{self.layer}.{self.kind[0].upper()}{unit}" if self.layer >= 0 else self.kind


EMBEDDINGS = Site(-1, "embeddings")


class Batch(NamedTuple):
    """Rows that are read at once, as :meth:`rlhf.models.backbone.Backbone.forward` takes them."""

    ids_BT: Tensor
    """Tokens; where log-probs are wanted a closing column stands behind the last one."""
    mask_BT: Tensor
    """True = a real token."""
    start: int = 1
    """First column of the responses."""
    targets_BR: Tensor | None = None
    """True = a response token whose log-prob counts; None = all."""

    def rows(self, rows: Any) -> Batch:
        """Some of the rows."""
        targets = None if self.targets_BR is None else self.targets_BR[rows]
        return Batch(self.ids_BT[rows], self.mask_BT[rows], self.start, targets)


class Subject:
    """A decoder and the number that its model gives for a row; its weights must not change meanwhile.

    Args:
        decoder: embeddings and layers.
        measure: one number a row, [B], differentiable: a score, or the log-prob of the response.
        activate: switches the model to what is looked into, where it has several adapters.
        depth: how many of the layers are run; None = all.

    Raises:
        UserError: the decoder's parts have other names, or its heads are not of one size.
    """

    def __init__(
        self,
        decoder: Any,
        measure: Callable[[Batch], Tensor],
        *,
        activate: Callable[[], object] = lambda: None,
        depth: int | None = None,
    ) -> None:
        self.decoder, self.measure, self.activate = decoder, measure, activate
        self.sites: dict[Site, nn.Module] = {EMBEDDINGS: part_of(decoder, decoder, _EMBEDDINGS)}
        try:
            layers = getattr(decoder, stack_of(decoder))[:depth]
        except AttributeError as error:
            raise UserError(f"inside: {error}: layers of other names are not known here") from None
        for number, layer in enumerate(layers):
            for kind, names in zip(("heads", "neurons"), zip(*_WRITERS, strict=True), strict=True):
                self.sites[Site(number, kind)] = part_of(decoder, layer, names)
            self.sites[Site(number, "state")] = layer
        self.layers = len(layers)
        self._heads = int(decoder.config.get_text_config().num_attention_heads)

    @property
    def writers(self) -> list[Site]:
        """Places of heads and neurons, from the first layer up."""
        return [site for site in self.sites if site.kind in ("heads", "neurons")]

    @functools.cached_property
    @torch.no_grad()
    def maps(self) -> dict[Site, Tensor]:
        """What every output map does to unit vectors, without its bias, [I, D]."""
        self.activate()
        return {site: _linear_map(self.sites[site]) for site in self.writers}

    @torch.no_grad()
    def measure_plainly(self, batch: Batch) -> Tensor:
        """One number a row without a gradient, [B], float32."""
        return self.measure(batch).float()

    def units(self, site: Site) -> int:
        """How many heads or neurons there are at a place."""
        return self._heads if site.kind == "heads" else len(self.maps[site])

    def columns(self, site: Site, units: Tensor) -> Tensor:
        """Inputs of a place's output map that belong to these heads or neurons."""
        width = len(self.maps[site]) // self.units(site)
        return (units[:, None] * width + torch.arange(width)).flatten().to(self.maps[site].device)


def of_role(backbone: Backbone, role: str) -> Subject:
    """A role of the backbone: the score of a role with a head, else the log-prob of the response."""

    def measure(batch: Batch) -> Tensor:
        if role in backbone.heads:
            own_BT = batch.mask_BT.clone()
            own_BT[:, : batch.start] = False
            scores: Tensor = backbone(role, batch.ids_BT, batch.mask_BT, own_BT=own_BT)
            return scores
        options = {"start": batch.start, "targets_mask_BR": batch.targets_BR}
        log_probs: Tensor = backbone(role, batch.ids_BT, batch.mask_BT, **options)[0].sum(-1)
        return log_probs

    return Subject(
        backbone.decoder, measure, activate=lambda: backbone.activate(role), depth=backbone.depths.get(role)
    )


def of_model(model: Any, *, activate: Callable[[], object] = lambda: None) -> Subject:
    """A Hugging Face model, with or without peft: the score of a classifier with one label, else the log-prob
    of the response."""

    def measure(batch: Batch) -> Tensor:
        activate()
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT.long()}
        inputs["position_ids"] = positions_from_mask(batch.mask_BT)
        logits: Tensor = model(**inputs, use_cache=False).logits.float()
        if logits.ndim == 2:
            return logits[:, 0]
        before_BRV = logits[:, batch.start - 1 : -2].log_softmax(-1)
        own_BR1 = batch.ids_BT[:, batch.start : -1, None]
        log_probs_BR = before_BRV.gather(-1, own_BR1).squeeze(-1)
        counts = torch.ones_like(log_probs_BR) if batch.targets_BR is None else batch.targets_BR
        return (log_probs_BR * counts).sum(-1)

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Subject(getattr(base, base.base_model_prefix), measure, activate=activate)


def part_of(decoder: Any, where: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The module that one of these names leads to.

    Raises:
        UserError: none does.
    """
    for name in names:
        try:
            found: nn.Module = attrgetter(name)(where)
        except AttributeError:
            continue
        return found
    raise UserError(
        f"inside: {type(decoder).__name__} has none of {', '.join(names)}, by which Llama, GPT-2 and "
        "GPT-NeoX call this part: another family cannot be looked into"
    )


def _linear_map(module: nn.Module) -> Tensor:
    """What a linear module, whatever stands for it, does to unit vectors, without its bias, [I, D]."""
    module_: Any = module
    base = module_.get_base_layer() if hasattr(module, "get_base_layer") else module_
    inputs = getattr(base, "in_features", None) or base.nx  # GPT-2's Conv1D
    weight = next(module.parameters())
    kind = weight.dtype if weight.dtype.is_floating_point else torch.float32
    units = torch.eye(inputs, device=weight.device, dtype=kind)
    found: Tensor = module_(units) - module_(torch.zeros_like(units[:1]))
    return found.detach().float()
