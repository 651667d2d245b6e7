"""One frozen base, many named LoRA adapters, a few scalar heads.

With ``reward/model.py`` (the saved format) the only file that knows peft.

Roles: ``policy``, ``value`` and ``reward`` are adapters on the one base; ``reference`` is the base with every
adapter switched off. All roles go through :meth:`Backbone.forward`, so that one DeepSpeed engine can wrap it.

Where only the top layers are adapted (``lora.layers: top_k``), the layers below are the same for every role
and every pass: :meth:`Backbone.trunk` computes their hidden states once, and ``forward`` starts from them.

Shape suffixes: ``_B`` sequence, ``_T`` token, ``_D`` hidden unit, ``_R`` response token.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.artifacts import write_atomically
from rlhf.errors import UserError
from rlhf.schema import Lora
from rlhf.sequences import chosen_log_probs, last_true_index, positions_from_mask

REFERENCE = "reference"  # the role of the base without adapters
WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.score"  # where Hugging Face's sequence classifier keeps its head, under peft
_ADAPTED = "base_model.model."
_CHUNK = 2048  # positions whose logits are in memory at once


def lora_config(lora: Lora, base: PreTrainedModel, task: str = "CAUSAL_LM", **options: Any) -> LoraConfig:
    """peft's configuration of one adapter.

    Args:
        lora: the recipe's section.
        base: the model to be adapted.
        task: peft's task type.
        options: further fields of peft's configuration.

    Raises:
        UserError: ``top_k`` asks for more layers than there are, or no module has the name of a target.
    """
    k, layers = lora.top_k, int(base.config.get_text_config().num_hidden_layers)
    # every linear map inside the layers, by its last name: peft cannot combine its `all-linear` with layers
    linear = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }
    targets = sorted(linear) if lora.targets == "all-linear" else list(lora.targets)
    unknown = sorted(set(targets) - linear)
    if unknown or not targets:
        raise UserError(
            f"lora.targets: {unknown} are no linear modules of {base.name_or_path}; "
            f"it has {', '.join(sorted(linear))}"
        )
    if k is not None and k > layers:
        raise UserError(f"lora.layers: top_{k} of a model with {layers} layers; use `all` or a smaller k")
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets,
        layers_to_transform=None if k is None else list(range(layers - k, layers)),
        task_type=task,
        **options,
    )


@contextlib.contextmanager
def layers_of(decoder: Any, part: str, cut: int) -> Iterator[None]:
    """Let a decoder consist of its layers below ``cut`` (``trunk``), from there (``top``), or ``all``.

    The decoder's own forward then builds masks and positions, whatever the architecture.
    """
    if part == "all":
        yield
        return
    layers, norm = decoder.layers, decoder.norm
    try:
        decoder.layers = layers[:cut] if part == "trunk" else layers[cut:]
        if part == "trunk":
            decoder.norm = nn.Identity()
        yield
    finally:
        decoder.layers, decoder.norm = layers, norm


class Backbone(nn.Module):
    """The base with its adapters and heads.

    Args:
        base: a causal language model.
        lora: shape of every adapter.
        adapters: names of the adapters; each starts as no change (B = 0).
        heads: names of the adapters that carry a scalar head with bias.
        trainable: names of the adapters that learn; the others stay frozen.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        lora: Lora,
        *,
        adapters: Sequence[str],
        heads: Sequence[str] = (),
        trainable: Sequence[str] = (),
    ) -> None:
        super().__init__()
        layers = int(base.config.get_text_config().num_hidden_layers)
        config = lora_config(lora, base)
        # autocast keeps adapters in float32 over a half-precision base
        self.model = get_peft_model(base, config, adapter_name=adapters[0], autocast_adapter_dtype=True)
        for name in adapters[1:]:
            self.model.add_adapter(name, config, autocast_adapter_dtype=True)
        width = int(base.config.get_text_config().hidden_size)
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1, dtype=torch.float32) for name in heads})
        self.offsets = dict.fromkeys(heads, 0.0)  # added to what a head says; constants, not weights
        self.trainable = tuple(trainable)
        self.frozen_layers = 0 if lora.top_k is None else layers - lora.top_k
        self._layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
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

    def activate(self, role: str) -> None:
        """Switch every LoRA layer to one adapter, or all off for the reference.

        peft ties switching to ``requires_grad``; here what learns is fixed for the whole run instead, so
        that the backward pass of one role can run while another is switched on.
        """
        if role == self._active:
            return
        for layer in self._layers:
            if role == REFERENCE:
                layer.enable_adapters(False)
            else:
                layer.enable_adapters(True)
                layer.set_adapter([role])
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(f".{learns}." in name for learns in self.trainable))
        self._active = role

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
        """Let every head say 0 until it has learned something (Ziegler 2019, official code)."""
        for parameter in self.heads.parameters():
            parameter.zero_()

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
    ) -> Any:
        """One pass of one role.

        Args:
            role: ``trunk``, ``policy``, ``reference``, or the name of an adapter with a head.
            ids_BT: left-padded prompts, then responses from column ``start``, then one closing column.
            mask_BT: True = a real token.
            hidden_BTD: the trunk's hidden states, where they have been computed.
            start: first response column; None reads a head at the last real token.
            temperature: divides the logits before the log-softmax.
            targets_mask_BR: True = a response token whose log-prob is wanted.

        Returns:
            ``trunk``: hidden states [B, T, D]. ``policy``/``reference``: log-probs and entropies of the
            response tokens [B, R] each, 0 where the mask is False. A head: one score a row [B] without
            ``start``; with it the values before each response token [B, R].
        """
        if role == "trunk":
            return self._decode(ids_BT, mask_BT, part="trunk")
        self.activate(role)
        part = "all" if hidden_BTD is None else "top"
        hidden_BTD = self._decode(ids_BT, mask_BT, part=part, hidden_BTD=hidden_BTD)
        if role in self.heads:
            if start is None:
                rows = torch.arange(len(ids_BT), device=ids_BT.device)
                last_BD = hidden_BTD[rows, last_true_index(mask_BT)]
                return self.heads[role](last_BD.float()).squeeze(-1) + self.offsets[role]
            return self.heads[role](hidden_BTD[:, start - 1 : -2].float()).squeeze(-1) + self.offsets[role]
        assert start is not None, "log-probs need the first response column"
        return chosen_log_probs(
            hidden_BTD[:, start - 1 : -2],
            self.base.get_output_embeddings(),
            ids_BT[:, start:-1],
            temperature=temperature,
            chunk=_CHUNK,
            mask_BT=targets_mask_BR,
        )

    def trunk(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor | None:
        """Hidden states below the first adapted layer, or None where there is no such part."""
        if not self.frozen_layers:
            return None
        with torch.no_grad():
            return self(role="trunk", ids_BT=ids_BT, mask_BT=mask_BT)

    def _decode(
        self, ids_BT: Tensor, mask_BT: Tensor, *, part: str, hidden_BTD: Tensor | None = None
    ) -> Tensor:
        inputs: dict[str, Any] = (
            {"input_ids": ids_BT} if hidden_BTD is None else {"inputs_embeds": hidden_BTD}
        )
        with layers_of(self.decoder, part, self.frozen_layers):
            return self.decoder(
                **inputs,
                attention_mask=mask_BT.long(),
                position_ids=positions_from_mask(mask_BT),
                use_cache=False,
            ).last_hidden_state

    @torch.no_grad()
    def check_architecture(self) -> str | None:
        """Prove on a probe batch what this class takes for granted; return a warning or None.

        Trunk + top must equal the whole (else the cache is switched off, with a warning), and the
        vocabulary head must be a plain map of the last hidden state.

        Raises:
            UserError: logits are not head(hidden), as with soft-capped or scaled logits.
        """
        vocabulary = int(self.base.config.get_text_config().vocab_size)
        ids = torch.arange(2 * 8, device=self.device).reshape(2, 8) % vocabulary
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, :3] = False
        self.activate(REFERENCE)
        hidden = self._decode(ids, mask, part="all")
        logits = self.base(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions_from_mask(mask), use_cache=False
        ).logits
        if not torch.allclose(self.base.get_output_embeddings()(hidden)[mask], logits[mask], atol=1e-3):
            raise UserError(
                "model.path: this architecture changes its logits after the vocabulary head, "
                "which the log-probs here do not know; use another base model"
            )
        if self.frozen_layers:
            reason = "it differs from the whole"
            try:
                trunk = self._decode(ids, mask, part="trunk")
                if torch.allclose(self._decode(ids, mask, part="top", hidden_BTD=trunk), hidden, atol=1e-4):
                    return None
            except (AttributeError, TypeError, RuntimeError) as error:
                reason = str(error)
            self.frozen_layers = 0
            return f"this architecture cannot be split at the first adapted layer ({reason}): no trunk cache"
        return None

    # ---------------------------------------------------------------- saving and loading

    def save_adapter(self, adapter: str, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write one adapter (and its head) in peft's format.

        Args:
            adapter: its name here; the files do not carry it.
            folder: where to.
            tensors: whole tensors by saved name, where the parameters are sharded.
        """
        tensors = tensors or {name: p.detach() for name, p in self.parameters_of(adapter).items()}
        whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
        write_atomically(folder / WEIGHTS, save(whole, metadata={"format": "pt"}))
        config = self.model.peft_config[adapter].to_dict()
        config["base_model_name_or_path"] = self.base.name_or_path
        config["inference_mode"] = True
        for key, value in config.items():
            if isinstance(value, set):
                config[key] = sorted(value)
        write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, default=str) + "\n")

    @torch.no_grad()
    def load_adapter(self, adapter: str, folder: Path) -> int:
        """Read one adapter (and its head) written in peft's format; every tensor must find its place.

        Returns:
            Number of tensors read.

        Raises:
            UserError: a tensor is missing, superfluous or of another shape, or nothing was read: silently
                keeping a fresh adapter or a fresh head is how reward models get lost.
        """
        file = folder / WEIGHTS
        if not file.is_file():
            raise UserError(f"{file}: no such adapter; check the folder")
        saved = load_file(file)
        expected = self.parameters_of(adapter)
        bias = f"{HEAD}.bias"
        if bias in expected and bias not in saved:  # Hugging Face's head has none
            saved[bias] = torch.zeros_like(expected[bias])
        missing = sorted(set(expected) - set(saved))
        surplus = sorted(set(saved) - set(expected) - ({f"{HEAD}.weight", bias}))
        if missing or surplus:
            what = f"{missing[0]} is missing" if missing else f"{surplus[0]} has no place"
            raise UserError(
                f"{file}: does not fit the `{adapter}` adapter ({what}; {len(missing)} missing, "
                f"{len(surplus)} superfluous): it was made with other lora settings or another base"
            )
        for name, parameter in expected.items():
            if parameter.shape != saved[name].shape:
                raise UserError(
                    f"{file}: {name} is {tuple(saved[name].shape)}, here {tuple(parameter.shape)}: "
                    "it was made with other lora settings or another base"
                )
            parameter.copy_(saved[name])
        return len(expected)
