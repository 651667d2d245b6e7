"""What a comparison of two runs shows: which components carry the change, by estimate and by exact patching.

Every figure is a share of the whole change, sum over rows of weight (m(source) - m(target)), and its interval
is that of a ratio of sums over groups of rows that belong together, such as a prompt's
(:func:`rlhf.stats.intervals.cluster_mean_interval`).

Shape suffixes: ``_N`` row, ``_U`` head or neuron, ``_T`` token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from policy.inside.attribution import Rule, attribute
from policy.inside.patching import Chosen, patched, record
from policy.inside.subject import Batch, Site, Subject
from rlhf.errors import UserError
from rlhf.recipe.evaluate import Inside
from rlhf.stats.intervals import cluster_mean_interval

SIZES = (1, 10, 100, 1000)  # components patched together
_STATES = 8  # layers whose whole output is patched, at most
_LEAST = 1e-4  # nats or points of score a row: a smaller change is rounding


class Change(NamedTuple):
    """Two runs over the same rows, of which the source's activations are patched into the target."""

    target: Subject
    source: Subject
    batches: Sequence[tuple[Batch, Batch]]
    """The target's rows and the source's, as many as are read at once."""
    weights_N: Tensor
    """How much each row counts."""
    groups_N: Sequence[int]
    """Which rows belong together."""
    what: str
    """For messages."""


class Examined(NamedTuple):
    """Estimates for all components, and how the whole change divides over rows."""

    whole_N: Tensor
    estimates: dict[Site, Tensor]
    """Weighted sums over the rows, [U] a place."""


def examine(
    change: Change, options: Inside, seed: int, *, whole: bool = True, tick: Callable[[], object] = int
) -> dict[str, Any]:
    """Estimate all, then patch exactly: the first components alone and together, random ones, layers.

    Args:
        change: the two runs.
        options: the recipe's section.
        seed: of the random components.
        whole: also patch each of the first components alone, and layers; else sets alone.
        tick: called after each run of some rows.

    Raises:
        UserError: both runs measure the same, so that there is nothing to explain.
    """
    found = _estimates(change, options.estimate, tick)
    total = float(found.whole_N.sum())
    if abs(total) <= _LEAST * float(change.weights_N.abs().sum()) or not np.isfinite(total):
        raise UserError(
            f"inside: {change.what}: both runs measure the same (a difference of {total:.2g} over "
            f"{len(found.whole_N)} rows), so there is no change whose parts could be found"
        )
    ranked = _ranked(found.estimates, total)
    generator = np.random.default_rng(seed)
    sizes = [size for size in SIZES if size < len(ranked)]
    nulls = {size: [_random(ranked, size, generator) for _ in range(options.random_sets)] for size in sizes}
    sites = change.target.writers
    states = np.unique(np.linspace(0, change.target.layers - 1, _STATES).round().astype(int)).tolist()
    alone = ranked[: options.top] if whole else []
    wanted: dict[Any, Chosen] = {
        **{("alone", n): chosen_of([unit]) for n, (unit, _) in enumerate(alone)},
        **{("first", size): chosen_of([unit for unit, _ in ranked[:size]]) for size in sizes},
        **{("random", size, n): chosen_of(units) for size in sizes for n, units in enumerate(nulls[size])},
        ("all", "heads"): dict.fromkeys(site for site in sites if site.kind == "heads"),
        ("all", "neurons"): dict.fromkeys(site for site in sites if site.kind == "neurons"),
        **{("state", layer): {Site(layer, "state"): None} for layer in (states if whole else ())},
    }
    effects = _exact(change, wanted, tick)

    def share(key: Any) -> dict[str, Any]:
        return share_of(effects[key], found.whole_N, change.groups_N)

    return {
        "what": change.what,
        "rows": len(found.whole_N),
        "change": total,
        "components": len(ranked),
        "alone": [
            {"name": site.name(unit), "estimate": estimate, "exact": share(("alone", n))}
            for n, ((site, unit), estimate) in enumerate(alone)
        ],
        "together": [
            {
                "size": size,
                "first": share(("first", size)),
                "random": [share(("random", size, n))["mean"] for n in range(options.random_sets)],
            }
            for size in sizes
        ],
        "all": {kind: share(("all", kind)) for kind in ("heads", "neurons")},
        "states": [[layer, share(("state", layer))] for layer in states] if whole else [],
        "by_layer": {
            kind: [float(found.estimates[s].sum()) / total for s in sites if s.kind == kind]
            for kind in ("heads", "neurons")
        },
    }


