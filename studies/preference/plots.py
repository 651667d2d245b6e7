"""The plots of the study; the only file that knows matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from rlhf.stats.intervals import Estimate
from studies.preference.ladder import matrix_weights
from studies.preference.measure import SeedMean, over_seeds
from studies.preference.plan import ARMS
from studies.preference.results import (
    Results,
    accuracy,
    best_imitation,
    transfer_credits,
    transfer_pairs,
    versus_credits,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CALLED = {"none": "no PMP", "imitation": "control", "ranked": "ranked PMP", "binary": "binary PMP"}


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Write every plot; returns the files."""
    plots: dict[str, Callable[[Results], Any]] = {
        "versus.png": versus,
        "transfer.png": transfer,
        "calibration.png": calibration,
        "sets.png": sets,
    }
    files = []
    for name, plot in plots.items():
        figure = plot(results)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
        plt.close(figure)
        files.append(folder / name)
    return files


def versus(results: Results) -> Any:
    """Claims 1 and 2: accuracy against N, a panel for ranked and one for binary pairs."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    sizes = results.values("versus", "layers")
    x = [matrix_weights(layers) for layers in sizes]
    for ax, data in zip(axes, ("ranked", "binary"), strict=True):
        curves = {
            "preference model": [versus_credits(results, data, n, "pm", "score") for n in sizes],
            "imitation": [
                versus_credits(results, data, n, "il", best_imitation(results, data, n)) for n in sizes
            ],
            "imitation less language model": [
                versus_credits(results, data, n, "il", "sum less language model") for n in sizes
            ],
        }
        for label, credits in curves.items():
            _line(ax, x, [accuracy(c) for c in credits], label)
        ax.set(xscale="log", xlabel="N, weights of the layers", title=f"{data} pairs")
    axes[0].set_ylabel("held-out pairs right")
    axes[0].legend(fontsize=8)
    return figure


def transfer(results: Results) -> Any:
    """Claims 3 and 4: accuracy against the number of finetuning pairs, a row a size, a column a target."""
    sizes = results.values("finetune", "layers")
    targets = ("shifted", "conflicting", "agreeing")
    figure, axes = plt.subplots(len(sizes), 3, figsize=(12, 3.4 * len(sizes)), sharey=True, squeeze=False)
    for row, layers in zip(axes, sizes, strict=True):
        for ax, target in zip(row, targets, strict=True):
            tried = transfer_pairs(results, target)
            for arm in ARMS:
                found = [accuracy(transfer_credits(results, layers, target, arm, n)) for n in tried]
                _line(ax, [max(n, 20) for n in tried], found, CALLED[arm])
            ax.set(
                xscale="log",
                title=f"{target} target, L = {layers}",
                xlabel="finetuning pairs (left end: none)",
            )
            ax.axhline(0.5, color="grey", linewidth=0.7)
    for row in axes:
        row[0].set_ylabel("held-out pairs right")
    axes[0][0].legend(fontsize=8)
    return figure


def calibration(results: Results) -> Any:
    """Claim 11: reliability, observed against promised agreement, all seeds together."""
    sizes = results.values("calibration", "layers")
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 4), squeeze=False)
    for ax, layers in zip(axes[0], sizes, strict=True):
        ax.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.7)
        for epochs in results.values("calibration", "epochs"):
            bins = [
                results.one("calibration", layers=layers, epochs=epochs, seed=seed)["model"]["bins"]
                for seed in results.values("calibration", "seed")
            ]
            points = [_pooled(same) for same in zip(*bins, strict=True) if any(b["pairs"] for b in same)]
            passes = "1 pass" if epochs == 1 else f"{epochs} passes"
            ax.plot(*zip(*points, strict=True), marker="o", label=passes)
        ax.set(xlabel="promised, sigmoid of the gap", title=f"L = {layers}")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("observed agreement")
    return figure


def sets(results: Results) -> Any:
    """Claim 12: held-out loss over the pass, mean over seeds."""
    sizes = results.values("sets", "layers")
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 3.8), squeeze=False)
    for ax, layers in zip(axes[0], sizes, strict=True):
        for arm in ("grouped", "shuffled"):
            found = [
                results.one("sets", layers=layers, arm=arm, seed=seed)
                for seed in results.values("sets", "seed")
            ]
            seen = [point["seen"] for point in found[0]["curve"]]
            losses = np.array([[point["loss"] for point in r["curve"]] for r in found])
            _line(ax, seen, [over_seeds([SeedMean(x, 0.0) for x in column]) for column in losses.T], arm)
        floor = np.mean([r["known_score_loss"] for r in found])
        ax.axhline(floor, color="grey", linewidth=0.7, label="known score")
        ax.set(xlabel="share of the comparisons seen", title=f"L = {layers}")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("held-out loss")
    return figure


def _line(ax: Any, x: list[Any], estimates: list[Estimate], label: str) -> None:
    y = [e.mean for e in estimates]
    error = [[max(0.0, e.mean - e.low) for e in estimates], [max(0.0, e.high - e.mean) for e in estimates]]
    ax.errorbar(
        x, y, yerr=error, marker="o", markersize=3, linewidth=1.2, elinewidth=0.7, capsize=2, label=label
    )


def _pooled(same: tuple[dict[str, Any], ...]) -> tuple[float, float]:
    pairs = sum(b["pairs"] for b in same)
    filled = [b for b in same if b["pairs"]]
    promised, observed = (sum(b["pairs"] * b[k] for b in filled) / pairs for k in ("promised", "observed"))
    return float(promised), float(observed)
