"""The plots: gold over sqrt(KL) by proxy, with fits; arms on the gold-KL plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from studies.engine.plots import level, panels
from studies.ppo.curves import GOLD, KL, Curves, column
from studies.ppo.fits import fit_bon, fit_rl, smooth
from studies.ppo.plan import ESTIMATORS, MIDDLE, NAMES, PRICES, STRONG, WEAK

PLOTS = {  # of a claim: file and caption
    8: ("divergence.png", "proxy, test reward model and gold over sqrt(KL)"),
    9: ("overoptimization.png", "gold over sqrt(KL): best of n and PPO without a KL price, with fits"),
    10: ("price.png", "gold over KL at several KL prices"),
    17: ("estimators.png", "gold over KL by algorithm"),
    22: ("tax.png", "tax over forward and reverse KL, one point an arm and seed"),
    23: ("bounded.png", "gold over steps with bounded rewards"),
}


def canvases(curves: Curves, claims: Sequence[int]) -> dict[str, Any]:
    """Every plot of these claims by its file name."""
    draw = {8: _divergence, 9: _laws, 10: _price, 17: _estimators, 22: _tax, 23: _bounded}
    return {PLOTS[n][0]: draw[n](curves) for n in claims if n in draw}


def _mean(curves: Curves, arm: str, name: str) -> Any:
    """A column of an arm, smoothed, its mean over the seeds."""
    return np.mean([smooth(column(run, name)) for run in curves.runs(arm)], axis=0)


def _root(kl: Any) -> Any:
    return np.sqrt(np.maximum(kl, 0))


def _laws(curves: Curves) -> Any:
    canvas, axes = panels(1, 2, width=5.5)
    bon, rl = axes[0]
    for name, arm in NAMES.items():
        if arm not in curves.arms:
            continue
        best = curves.results.by_seed("best")
        d = np.sqrt(best[0]["kl"])
        gain = np.mean([np.array(b[name][GOLD]) - b[name][GOLD][0] for b in best], axis=0)
        dots = bon.plot(d, gain, "o", markersize=3, label=name)[0]
        if len(d) > 5:
            fit = fit_bon(d[1:], gain[1:])
            bon.plot(d, d * (fit.alpha - fit.beta * d), color=dots.get_color(), linewidth=0.8)
        base = np.mean([curves.base(i) for i in range(len(curves.seeds))])
        d, gain = _root(_mean(curves, arm, KL)), _mean(curves, arm, GOLD) - base
        points = rl.plot(d, gain, ".", markersize=3, label=name)[0]
        far = d > np.sqrt(0.5)
        if far.sum() > 5:
            curve, x = fit_rl(d[far], gain[far]), np.sort(d[far])
            rl.plot(x, x * (curve.alpha - curve.beta * np.log(x)), color=points.get_color(), linewidth=0.8)
    for ax, title in ((bon, "best of n: d (a - b d)"), (rl, "PPO: d (a - b log d)")):
        _finish(ax, title, "d = sqrt(KL)", "gold gained")
    return canvas


def _divergence(curves: Curves) -> Any:
    there = {size: arm for size in ("small", "large") if (arm := f"free {size} {MIDDLE}") in curves.arms}
    canvas, axes = panels(1, max(1, len(there)), width=5, shared=True)
    for ax, (size, arm) in zip(axes[0], there.items(), strict=False):
        for name, label in (("proxy", "train model"), ("test", "test model"), (GOLD, "gold")):
            ax.plot(_root(_mean(curves, arm, KL)), _mean(curves, arm, name), label=label)
        _finish(ax, f"{size} reward models", "sqrt(KL)", "score")
    return canvas


def _plane(curves: Curves, arms: Sequence[str], title: str) -> Any:
    canvas, axes = panels(1, 1, width=5.5)
    for arm in arms:
        if arm in curves.arms:
            axes[0][0].plot(_mean(curves, arm, KL), _mean(curves, arm, GOLD), label=arm)
    _finish(axes[0][0], title, "KL, nats", "gold")
    return canvas


def _price(curves: Curves) -> Any:
    arms = [f"free small {STRONG}", *(f"price {b:g}" for b in PRICES), "ppo"]
    return _plane(curves, arms, "KL price (ppo: 0.05)")


def _estimators(curves: Curves) -> Any:
    return _plane(curves, ESTIMATORS, "algorithms at equal samples")


def _tax(curves: Curves) -> Any:
    canvas, axes = panels(1, 2, width=4.5, shared=True)
    for ax, way in zip(axes[0], ("forward_kl", "reverse_kl"), strict=True):
        for number, seed in enumerate(curves.seeds):
            runs = [curves.runs(arm)[number] for arm in curves.arms]
            ax.plot([r[way] for r in runs], [r["tax"] for r in runs], ".", label=f"seed {seed}")
        _finish(ax, way.replace("_kl", " KL"), "nats a response", "tax, nats a byte")
    return canvas


def _bounded(curves: Curves) -> Any:
    canvas, axes = panels(1, 1, width=5.5)
    for arm in (f"free small {WEAK}", "sigmoid", "log_sigmoid"):
        if arm in curves.arms:
            axes[0][0].plot(_mean(curves, arm, GOLD), label=arm.replace(f"free small {WEAK}", "plain"))
    _finish(axes[0][0], "weakest proxy, no KL price", "step", "gold")
    return canvas


def _finish(ax: Any, title: str, x: str, y: str) -> None:
    level(ax, 0.0)
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.legend(fontsize=7)