def runs_of(change: Change, options: Inside, *, whole: bool = True) -> int:
    """How often :func:`examine` calls ``tick``, at most."""
    target = change.target
    components = sum(target.units(site) for site in target.writers)
    sizes = sum(size < components for size in SIZES)
    alone = min(options.top, components) + min(_STATES, target.layers) if whole else 0
    return len(change.batches) * (3 + sizes * (1 + options.random_sets) + alone)


def _estimates(change: Change, rule: Rule, tick: Callable[[], object]) -> Examined:
    wholes, sums, first = [], dict[Site, Tensor](), 0
    for here, there in change.batches:
        source, target = record(change.source, there), record(change.target, here)
        weights = change.weights_N[first : first + len(here.ids_BT)].to(target.measured_B)
        wholes.append((weights * (source.measured_B - target.measured_B)).cpu())
        for site, effect in attribute(change.target, here, source, target, rule=rule).items():
            sums[site] = sums.get(site, 0) + (weights @ effect).cpu()
        first += len(here.ids_BT)
        tick()
    return Examined(torch.cat(wholes), sums)


def _exact(change: Change, wanted: dict[Any, Chosen], tick: Callable[[], object]) -> dict[Any, Tensor]:
    """Weighted changes of the rows, [N], by each of these patches."""
    parts: dict[Any, list[Tensor]] = {key: [] for key in wanted}
    first = 0
    for here, there in change.batches:
        source, own = record(change.source, there), record(change.target, here)
        own_B = own.measured_B
        weights = change.weights_N[first : first + len(own_B)].to(own_B)
        first += len(here.ids_BT)
        for key, chosen in wanted.items():
            patched_B = patched(change.target, here, source, chosen, own=own)
            parts[key].append((weights * (patched_B - own_B)).cpu())
            tick()
    return {key: torch.cat(found) for key, found in parts.items()}


def _ranked(estimates: dict[Site, Tensor], total: float) -> list[tuple[tuple[Site, int], float]]:
    """Heads and neurons by their estimated share of the whole change, the largest first; those of places that
    do not differ at all, as below the first adapted layer, are left out."""
    sites = [site for site in estimates if site.layer >= 0 and bool(estimates[site].any())]
    shares = torch.cat([estimates[site] for site in sites]) / total
    units = [(site, unit) for site in sites for unit in range(len(estimates[site]))]
    return [(units[i], float(shares[i])) for i in shares.argsort(descending=True, stable=True).tolist()]


def _random(
    ranked: Sequence[tuple[tuple[Site, int], float]], size: int, generator: np.random.Generator
) -> list[tuple[Site, int]]:
    """As many random heads and neurons as there are among the first ``size``."""
    found: list[tuple[Site, int]] = []
    for kind in ("heads", "neurons"):
        units = sorted(unit for unit, _ in ranked if unit[0].kind == kind)
        number = sum(unit[0].kind == kind for unit, _ in ranked[:size])
        found += [units[i] for i in generator.choice(len(units), number, replace=False)]
    return found


def chosen_of(units: Sequence[tuple[Site, int]]) -> dict[Site, Tensor]:
    """Numbers of some heads or neurons by their place."""
    found: dict[Site, list[int]] = {}
    for site, unit in units:
        found.setdefault(site, []).append(unit)
    return {site: torch.tensor(numbers) for site, numbers in found.items()}


def share_of(effect_N: Tensor, whole_N: Tensor, groups_N: Sequence[int]) -> dict[str, Any]:
    """The effect as a share of the whole change, with its interval over groups."""
    groups = np.unique(np.asarray(groups_N), return_inverse=True)[1]
    sums = [np.bincount(groups, weights=x.double().numpy()) for x in (effect_N, whole_N)]
    return cluster_mean_interval(*sums).as_dict()
