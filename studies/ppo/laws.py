"""Claims 7 to 10: what happens to a reward along the way."""

from __future__ import annotations

import math

import numpy as np

from rlhf.stats.intervals import SHARE, Estimate
from studies.engine.verdicts import Claim, above, below, inside, shown
from studies.ppo.curves import (
    BOUNDS,
    GOLD,
    KL,
    Curves,
    Run,
    column,
    drop,
    early,
    end,
    estimate,
    few,
    known_mean,
    peak_gold,
)
from studies.ppo.fits import fit_bon, fit_rl, r_squared, smooth
from studies.ppo.plan import CLOSE, MIDDLE, NAMES, PRICES, STRONG

GAP = 0.25  # deviations of a reward model's scores: train and test model agree within it


def _free(curves: Curves) -> list[str]:
    return [arm for arm in NAMES.values() if arm in curves.arms]


# ---------------------------------------------------------------- claim 7


def _root_gain(run: Run, name: str) -> float:
    """R^2 of a column on sqrt(KL) less that on KL, over the steps up to the gold score's peak."""
    half = max(few(run), int(smooth(column(run, GOLD)).argmax()) + 1, 8)
    kl, y = (smooth(column(run, c))[:half] for c in (KL, name))
    return r_squared(np.sqrt(np.maximum(kl, 0)), y) - r_squared(kl, y)


def root_law(curves: Curves) -> Claim | None:
    """Claim 7."""
    arms = _free(curves)
    if not arms:
        return None

    def over(name: str) -> Estimate:
        by_arm = [[_root_gain(run, name) for run in curves.runs(arm)] for arm in arms]
        return estimate([known_mean(of_seed) for of_seed in zip(*by_arm, strict=True)])

    rows = [
        (arm, *(shown(curves.over(arm, lambda r, n=n: _root_gain(r, n))) for n in ("proxy", GOLD)))  # type: ignore[misc]
        for arm in arms
    ]
    return Claim(
        7,
        "reward grows with the square root of KL",
        "Bai et al. 2022, section 4.3: reward is about linear in sqrt(KL), early in training.",
        "PPO without a KL price against each proxy. R^2 of a straight line in sqrt(KL) less that of one "
        "in KL, over the steps up to the peak of the gold score (smoothed over 5 steps).",
        [
            above("proxy: R^2 in sqrt(KL) less R^2 in KL, mean over the proxies", over("proxy")),
            above("gold: the same", over(GOLD)),
        ],
        ("proxy", "R^2 gained, proxy", "R^2 gained, gold"),
        rows,
    )


# ---------------------------------------------------------------- claim 8


def divergence(curves: Curves) -> Claim | None:
    """Claim 8."""
    arms = [arm for size in ("small", "large") if (arm := f"free {size} {MIDDLE}") in curves.arms]
    if not arms:
        return None

    def late(run: Run) -> float:
        return end("proxy")(run) - end("test")(run)

    def first(run: Run) -> float:
        return early("proxy")(run) - early("test")(run)

    statements = [
        inside(f"{arm}: train less test model, first tenth of the steps", curves.over(arm, first), -GAP, GAP)
        for arm in arms
    ]
    statements += [above(f"{arm}: the same, last tenth", curves.over(arm, late)) for arm in arms]
    if len(arms) == 2:
        statements.append(below("the last tenth's, large less small", curves.less(arms[1], arms[0], late)))
    return Claim(
        8,
        "train and test reward model part, the larger ones less",
        "Bai et al. 2022, section 4.2: the two agree early in RL, later the test model sees less reward; "
        "larger reward models are more robust.",
        "Two reward models on separate comparisons of the same number, each normalized to mean 0 and "
        "deviation 1 on the rung's own responses; PPO without a KL price against one, watched by the other.",
        statements,
        ("proxy", "train model, end", "test model, end", "gold, end", "KL, end"),
        [(a, *(shown(curves.at_end(a, n), 2) for n in ("proxy", "test", GOLD, KL))) for a in arms],
    )


# ---------------------------------------------------------------- claim 9


def _rl_fit(curves: Curves, arm: str, which: str) -> Estimate:
    return estimate([_rl(run, curves.base(i), which) for i, run in enumerate(curves.runs(arm))])


def _rl(run: Run, base: float, which: str) -> float:
    kl, gold = smooth(column(run, KL)), smooth(column(run, GOLD))
    far = kl > 0.5  # the slope is infinite at 0
    return float(getattr(fit_rl(np.sqrt(kl[far]), gold[far] - base), which)) if far.sum() > 5 else math.nan


def _bon_fit(curves: Curves, proxy: str, which: str) -> Estimate:
    found = []
    for best in curves.results.by_seed("best"):
        d, gold = np.sqrt(best["kl"][1:]), np.array(best[proxy][GOLD])
        found.append(float(getattr(fit_bon(d, gold[1:] - gold[0]), which)) if len(d) > 4 else math.nan)
    return estimate(found)


