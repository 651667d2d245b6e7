"""The section on circuits of ``inside.md``, with its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from policy.inside.circuit.drawing import as_svg
from policy.inside.circuit.faithfulness import PERCENTS
from rlhf.markdown import share, table
from rlhf.runs.artifacts import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Figures = dict[str, Any]
_WHAT = (
    "An edge leads from what writes into the stream (embeddings, a head, an MLP) to what reads it (query, "
    "key or value of a head, an MLP, the output). The second of each pair is the run; an edge alone carries "
    "what the first writes. Shares are of the difference of scores. f: the first edges together carry the "
    "first of each pair, all others the second; CPR is the area under f, CMD that under |1 - f| (Mueller "
    "2025), and `random` is one random ranking of all edges.\n"
)


def section(found: Figures) -> list[str]:
    """Lines of the page."""
    if "skipped" in found:
        return [f"Not looked into: {found['skipped']}.\n"]
    lines = [f"{_WHAT}Edges are ranked by the size of their estimate, `{found['estimate']}`.\n"]
    for name, kind in found["kinds"].items():
        lines.append(f"### Circuit of {name}\n")
        if "skipped" in kind:
            lines.append(f"Not looked into: {kind['skipped']}.\n")
            continue
        alone = [
            [" -> ".join(row["edge"]), f"{100 * row['estimate']:+.1f}%", *share(row["exact"])]
            for row in kind["alone"]
        ]
        curves = [kind["curves"]["first"], kind["curves"]["random"]]
        rows = [
            [f"{percent:g}%", f"{size:,}", f"{first:.3f}", f"{random:.3f}"]
            for percent, size, first, random in zip(PERCENTS, kind["sizes"], *curves, strict=True)
        ]
        areas = [f"{kind['areas'][key][n]:.3f}" for n in (0, 1) for key in ("first", "random")]
        lines += [
            f"{kind['edges']:,} edges, scored on {kind['pairs']} pairs in {kind['seconds']:.0f} seconds; "
            f"mean difference {kind['change']:+.3f}.\n",
            table(["edge", "estimate", "exact, alone", "95% interval"], alone),
            table(["edges", "number", "f of the first", "f of random ones"], rows),
            f"CPR {areas[0]} (random {areas[1]}), CMD {areas[2]} (random {areas[3]}).\n",
            f"![circuit](circuit-{name}.svg) ![f](circuit-{name}.png)\n",
        ]
    return lines


def draw(found: Figures, folder: Path) -> None:
    """Write ``circuit-KIND.svg``, the first edges, and ``circuit-KIND.png``, f by the number of edges."""
    for name, kind in found.get("kinds", {}).items():
        if "skipped" in kind:
            continue
        title = f"{name}: the first {len(kind['drawn'])} of {kind['edges']:,} edges by estimate"
        write_atomically(folder / f"circuit-{name}.svg", as_svg(kind["drawn"], title, kind["grouped"]))
        figure, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
        for key, shares in kind["curves"].items():
            ax.plot(PERCENTS, shares, ".-", label=f"{key} edges")
        ax.axhline(1, color="black", linewidth=0.6)
        ax.set(xscale="log", xlabel="% of the edges", ylabel="f", title=f"{name}: faithfulness")
        ax.legend(fontsize=7)
        figure.savefig(folder / f"circuit-{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)
