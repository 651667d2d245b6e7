"""Activation patching: some components of one run get what they had in another, position by position.

The source and the target run may differ in the tokens, or in the model: then a component's contribution is
its source's activation times its source's output map, so that a difference in that map counts as the
component's own. The effect of a patch is (m(target with it) - m(target)) / (m(source) - m(target)): 0 where
nothing is patched, and 1 where everything is, as long as the last norm and the head are the same.
(Vig 2020, arXiv 2004.12265; Heimersheim and Nanda 2024, arXiv 2404.15255.)

Shape suffixes: ``_B`` row, ``_T`` token, ``_D`` hidden unit, ``_I`` input of an output map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from policy.inside.subject import Batch, Site, Subject

Chosen = Mapping[Site, Tensor | None]
"""What is patched: at each place the numbers of heads or neurons; None = the whole place."""
Hook = Callable[[nn.Module, Any, Any], Any]


class Recording(NamedTuple):
    """A run: what its rows measured, and what stood at every place."""

    measured_B: Tensor
    kept: dict[Site, Tensor]
    """Inputs of the output maps [B, T, I]; outputs of the embeddings and of layers [B, T, D]."""
    maps: dict[Site, Tensor]
    """The subject's output maps, [I, D]."""

    def resampled(self, rows_B: Tensor) -> Recording:
        """The run with the activations of other rows, for resample ablation."""
        return self._replace(kept={site: kept[rows_B] for site, kept in self.kept.items()})

    def averaged(self, mask_BT: Tensor) -> Recording:
        """The run with every activation at its mean over the real tokens, for mean ablation."""
        kept = {site: x[mask_BT].mean(0).expand_as(x) for site, x in self.kept.items()}
        return self._replace(kept=kept)


@contextlib.contextmanager
def hooked(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Have forward hooks on these modules for a while."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream(output: Any) -> Tensor:
    """The hidden states of a module's output, where some families give a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@torch.no_grad()
def record(subject: Subject, batch: Batch) -> Recording:
    """Run the rows and keep what stands at every place."""
    kept: dict[Site, Tensor] = {}
    maps = subject.maps

    def keep(site: Site) -> Hook:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            kept[site] = (inputs[0] if site in maps else stream(output)).float()

        return hook

    with hooked({module: keep(site) for site, module in subject.sites.items()}):
        measured_B = subject.measure(batch)
    return Recording(measured_B.float(), kept, maps)


@torch.no_grad()
def patched(
    subject: Subject,
    batch: Batch,
    source: Recording,
    chosen: Chosen,
    where_BT: Tensor | None = None,
    own: Recording | None = None,
) -> Tensor:
    """What the subject measures with some places as they were in the source, [B].

    where_BT: True = a position that is patched; None = all of them. own: the subject's run of the batch, from
    which the layers below the first patch are taken, where it is given.
    """
    maps = subject.maps
    below = min((site.layer for site in chosen), default=0)

    def patch(site: Site, units: Tensor | None) -> Hook:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> Any:
            out, kept = stream(output), source.kept[site]
            if site not in maps:
                new = kept.to(out.dtype)
            else:
                at = slice(None) if units is None else subject.columns(site, units)
                change = kept[..., at] @ source.maps[site][at] - inputs[0][..., at].float() @ maps[site][at]
                new = out + change.to(out.dtype)
            if where_BT is not None:
                new = torch.where(where_BT[..., None], new, out)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    with (
        hooked({subject.sites[site]: patch(site, units) for site, units in chosen.items()}),
        _done_below(subject, below, own) if own and below > 0 else contextlib.nullcontext(),
    ):
        return subject.measure(batch).float()


@contextlib.contextmanager
def _done_below(subject: Subject, layer: int, own: Recording) -> Iterator[None]:
    """Have the layers below one give what the last of them gave in a run of the same rows."""
    below = [subject.sites[Site(number, "state")] for number in range(layer)]
    state = own.kept[Site(layer - 1, "state")]
    try:
        for module in below:
            module.__dict__["forward"] = lambda *_, **__: state
        yield
    finally:
        for module in below:
            module.__dict__.pop("forward", None)
