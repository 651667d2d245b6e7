"""One frozen base, many named LoRA adapters, a few scalar heads.

Roles: ``policy``, ``value`` and ``reward`` are adapters on the one base; ``reference`` is the base with every
adapter switched off, or a frozen adapter where the policy starts from one. All roles go through
:meth:`Backbone.forward`, so that one DeepSpeed engine can wrap it.

Where only the top layers are adapted (``lora.layers: top_k``), the layers below are the same for every role
and every pass: :meth:`Backbone.trunk` computes their hidden states once, and ``forward`` starts from them. A
role may run through the lower layers alone (``depths``), as a reward model of fewer layers does: it has no
use for the trunk, since its own adapter begins below.

Shape suffixes: ``_B`` sequence, ``_T`` token, ``_D`` hidden unit, ``_R`` response token.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import out_of_memory
from rlhf.models.folding import Folding
from rlhf.models.log_probs import check_head, chunk_of, logits_head, token_log_probs
from rlhf.models.lora import HEAD, lora_config, read_adapter, write_adapter
from rlhf.models.masks import attention_window, last_true_index, masked_mean, positions_from_mask
from rlhf.recipe.schema import Lora

REFERENCE = "reference"  # the role of the base without adapters
ALL_ADAPTED = "no layers are frozen (lora.layers adapts all of them)"
WEIGHTS_SHARDED = "ZeRO 3 gathers all layers in every pass"


@contextlib.contextmanager
def layers_of(decoder: Any, part: str, cut: int, depth: int | None = None) -> Iterator[None]:
    """Let a decoder consist of its layers below ``cut`` (``trunk``), from there (``top``), or ``all``; of
    the latter two up to ``depth``, where one is given.

    The decoder's own forward then builds masks and positions, whatever the architecture. Some look a layer's
    type up by its number, so the types are cut with the layers.

    Raises:
        AttributeError: its layers or its last norm have no name that is known.
    """
    if part == "all" and depth is None:
        yield
        return
    stack = stack_of(decoder)
    wanted = {"trunk": slice(cut), "top": slice(cut, depth), "all": slice(depth)}[part]
    parts: dict[str, Any] = {stack: getattr(decoder, stack)[wanted]}
    if part == "trunk":
        parts |= {_first(decoder, _NORMS): nn.Identity(), "project_out": None}
    elif part == "top":
        parts |= _DONE_BELOW
    before = {name: getattr(decoder, name) for name in parts if getattr(decoder, name, None) is not None}
    types = getattr(decoder.config, "layer_types", None)
    try:
        for name in before:
            setattr(decoder, name, parts[name])
        if types is not None:
            decoder.config.layer_types = types[wanted]
        yield
    finally:
        for name, own in before.items():
            setattr(decoder, name, own)
        if types is not None:
            decoder.config.layer_types = types


class _NoPositions(nn.Module):
    """Adds nothing, in the place of learned positions."""

    def forward(self, *_args: Any, **_options: Any) -> Tensor:
        """Zero."""
        return torch.zeros(())


_LAYERS = ("layers", "h")  # names that families give to a decoder's parts
_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")
_DONE_BELOW = {  # what is done to the embeddings, and so must not be done to a trunk's states again
    "wpe": _NoPositions(),
    "embed_positions": _NoPositions(),
    "project_in": None,
    "embedding_multiplier": 1.0,
}


def stack_of(decoder: Any) -> str:
    """The name of a decoder's layers."""
    return _first(decoder, _LAYERS)


def _first(decoder: Any, names: Sequence[str]) -> str:
    for name in names:
        if hasattr(decoder, name):
            return name
    raise AttributeError(f"{type(decoder).__name__} has none of {', '.join(names)}")


