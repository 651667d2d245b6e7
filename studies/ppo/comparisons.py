"""Claims 17 and 18, and two of newer papers: one arm beside another."""

from __future__ import annotations

import numpy as np

from rlhf.stats.intervals import SHARE
from studies.engine.verdicts import Claim, above, below, shown
from studies.ppo.curves import BOUNDS, GOLD, KL, Curves, column, drop, end, estimate, peak_gold
from studies.ppo.fits import at_kl, r_squared, smooth
from studies.ppo.plan import CLOSE, DPO, ESTIMATORS, NAMES, PRICES, STRONG, WEAK

ENDED = 0.95  # share of responses that end by themselves
PROXY = f"small {STRONG}"  # of the arm `ppo` and its changes


def estimators(curves: Curves) -> Claim | None:
    """Claim 17."""
    arms = [a for a in ESTIMATORS if a in curves.arms]
    if not {"ppo", "rloo"} <= set(arms):
        return None
    return Claim(
        17,
        "RLOO is as good as PPO",
        "Ahmadian et al. 2024: REINFORCE-style estimators reach PPO's reward or more.",
        "The same proxy, KL price, responses, passes and learning rate. Gold at equal samples, at the "
        "end; and at equal KL, along the trajectories. Beside them DPO on the comparisons that the proxy "
        f"learned from, {DPO['epochs']} passes with beta {DPO['beta']:g}, and best of n by the proxy.",
        [
            above("RLOO less PPO, gold at equal samples", curves.less("rloo", "ppo", end(GOLD)), -CLOSE),
            above("RLOO less PPO, gold at equal KL", curves.at_equal_kl("rloo", "ppo"), -CLOSE),
        ],
        ("algorithm", "gold", "KL", "gold less PPO's", "at equal KL", "distinct-2", "seconds"),
        [*(_row(curves, arm) for arm in arms), _best_row(curves)],
    )


def _best_row(curves: Curves) -> tuple[str, ...]:
    """Best of the most samples by PPO's own proxy; beside PPO where that has the same KL."""
    every = curves.results.by_seed("best")
    golds = [best[PROXY][GOLD][-1] for best in every]
    kls = [best["kl"][-1] for best in every]
    beside = [
        gold - at_kl(smooth(column(run, KL)), smooth(column(run, GOLD)), kl)
        for gold, kl, run in zip(golds, kls, curves.runs("ppo"), strict=True)
    ]
    name = f"best of {every[0]['n'][-1]}"
    return (
        name,
        shown(estimate(golds).cut(BOUNDS[GOLD])),
        f"{kls[0]:.2f}",
        "",
        shown(estimate(beside)),
        "",
        "",
    )


def _row(curves: Curves, arm: str, other: str = "ppo") -> tuple[str, ...]:
    """An arm beside another."""
    found = [shown(curves.at_end(arm, name), digits) for name, digits in ((GOLD, 3), (KL, 2))]
    beside = ["", ""]
    if arm not in (other, "closed") and other in curves.arms:
        beside = [shown(curves.less(arm, other, end(GOLD))), shown(curves.at_equal_kl(arm, other))]
    spread = shown(curves.at_end(arm, "distinct_2"), 2)
    return (arm, *found, *beside, spread, shown(curves.over(arm, lambda run: float(run["loop_seconds"])), 0))


