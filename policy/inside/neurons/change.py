"""Which neurons a training moved on given tokens, and at which tokens of a text they are most active.

Shape suffixes: ``_B`` row, ``_T`` token of a row, ``_N`` token that counts, ``_U`` neuron of a place, ``_D``
hidden unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policy.inside.patching import hooked, stream
from policy.inside.subject import Batch, Site, Subject
from rlhf.models.masks import positions_from_mask, right_pad

LEAST_SPREAD = 0.01  # of the mean spread of the layer: a neuron that hardly varies is not divided by 0
Units = Mapping[Site, Tensor]


class Moved(NamedTuple):
    """Neurons of all layers on the same tokens of two models."""

    relative: dict[Site, Tensor]
    """[U] mean |activation after - before| over tokens, in standard deviations of the activation before."""
    tokens: int


class Peak(NamedTuple):
    """A token at which a neuron is active."""

    row: int
    column: int
    activation: float


@torch.no_grad()
def read(subject: Subject, batch: Batch, sites: Sequence[Site], where_BT: Tensor) -> dict[Site, Tensor]:
    """What stands at some places where the mask is True, row by row: inputs of output maps [N, U], or the
    states that layers give [N, D]; float32."""
    kept: dict[Site, Tensor] = {}

    def keep(site: Site) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            kept[site] = (inputs[0] if site.kind == "neurons" else stream(output))[where_BT].float()

        return hook

    with hooked({subject.sites[site]: keep(site) for site in sites}):
        last_states(subject, batch)
    return kept


@torch.no_grad()
def last_states(subject: Subject, batch: Batch) -> Tensor:
    """What the decoder gives to the unembedding, [B, T, D]."""
    subject.activate()
    found: Tensor = subject.decoder(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_BT.long(),
        position_ids=positions_from_mask(batch.mask_BT),
        use_cache=False,
    ).last_hidden_state
    return found


def relative_change(gap_U: Tensor, first_U: Tensor, second_U: Tensor, number: int) -> Tensor:
    """Mean |difference| in standard deviations of the activation before, [U].

    Args:
        gap_U: sum over tokens of |after - before|.
        first_U: sum of the activation before.
        second_U: sum of its square.
        number: of tokens.

    A deviation counts as at least a hundredth of the mean one of the layer.
    """
    spread_U = (second_U / number - (first_U / number).square()).clamp(min=0).sqrt()
    floor = LEAST_SPREAD * spread_U.mean()
    return gap_U / number / spread_U.clamp(min=max(float(floor), 1e-12))


def moved(
    after: Subject, before: Subject, batches: Sequence[Batch], tick: Callable[[], object] = int
) -> Moved:
    """How far each neuron moved, on the response tokens of these rows, read by both models alike."""
    sites = [site for site in before.writers if site.kind == "neurons"]
    sums: dict[Site, list[Tensor]] = {}
    number = 0
    for batch in batches:
        where_BT = responses_of(batch)
        number += int(where_BT.sum())
        there, here = read(after, batch, sites, where_BT), read(before, batch, sites, where_BT)
        for site in sites:
            own, gap = here[site].double(), (there[site].double() - here[site].double()).abs()
            parts = [gap.sum(0), own.sum(0), own.square().sum(0)]
            sums[site] = [a + b for a, b in zip(sums[site], parts, strict=True)] if site in sums else parts
        tick()
    relative = {s: relative_change(gap, own, square, number) for s, (gap, own, square) in sums.items()}
    return Moved({site: values.cpu() for site, values in relative.items()}, number)


def responses_of(batch: Batch) -> Tensor:
    """True = a response token that counts, [B, T]."""
    where_BT = batch.mask_BT.clone()
    where_BT[:, : batch.start] = False
    if batch.targets_BR is not None:
        last = batch.start + batch.targets_BR.shape[1]
        where_BT[:, batch.start : last] &= batch.targets_BR.to(where_BT.device)
        where_BT[:, last:] = False
    return where_BT


def peaks(
    subject: Subject,
    texts: Sequence[Sequence[int]],
    units: Units,
    size: int,
    pad_id: int,
    tick: Callable[[], object] = int,
) -> dict[Site, list[Tensor]]:
    """Activations of some neurons at every token of some texts, [T, U] a text, in float32 on the CPU.

    Args:
        subject: the model.
        texts: token ids.
        units: numbers of the neurons, by place.
        size: rows of one forward pass.
        pad_id: what fills shorter rows.
        tick: called after each pass.
    """
    found: dict[Site, list[Tensor]] = {site: [] for site in units}
    device = next(subject.decoder.parameters()).device
    for first in range(0, len(texts), size):
        rows = texts[first : first + size]
        ids_BT, mask_BT = (part.to(device) for part in right_pad(rows, pad_id))
        kept = read(subject, Batch(ids_BT, mask_BT), list(units), mask_BT)
        for site, numbers in units.items():
            chosen = kept[site][:, numbers.to(device)].cpu()
            found[site] += chosen.split([len(row) for row in rows])
        tick()
    return found


def highest(texts: Sequence[Sequence[int]], activations: Sequence[Tensor], number: int) -> list[Peak]:
    """The strongest activations of one neuron, at different tokens, in the direction of the strongest of all.

    texts: token ids; activations: [T] a text; number: of peaks, at most. The first token of a text has seen
    nothing but itself and is left out.
    """
    places = [(row, column) for row, text in enumerate(texts) for column in range(1, len(text))]
    if not places:
        return []
    all_N = torch.cat([values[1:] for values in activations])
    sign = 1.0 if float(all_N[all_N.abs().argmax()]) >= 0 else -1.0
    found: dict[int, Peak] = {}
    for n in (sign * all_N).argsort(descending=True, stable=True).tolist():
        row, column = places[n]
        if len(found) == number or sign * float(all_N[n]) <= 0:
            break
        found.setdefault(texts[row][column], Peak(row, column, float(all_N[n])))
    return list(found.values())