class Backbone(nn.Module):
    """The base with its adapters and heads.

    Args:
        base: a causal language model.
        lora: shape of every adapter.
        adapters: names of the adapters; each starts as no change (B = 0).
        heads: names of the adapters that carry a scalar head with bias.
        trainable: names of the adapters that learn; the others stay frozen.
        shared: heads that have no adapter of their own, and whose adapter each reads instead.
        depths: adapters that run through so many of the base's layers, from the first, and no further.
        pooled: heads that read the mean state of a response, not the last one.
        ranks: adapters that have so many times the rank and alpha of ``lora``.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        lora: Lora,
        *,
        adapters: Sequence[str],
        heads: Sequence[str] = (),
        trainable: Sequence[str] = (),
        shared: Mapping[str, str] | None = None,
        depths: Mapping[str, int] | None = None,
        pooled: Sequence[str] = (),
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        layers = int(base.config.get_text_config().num_hidden_layers)
        self.depths = {name: depth for name, depth in (depths or {}).items() if depth < layers}
        times = dict.fromkeys(adapters, 1) | dict(ranks or {})
        configs = {n: lora_config(lora, base, depth=self.depths.get(n), times=times[n]) for n in adapters}
        # autocast keeps adapters in float32 over a half-precision base
        self.model = get_peft_model(
            base, configs[adapters[0]], adapter_name=adapters[0], autocast_adapter_dtype=True
        )
        for name in adapters[1:]:
            self.model.add_adapter(name, configs[name], autocast_adapter_dtype=True)
        shape = base.config.get_text_config()
        width = int(getattr(shape, "word_embed_proj_dim", None) or shape.hidden_size)  # OPT-350m projects
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1, dtype=torch.float32) for name in heads})
        self.offsets = dict.fromkeys(heads, 0.0)  # added to a head's output; constants, not weights
        self.trainable, self.pooled = tuple(trainable), frozenset(pooled)
        self.shared = dict(shared or {})
        self.frozen_layers = 0 if lora.top_k is None else layers - lora.top_k
        self.no_trunk = ALL_ADAPTED  # why there is no trunk, where there is none
        self._layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self._folding = Folding(self.model)
        self._active: str | None = None
        self.activate(REFERENCE)
        self.eval()

    # ---------------------------------------------------------------- parts of the base

    @property
    def base(self) -> PreTrainedModel:
        """The causal language model inside peft."""
        return self.model.base_model.model  # type: ignore[return-value]

    @property
    def decoder(self) -> nn.Module:
        """The base without its vocabulary head."""
        return self.base.get_decoder()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def is_float32(self) -> bool:
        """Whether every weight of the base is float32, none quantized."""
        return all(parameter.dtype == torch.float32 for parameter in self.base.parameters())

    def activate(self, role: str) -> None:
        """Switch every LoRA layer to the adapter of a role, or all off.

        peft ties switching to ``requires_grad``; here what learns is fixed for the whole run instead, so
        that the backward pass of one role can run while another is switched on.
        """
        adapter = self.adapter_of(role)
        if (adapter or "none") == self._active:
            return
        for layer in self._layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter([adapter])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(f".{learns}." in name for learns in self.trainable))
        self._active = adapter or "none"

    def adapter_of(self, role: str) -> str | None:
        """The adapter that a role runs with; None = the base alone, as the reference without a copy."""
        adapter = self.shared.get(role, role)
        return None if adapter == REFERENCE and adapter not in self.model.peft_config else adapter

    @contextlib.contextmanager
    def folded(self, role: str) -> Iterator[None]:
        """Have a role's adapter folded into its weights, which must not change meanwhile
        (``rlhf.models.folding``).

        It changes how fast the role runs, not its outputs (to rounding); other roles run as ever.
        """
        adapter = self.adapter_of(role)
        with contextlib.nullcontext() if adapter is None else self._folding.folded(adapter):
            yield

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters and its head's, by their names in a saved adapter."""
        found: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            if "lora_" in name and f".{adapter}." in name:
                found[name.replace(f".{adapter}.", ".")] = parameter
        if adapter in self.heads:
            head: Any = self.heads[adapter]
            found[f"{HEAD}.weight"], found[f"{HEAD}.bias"] = head.weight, head.bias
        return found

    @torch.no_grad()
    def zero_heads(self) -> None:
        """Let every head's output be 0 until it has learned something (Ziegler 2019, official code)."""
        for parameter in self.heads.parameters():
            parameter.zero_()

    def copy_adapter(self, source: str, target: str) -> None:
        """Let one adapter start as an exact copy of another."""
        with torch.no_grad():
            for name, parameter in self.parameters_of(target).items():
                parameter.copy_(self.parameters_of(source)[name])

    def reference_hash(self) -> str:
        """SHA-256 of every frozen weight that the reference runs with, the base's and its adapter's."""
        digest = hashlib.sha256()
        own = f".{REFERENCE}."
        for name, parameter in sorted(self.model.named_parameters()):
            if "lora_" not in name or own in name:
                digest.update(name.encode())
                raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()

    def set_offset(self, adapter: str, offset: float) -> None:
        """Give a head a constant that does not learn, as Hugging Face's format cannot carry it."""
        self.offsets[adapter] = offset

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        role: str,
        ids_BT: Tensor,
        mask_BT: Tensor,
        hidden_BTD: Tensor | None = None,
        *,
        start: int | None = None,
        temperature: float = 1.0,
        targets_mask_BR: Tensor | None = None,
        bonus: bool = False,
        value: str | None = None,
        own_BT: Tensor | None = None,
    ) -> Any:
        """One pass of one role.

        Args:
            role: ``trunk``, ``policy``, ``reference``, or the name of an adapter with a head.
            ids_BT: left-padded prompts, then responses from column ``start``, then one closing column.
            mask_BT: True = a real token.
            hidden_BTD: the trunk's hidden states, where they have been computed.
            start: first response column; None reads a head at the last real token, or over ``own_BT``.
            temperature: divides the logits before the log-softmax.
            targets_mask_BR: True = a response token whose log-prob is wanted.
            bonus: let the entropies carry a gradient.
            value: a head that shares the role's adapter; its values come along as a third tensor.
            own_BT: True = a token of the response, its closing included, for a head that is ``pooled``.

        Returns:
            ``trunk``: hidden states [B, T, D]. ``policy``/``reference``: log-probs and entropies of the
            response tokens [B, R] each, 0 where the mask is False. A head: one score a row [B] without
            ``start``; with it the values before each response token [B, R].
        """
        if role == "trunk":
            if self._active in self.depths:  # such an adapter begins below
                self.activate(REFERENCE)
            return self._decode(ids_BT, mask_BT, part="trunk")
        self.activate(role)
        depth = self.depths.get(role)
        if depth is not None:
            hidden_BTD = None  # its adapter begins below the trunk's end
        part = "all" if hidden_BTD is None else "top"
        hidden_BTD = self._decode(ids_BT, mask_BT, part=part, hidden_BTD=hidden_BTD, depth=depth)
        if role in self.heads:
            if start is None and role in self.pooled:
                assert own_BT is not None, "a pooled head needs to know the response"
                scores_BT = self.heads[role](hidden_BTD.float()).squeeze(-1)
                return masked_mean(scores_BT, own_BT, dim=-1) + self.offsets[role]
            if start is None:
                rows = torch.arange(len(ids_BT), device=ids_BT.device)
                last_BD = hidden_BTD[rows, last_true_index(mask_BT)]
                return self.heads[role](last_BD.float()).squeeze(-1) + self.offsets[role]
            return self._values(role, hidden_BTD[:, start - 1 : -2])
        assert start is not None, "log-probs need the first response column"
        before_BRD = hidden_BTD[:, start - 1 : -2]
        both = token_log_probs(
            before_BRD,
            logits_head(self.base),
            ids_BT[:, start:-1],
            temperature=temperature,
            chunk=chunk_of(self.base.config.get_text_config().vocab_size),
            mask_BT=targets_mask_BR,
            differentiable_entropy=bonus,
        )
        return both if value is None else (*both, self._values(value, before_BRD))

    def _values(self, head: str, hidden_BRD: Tensor) -> Tensor:
        return self.heads[head](hidden_BRD.float()).squeeze(-1) + self.offsets[head]

    def drop_trunk(self, why: str) -> None:
        """Have every pass run through all layers; ``why`` stands in the lines about it."""
        if self.frozen_layers:
            self.frozen_layers, self.no_trunk = 0, why

    def trunk(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor | None:
        """Hidden states below the first adapted layer, or None where there is no such part."""
        if not self.frozen_layers:
            return None
        with torch.no_grad():
            return self(role="trunk", ids_BT=ids_BT, mask_BT=mask_BT)

    def _decode(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor,
        *,
        part: str,
        hidden_BTD: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        inputs: dict[str, Any] = (
            {"input_ids": ids_BT} if hidden_BTD is None else {"inputs_embeds": hidden_BTD}
        )
        with layers_of(self.decoder, part, self.frozen_layers, depth):
            inputs |= {"attention_mask": mask_BT.long(), "position_ids": positions_from_mask(mask_BT)}
            return self.decoder(**inputs, use_cache=False).last_hidden_state

    @torch.no_grad()
    def check_architecture(self) -> str | None:
        """Prove on a probe batch what this class takes for granted; return a warning or None.

        Trunk + top must equal the whole (else the cache is switched off, with a warning), and the logits
        must be the known map of the last hidden state.

        Raises:
            UserError: logits are not head(hidden).
        """
        self.activate(REFERENCE)
        check_head(self.base)
        if not self.frozen_layers:
            return None
        config = self.base.config.get_text_config()
        length = 8 + (attention_window(config) or 0)  # a row that no window holds
        ids = torch.arange(2 * length, device=self.device).reshape(2, length) % int(config.vocab_size)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, :3] = False
        hidden = self._decode(ids, mask, part="all")
        reason = "it differs from the whole"
        try:
            trunk = self._decode(ids, mask, part="trunk")
            if torch.allclose(self._decode(ids, mask, part="top", hidden_BTD=trunk), hidden, atol=1e-4):
                return None
        except (AttributeError, TypeError, RuntimeError, ValueError, LookupError) as error:
            if out_of_memory(error):
                raise
            reason = str(error)
        self.drop_trunk("this architecture cannot be split at the first adapted layer")
        return f"{self.no_trunk} ({reason}): no trunk cache"

    # ---------------------------------------------------------------- saving and loading

    def save_adapter(self, adapter: str, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write one adapter (and its head) in peft's format.

        Args:
            adapter: its name here; the files do not carry it.
            folder: where to.
            tensors: whole tensors by saved name, where the parameters are sharded.
        """
        tensors = tensors or {name: p.detach() for name, p in self.parameters_of(adapter).items()}
        write_adapter(folder, tensors, self.model.peft_config.get(adapter), self.base.name_or_path)

    def load_adapter(self, adapter: str, folder: Path) -> int:
        """Read one adapter (and its head); see :func:`rlhf.models.lora.read_adapter`."""
        return read_adapter(folder, self.parameters_of(adapter), adapter)
