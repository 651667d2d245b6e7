"""The plots of the study."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.engine.ladder import matrix_weights
from studies.engine.plots import level, line, panels
from studies.engine.results import Results
from studies.engine.seeds import SeedMean, over_seeds
from studies.preference.plan import ARMS, TARGETS
from studies.preference.report import PLOTS
from studies.preference.tables import accuracy_of, best_imitation, transfer_credits, versus_credits

CALLED = {"none": "no PMP", "imitation": "control", "ranked": "ranked PMP", "binary": "binary PMP"}


def canvases(results: Results) -> dict[str, Any]:
    """Every plot by its file name."""
    drawn = {1: versus, 3: transfer, 11: calibration, 12: sets}
    return {PLOTS[number][0]: draw(results) for number, draw in drawn.items()}


def versus(results: Results) -> Any:
    """Claims 1 and 2: accuracy against N, a panel for ranked and one for binary pairs."""
    canvas, axes = panels(1, 2, width=4.5, shared=True)
    sizes = results.values("versus", "layers")
    x = [matrix_weights(layers) for layers in sizes]
    for ax, data in zip(axes[0], ("ranked", "binary"), strict=True):
        for label, arm, score in (
            ("preference model", "pm", "score"),
            ("imitation", "il", None),
            ("imitation less language model", "il", "sum less language model"),
        ):
            found = [
                accuracy_of(versus_credits(results, data, n, arm, score or best_imitation(results, data, n)))
                for n in sizes
            ]
            line(ax, x, found, label)
        ax.set(xscale="log", xlabel="N, weights of the layers", title=f"{data} pairs")
    axes[0][0].set_ylabel("held-out pairs right")
    axes[0][0].legend(fontsize=8)
    return canvas


def transfer(results: Results) -> Any:
    """Claims 3 and 4: accuracy against the number of finetuning pairs, a row a size, a column a target."""
    sizes = results.values("finetune", "layers")
    canvas, axes = panels(len(sizes), len(TARGETS), width=4, height=3.4, shared=True)
    for row, layers in zip(axes, sizes, strict=True):
        for ax, target in zip(row, TARGETS, strict=True):
            tried = results.values("finetune", "pairs", target=target)
            for arm in ARMS:
                found = [accuracy_of(transfer_credits(results, layers, target, arm, n)) for n in tried]
                line(ax, [max(n, 20) for n in tried], found, CALLED[arm])
            title = f"{target} target, L = {layers}"
            ax.set(xscale="log", title=title, xlabel="finetuning pairs (left end: none)")
            level(ax, 0.5)
        row[0].set_ylabel("held-out pairs right")
    axes[0][0].legend(fontsize=8)
    return canvas


def calibration(results: Results) -> Any:
    """Claim 11: reliability, observed against promised agreement, all seeds together."""
    sizes = results.values("calibration", "layers")
    canvas, axes = panels(1, len(sizes), width=4.5, height=4)
    for ax, layers in zip(axes[0], sizes, strict=True):
        ax.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.7)
        for epochs in results.values("calibration", "epochs"):
            found = results.by_seed("calibration", layers=layers, epochs=epochs)
            bins = zip(*(r["model"]["bins"] for r in found), strict=True)
            points = [_pooled(same) for same in bins if any(b["pairs"] for b in same)]
            passes = "1 pass" if epochs == 1 else f"{epochs} passes"
            ax.plot(*zip(*points, strict=True), marker="o", label=passes)
        ax.set(xlabel="promised, sigmoid of the gap", title=f"L = {layers}")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("observed agreement")
    return canvas


def sets(results: Results) -> Any:
    """Claim 12: held-out loss over the pass, mean over seeds."""
    sizes = results.values("sets", "layers")
    canvas, axes = panels(1, len(sizes), width=4.5)
    for ax, layers in zip(axes[0], sizes, strict=True):
        for arm in ("grouped", "shuffled"):
            found = results.by_seed("sets", layers=layers, arm=arm)
            seen = [point["seen"] for point in found[0]["curve"]]
            losses = np.array([[point["loss"] for point in r["curve"]] for r in found])
            line(ax, seen, [over_seeds([SeedMean(x, 0.0) for x in column]) for column in losses.T], arm)
        level(ax, float(np.mean([r["known_score_loss"] for r in found])), label="known score")
        ax.set(xlabel="share of the comparisons seen", title=f"L = {layers}")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("held-out loss")
    return canvas


def _pooled(same: tuple[dict[str, Any], ...]) -> tuple[float, float]:
    """Promised and observed agreement of one bin of several seeds."""
    filled = [b for b in same if b["pairs"]]
    promised, observed = (
        np.average([b[k] for b in filled], weights=[b["pairs"] for b in filled])
        for k in ("promised", "observed")
    )
    return float(promised), float(observed)