def ablations(curves: Curves) -> Claim | None:
    """Claim 18."""
    others = {*NAMES.values(), *(f"price {b:g}" for b in PRICES), *ESTIMATORS, "sigmoid", "log_sigmoid"}
    arms = [arm for arm in curves.arms if arm not in others]
    if not arms or "ppo" not in curves.arms:
        return None
    statements = []
    if "EOS trick" in arms:
        statements.append(above("EOS trick: responses that end", curves.at_end("EOS trick", "eos"), ENDED))
        if "closed" in arms:
            more = curves.less("EOS trick", "closed", end("eos"))
            statements.append(above("the same, more than without the trick", more))
    told = {
        "advantages not whitened": "gold without advantage whitening less with it",
        "Adam epsilon 1e-8": "gold with epsilon 1e-8 less with 1e-5",
    }
    statements += [below(what, curves.less(a, "ppo", end(GOLD))) for a, what in told.items() if a in arms]
    if "running reward normalization" in arms:
        gain = curves.less("running reward normalization", "ppo", end(GOLD))
        statements.append(above("gold with running reward normalization less without", gain))
    rows = []
    for arm in ("ppo", *arms):
        ends = (shown(curves.at_end(arm, name), 2) for name in ("eos", "explained_variance"))
        rows.append((*_row(curves, arm, "closed" if arm == "EOS trick" else "ppo"), *ends))
    return Claim(
        18,
        "EOS trick, whitening, reward normalization and Adam's epsilon matter",
        "Huang et al. 2024 (the N+ implementation details), Zheng et al. 2023 (PPO-max).",
        "One change at a time from the arm `ppo`, everything else equal; differences paired by seed. The "
        "arms `closed` and `EOS trick` are of a world whose stories end.",
        statements,
        (
            *("arm", "gold", "KL", "gold less ppo's", "at equal KL", "distinct-2", "seconds"),
            *("EOS rate", "explained variance"),
        ),
        rows,
        (
            "At equal KL: along the trajectories; a dash where neither run reaches the other's KL in two "
            "seeds.",
            "Seconds are of the loop, on a machine that other units share.",
        ),
    )


# ---------------------------------------------------------------- claims of newer papers


def forward(curves: Curves) -> Claim | None:
    """Forward KL and forgetting."""
    if len(curves.arms) < 4:
        return None

    def explained(seed: int, name: str) -> float:
        runs = [curves.runs(arm)[seed] for arm in curves.arms]
        return r_squared([run[name] for run in runs], [run["tax"] for run in runs])

    each = range(len(curves.seeds))
    forward, reverse = ([explained(i, f"{way}_kl") for i in each] for way in ("forward", "reverse"))
    return Claim(
        22,
        "the forward KL predicts the tax better than the reverse one",
        "Shenfeld et al. 2025 (arXiv 2509.04259): forgetting follows the KL on the new task.",
        "All policies of a seed: R^2, over the arms, of the tax (loss on held-out lessons, of which no "
        "prompt is one, more than the rung's, nats a byte) on KL(rung || policy) and on KL(policy || "
        "rung), both on held-out story prompts.",
        [above("R^2 on forward KL less R^2 on reverse KL", estimate(np.subtract(forward, reverse).tolist()))],
        ("", "R^2"),
        [
            ("forward KL", shown(estimate(forward).cut(SHARE))),
            ("reverse KL", shown(estimate(reverse).cut(SHARE))),
        ],
    )


def bounded(curves: Curves) -> Claim | None:
    """Bounded rewards."""
    plain = f"free small {WEAK}"
    shapes = [shape for shape in ("sigmoid", "log_sigmoid") if shape in curves.arms]
    if not shapes or plain not in curves.arms:
        return None
    return Claim(
        23,
        "bounded rewards delay hacking",
        "Fu et al. 2025 (PAR, arXiv 2502.18770); Wang et al. 2024 (arXiv 2402.00742).",
        "The weakest proxy without a KL price, its score as it is, or as sigmoid or log-sigmoid of what "
        "it gains on a response of the rung.",
        [
            above(f"{s}: gold at the end less the plain score's", curves.less(s, plain, end(GOLD)))
            for s in shapes
        ],
        (
            "score",
            "gold, end",
            "peak of gold",
            "fall from it",
            "KL, end",
            "gold less the plain score's at equal KL",
        ),
        [
            (
                "plain" if arm == plain else arm,
                *(
                    shown(e)
                    for e in (
                        curves.at_end(arm, GOLD),
                        curves.over(arm, peak_gold).cut(BOUNDS[GOLD]),
                        curves.over(arm, drop),
                    )
                ),
                shown(curves.at_end(arm, KL), 1),
                "" if arm == plain else shown(curves.at_equal_kl(arm, plain)),
            )
            for arm in (plain, *shapes)
        ],
    )