def _bon_end(curves: Curves, proxy: str) -> Estimate:
    rows = [best[proxy][GOLD] for best in curves.results.by_seed("best")]
    return estimate([row[-1] - row[0] for row in rows])


def overoptimization(curves: Curves) -> Claim | None:
    """Claim 9."""
    proxies = {name: arm for name, arm in NAMES.items() if arm in curves.arms}
    if len(proxies) < 2:
        return None
    weak, strong = (list(proxies.values())[i] for i in (0, -1))
    statements = [
        above(f"PPO, {weak}: gold falls from its peak to the end by", curves.over(weak, drop), CLOSE),
        below("the peak of gold, weakest less strongest proxy", curves.less(weak, strong, peak_gold)),
        below("gold at the end, weakest less strongest proxy", curves.less(weak, strong, end(GOLD))),
        above(
            f"best of n, {weak.removeprefix('free ')}: AIC of the line less that of the parabola",
            _bon_fit(curves, weak.removeprefix("free "), "aic_gain"),
            digits=1,
        ),
        above(
            f"PPO, {weak}: AIC of the line less that of d (a - b log d)",
            _rl_fit(curves, weak, "aic_gain"),
            digits=1,
        ),
    ]
    rows = []
    for name, arm in proxies.items():
        accuracy = estimate([_accuracy(curves, arm, seed) for seed in curves.seeds])
        rows.append(
            (
                name,
                shown(accuracy.cut(SHARE)),
                shown(_bon_end(curves, name)),
                shown(_bon_fit(curves, name, "aic_gain"), 1),
                shown(curves.over(arm, peak_gold).cut(BOUNDS[GOLD])),
                shown(curves.at_end(arm, GOLD)),
                shown(curves.at_end(arm, KL), 1),
                shown(_rl_fit(curves, arm, "alpha")),
                shown(_rl_fit(curves, arm, "beta")),
                shown(_rl_fit(curves, arm, "aic_gain"), 1),
            )
        )
    return Claim(
        9,
        "over-optimization follows two laws",
        "Gao et al. 2022: with d = sqrt(KL), gold gains d (a - b d) under best of n and d (a - b log d) "
        "under RL; weak proxies turn over first.",
        "Proxies on rungs of two sizes and three numbers of comparisons. Best of n from 1,024 samples a "
        "prompt by the unbiased estimator; PPO without a KL price. AIC for small samples, above 0: the "
        "second parameter is worth it.",
        statements,
        (
            *(
                "proxy",
                "held-out accuracy",
                "best of n: gold gain at most n",
                "AIC gain",
                "PPO: peak of gold",
            ),
            *("gold at the end", "KL at the end", "a", "b", "AIC gain"),
        ),
        rows,
        (
            "Points of a curve are not independent (best of n shares its samples, neighboring steps their "
            "policy), so AIC is compared within a seed, and the interval is over the seeds.",
        ),
    )


def _accuracy(curves: Curves, arm: str, seed: int) -> float:
    """Held-out accuracy of an arm's proxy."""
    unit = next(
        u for u in curves.results.units
        if u.kind == "policy" and u.settings["arm"] == arm and u.settings["seed"] == seed
    )  # fmt: skip
    proxy = next(i for i, u in enumerate(curves.results.units) if u.key == unit.needs[2].key)
    return float(curves.results.found[proxy]["result"]["accuracy"]["mean"])


# ---------------------------------------------------------------- claim 10


def price(curves: Curves) -> Claim | None:
    """Claim 10."""
    free = f"free small {STRONG}"
    arms = [f"price {beta:g}" for beta in PRICES if f"price {beta:g}" in curves.arms]
    if not arms or free not in curves.arms:
        return None
    names = [*arms[:1], *(["ppo"] if "ppo" in curves.arms else []), *arms[1:]]
    return Claim(
        10,
        "a KL price is early stopping",
        "Gao et al. 2022, section 3.6: the KL penalty moves along the gold-KL frontier, not beyond it.",
        "The same proxy at several KL prices; the gold score at the end less that of the run without a price "
        f"at the step with the same KL. Within {CLOSE} of the gold score is no difference.",
        [
            inside(
                f"{arm}: gold less the free run's at equal KL", curves.at_equal_kl(arm, free), -CLOSE, CLOSE
            )
            for arm in names
        ],
        ("arm", "gold, end", "KL, end", "gold less the free run's at equal KL"),
        [
            (
                arm,
                shown(curves.at_end(arm, GOLD)),
                shown(curves.at_end(arm, KL), 1),
                "" if arm == free else shown(curves.at_equal_kl(arm, free)),
            )
            for arm in (free, *names)
        ],
    )
