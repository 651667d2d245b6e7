"""Who writes into the residual stream and who reads it, and runs in which each reader has its own input.

Writers: the embeddings, every head, every MLP as a whole. Readers: the query, key and value of every head (of
every group where keys are grouped), every MLP, and the last norm with what stands behind it. An edge leads
from a writer to a reader that comes after it. Writers are numbered in the order in which they write, so that
a reader's edges come from the first ``before`` of them; edges are numbered reader by reader.

Shape suffixes: ``_B`` row, ``_T`` token, ``_D`` hidden unit, ``_W`` writer, ``_R`` reader of a block, ``_E``
edge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from policy.inside.patching import stream
from policy.inside.subject import EMBEDDINGS, Batch, Site, Subject, part_of

_NORMS = (("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"))
_LAST = ("norm", "final_layer_norm", "ln_f")
_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FUSED = ("attn.c_attn", "attention.query_key_value")  # GPT-2: all q, k, v in turn; GPT-NeoX: head by head


class Block(NamedTuple):
    """Readers that share a norm and a map."""

    layer: int
    names: tuple[str, ...]
    norm: nn.Module
    map: nn.Module | None
    """Gives each reader as many of its columns in turn; None = the norm has one reader alone."""
    before: int
    """How many writers come before."""

    def read(self, inputs_RBTD: Tensor) -> Tensor:
        """What the map gives where each reader has its own input, [B, T, columns]."""
        assert self.map is not None
        found: Tensor = self.map.forward(self.norm(inputs_RBTD))
        columns = found.unflatten(-1, (len(self.names), -1)).diagonal(dim1=0, dim2=3)
        return columns.transpose(-1, -2).flatten(-2)


class Wiring:
    """The graph of a subject.

    Raises:
        UserError: norms or the maps of queries, keys and values have names that are not known.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        decoder, config = subject.decoder, subject.decoder.config.get_text_config()
        self.heads = subject.units(Site(0, "heads"))
        groups = getattr(config, "num_key_value_heads", None) or self.heads
        self.grouped = self.heads // groups  # query heads of a key and value
        self.writers, self.blocks = ["embeddings"], list[Block]()
        for n in range(subject.layers):
            layer = subject.sites[Site(n, "state")]
            norm, second = (part_of(decoder, layer, names) for names in _NORMS)
            before = len(self.writers)
            for names, module in _maps(decoder, layer, self.heads, groups):
                self.blocks.append(Block(n, tuple(f"L{n}.{name}" for name in names), norm, module, before))
            self.writers += [f"L{n}.H{head}" for head in range(self.heads)]
            parallel = getattr(config, "use_parallel_residual", False)
            read = before if parallel else len(self.writers)
            self.blocks.append(Block(n, (f"L{n}.MLP",), second, None, read))
            self.writers.append(f"L{n}.MLP")
        last = part_of(decoder, decoder, _LAST)
        self.blocks.append(Block(subject.layers, ("output",), last, None, len(self.writers)))
        self.sizes = [len(block.names) * block.before for block in self.blocks]

    @property
    def edges(self) -> int:
        """How many there are."""
        return sum(self.sizes)

    def split(self, values_E: Tensor) -> list[Tensor]:
        """Values of the edges by block, [R, before] each."""
        parts = values_E.split(self.sizes)
        return [part.view(-1, block.before) for block, part in zip(self.blocks, parts, strict=True)]

    def ends(self, edge: int) -> tuple[str, str]:
        """Names of an edge's writer and reader."""
        for block, size in zip(self.blocks, self.sizes, strict=True):
            if edge < size:
                return self.writers[edge % block.before], block.names[edge // block.before]
            edge -= size
        raise IndexError(edge)

    @torch.no_grad()
    def written(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What a plain run measures, [B], and what every writer adds to the stream, [W, B, T, D]."""
        found = batch.ids_BT.new_zeros((len(self.writers), *batch.ids_BT.shape, self._width()), dtype=_F)
        with contextlib.ExitStack() as hooks:
            self._watch(hooks, lambda first, new: found[first : first + len(new)].copy_(new))
            return self.subject.measure(batch).float(), found

    @torch.no_grad()
    def rewired(self, batch: Batch, other_WBTD: Tensor, replaced_E: Tensor) -> Tensor:
        """What a run measures where these edges, and no others, carry what another run's writers wrote.

        The edges that are not replaced carry what this run's writers write, given their own readers' inputs:
        path patching of all edges in one pass. No edge: the plain run; all edges: the other run.

        Args:
            batch: the rows of this run.
            other_WBTD: what the other run's writers add.
            replaced_E: True = replaced.

        Returns:
            [B], float32.
        """
        gaps_WBTD = torch.zeros_like(other_WBTD)
        inputs: dict[nn.Module, Tensor] = {}

        def own(block: Block, chosen_RW: Tensor, x_BTD: Tensor) -> Tensor:
            change = chosen_RW.to(_F) @ gaps_WBTD[: block.before].flatten(1)
            return x_BTD + change.view(-1, *x_BTD.shape).to(x_BTD.dtype)

        def note(first: int, new: Tensor) -> None:
            gaps_WBTD[first : first + len(new)] = other_WBTD[first : first + len(new)] - new

        def hook_single(block: Block, chosen_RW: Tensor) -> Callable[..., Any]:
            return lambda _module, x: (own(block, chosen_RW, x[0])[0], *x[1:])

        def hook_map(block: Block, chosen_RW: Tensor) -> Callable[..., Any]:
            return lambda *_: block.read(own(block, chosen_RW, inputs[block.norm]))

        with contextlib.ExitStack() as hooks:
            self._watch(hooks, note)
            for block, chosen_RW in zip(self.blocks, self.split(replaced_E), strict=True):
                if not chosen_RW.any():
                    continue
                if block.map is None:
                    hooks.enter_context(block.norm.register_forward_pre_hook(hook_single(block, chosen_RW)))
                    continue
                hooks.enter_context(block.norm.register_forward_pre_hook(keep_first(inputs)))
                hooks.enter_context(block.map.register_forward_hook(hook_map(block, chosen_RW)))
            return self.subject.measure(batch).float()

    def _width(self) -> int:
        return int(next(iter(self.subject.maps.values())).shape[1])

    def _watch(self, hooks: contextlib.ExitStack, note: Callable[[int, Tensor], object]) -> None:
        """Have ``note`` called with each writer's number and what it and the next ones add, [W, B, T, D]."""
        subject = self.subject

        def hook(site: Site) -> Callable[..., None]:
            first = 0 if site == EMBEDDINGS else 1 + site.layer * (self.heads + 1)

            def heads(_module: nn.Module, inputs: Any, _output: Any) -> None:
                rows = subject.maps[site].unflatten(0, (self.heads, -1))
                parts = inputs[0].float().unflatten(-1, (self.heads, -1))
                note(first, torch.einsum("bthi,hid->hbtd", parts, rows))

            def whole(_module: nn.Module, _inputs: Any, output: Any) -> None:
                note(first + self.heads * (site.layer >= 0), stream(output).float()[None])

            return heads if site.kind == "heads" else whole

        for site in (EMBEDDINGS, *subject.writers):
            hooks.enter_context(subject.sites[site].register_forward_hook(hook(site)))


_F = torch.float32


def keep_first(inputs: dict[nn.Module, Tensor]) -> Callable[..., None]:
    """A hook that keeps a module's first input of a run."""

    def hook(module: nn.Module, given: Sequence[Any]) -> None:
        inputs.setdefault(module, given[0].detach())

    return hook


def _maps(decoder: Any, layer: nn.Module, heads: int, groups: int) -> list[tuple[list[str], nn.Module]]:
    """The maps to queries, keys and values of a layer, with their readers' names in the order of columns."""
    if hasattr(layer, "self_attn"):
        counts = zip("QKV", (heads, groups, groups), _SPLIT, strict=True)
        return [([f"{x}{n}" for n in range(units)], part_of(decoder, layer, (name,)))
                for x, units, name in counts]  # fmt: skip
    fused = part_of(decoder, layer, _FUSED)
    by_head = hasattr(layer, "attention")
    names = [(x, n) for x in "QKV" for n in range(heads)]
    return [([f"{x}{n}" for x, n in (sorted(names, key=lambda name: name[1]) if by_head else names)], fused)]
