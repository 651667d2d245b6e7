"""How much of a number a circuit carries on its own, as the MIB benchmark measures it.

Of the first k edges of a ranking, f(k) = (m(circuit) - m(none)) / (m(all) - m(none)): the circuit's edges
carry what the clean run writes, all others what the corrupted run wrote. CPR, the circuit performance ratio,
is the area under f over k, and CMD, the circuit-model distance, that under |1 - f|, by the trapezoid rule, k
as a share of all edges from 0.1% to 100% (Mueller 2025, arXiv 2504.13151).

Shape suffixes: ``_E`` edge, ``_N`` row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.inside.attribution import Rule
from policy.inside.circuit.edges import edge_scores
from policy.inside.circuit.wiring import Wiring
from policy.inside.effects import share_of
from policy.inside.subject import Batch
from rlhf.errors import UserError

PERCENTS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # of all edges
_ALONE, _DRAWN = 10, 40  # edges patched one by one; edges in the picture
_ROUNDING = 1e-2  # of the mean difference of a pair: what the whole graph may miss

Pairs = Sequence[tuple[Batch, Batch]]


def sizes(edges: int) -> list[int]:
    """How many edges the circuits have, each a part of all of them rounded down."""
    return [int(percent * edges / 100 + 1e-9) for percent in PERCENTS]


def areas(shares: Sequence[float]) -> tuple[float, float]:
    """CPR (higher is better) and CMD (lower is better) of f at :data:`PERCENTS`."""
    at, f = np.asarray(PERCENTS) / 100, np.asarray(shares)
    return float(np.trapezoid(f, at)), float(np.trapezoid(np.abs(1 - f), at))


def measured(
    wiring: Wiring, pairs: Pairs, replaced: Sequence[Tensor], tick: Callable[[], object] = int
) -> Tensor:
    """What the first side of the pairs measures with each of these sets of edges carrying what the second
    side's writers write, [sets, N]."""
    parts = []
    for batch, other in pairs:
        other_WBTD, found = wiring.written(other)[1], []
        for edges_E in replaced:
            found.append(wiring.rewired(batch, other_WBTD, edges_E))
            tick()
        parts.append(torch.stack(found).cpu())
    return torch.cat(parts, 1)


def curve(wiring: Wiring, pairs: Pairs, order_E: Tensor, tick: Callable[[], object] = int) -> list[float]:
    """f(k) of the first edges of an order, at :data:`PERCENTS`.

    pairs: the clean rows and the corrupted ones.
    """
    rank_E = order_E.argsort()
    circuits = [rank_E < size for size in (0, *sizes(wiring.edges))]
    found = measured(wiring, pairs, [~circuit for circuit in circuits], tick).double().sum(1)
    return ((found[1:] - found[0]) / (found[-1] - found[0])).tolist()


def find_circuit(
    wiring: Wiring,
    pairs: Pairs,
    *,
    rule: Rule,
    steps: int,
    seed: int,
    tick: Callable[[], object] = int,
) -> dict[str, Any]:
    """Score all edges, patch the first ones alone, and run circuits of the first edges and of random ones.

    Args:
        wiring: of the subject.
        pairs: the corrupted rows and the clean ones, as many as are read at once.
        rule: how the estimate is propagated back.
        steps: its gradients.
        seed: of the random ranking.
        tick: called after each run of some rows.

    Raises:
        UserError: both sides of the pairs measure the same, or edges are not all that leads to the number.
    """
    began = time.monotonic()
    rows, scores_E = sum(len(here.ids_BT) for here, _ in pairs), torch.zeros(wiring.edges)
    for here, there in pairs:
        weights_B = torch.ones(len(here.ids_BT), device=here.ids_BT.device)
        scores_E += edge_scores(wiring, here, there, weights_B, rule=rule, steps=steps).cpu()
        tick()
    seconds = time.monotonic() - began
    clean_N, corrupted_N = (
        torch.cat([wiring.subject.measure_plainly(pair[side]) for pair in pairs]).cpu() for side in (1, 0)
    )
    order_E = scores_E.abs().argsort(descending=True, stable=True)
    alone = order_E[:_ALONE].tolist()
    sets = [torch.ones(wiring.edges, dtype=torch.bool)]
    sets += [torch.arange(wiring.edges) == edge for edge in alone]
    effects = measured(wiring, pairs, sets, tick) - corrupted_N
    whole_N, total = clean_N - corrupted_N, float((clean_N - corrupted_N).sum())
    if not abs(total) > 1e-4 * rows:
        raise UserError(
            f"inside: a circuit of {rows} pairs whose measures do not differ ({total:.2g} in all)"
        )
    if float((effects[0] - whole_N).abs().max()) > _ROUNDING * abs(total) / rows:
        raise UserError(
            f"inside: what heads and MLPs of {type(wiring.subject.decoder).__name__} add is not all that "
            "reaches its number, so it has no circuit of such edges: set inside.edges=none"
        )
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(wiring.edges))
    swapped = [(clean, corrupted) for corrupted, clean in pairs]
    curves = {
        "first": curve(wiring, swapped, order_E, tick),
        "random": curve(wiring, swapped, shuffled, tick),
    }
    return {
        "pairs": rows,
        "change": total / rows,
        "edges": wiring.edges,
        "seconds": seconds,
        "grouped": wiring.grouped,
        "sizes": sizes(wiring.edges),
        "alone": [
            {"edge": wiring.ends(edge), "estimate": float(scores_E[edge]) / total,
             "exact": share_of(effects[n], whole_N, range(rows))}
            for n, edge in enumerate(alone, 1)
        ],
        "drawn": [[*wiring.ends(e), float(scores_E[e]) / total] for e in order_E[:_DRAWN].tolist()],
        "curves": curves,
        "areas": {name: areas(f) for name, f in curves.items()},
    }  # fmt: skip


def runs_of(pairs: Pairs, edges: int) -> int:
    """How often :func:`find_circuit` calls ``tick``."""
    return len(pairs) * (1 + 1 + min(_ALONE, edges) + 2 * (1 + len(PERCENTS)))
