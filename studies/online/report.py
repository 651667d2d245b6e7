"""Claim 13 from the finished units, and study.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf.stats.intervals import AT_LEAST_0, SHARE, UNBOUNDED, Estimate
from studies.engine import report as engine
from studies.engine.results import Results
from studies.engine.seeds import SeedMean, over_seeds
from studies.engine.verdicts import Claim, above, shown
from studies.online.plan import ARMS, Plan

Unit = dict[str, Any]


def _a_nat(unit: Unit) -> float:
    """Gain a nat of KL; unknown where the policy has not moved."""
    gain, kl = unit["gain"]["mean"], unit["kl"]["mean"]
    return float(gain / kl) if kl > 0 else math.nan


FIGURES: dict[str, tuple[Callable[[Unit], float], int, tuple[float, float]]] = {  # digits shown, bounds
    "gold score": (lambda u: u["gain"]["after"], 3, (-1.0, 1.0)),
    "gold gain": (lambda u: u["gain"]["mean"], 3, UNBOUNDED),
    "KL, nats": (lambda u: u["kl"]["mean"], 2, AT_LEAST_0),
    "gold gain a nat": (_a_nat, 3, UNBOUNDED),
    "reward accuracy on its own samples": (lambda u: u["accuracy"]["mean"], 3, SHARE),
    "tokens": (lambda u: u["length"]["after"], 1, AT_LEAST_0),
}


def _over(values: list[float]) -> Estimate:
    """Over the seeds alone; unknown with one."""
    known = over_seeds([SeedMean(value, 0.0) for value in values])
    return known if len(values) > 1 else Estimate(known.mean, math.nan, math.nan, 1)


def claim(plan: Plan, results: Results) -> Claim:
    """Online comparisons make a better policy than as many static ones."""
    arms = {arm: results.by_seed("arm", arm=arm) for arm in ARMS}
    pairs = list(zip(arms["online"], arms["static"], strict=True))
    gain = over_seeds([SeedMean.of(np.subtract(a["gold"], b["gold"])) for a, b in pairs])
    rows = []
    for name, (of, digits, bounds) in FIGURES.items():
        cells = [shown(_over([of(u) for u in arms[arm]]).cut(bounds), digits) for arm in ARMS]
        rows.append((name, *cells, shown(_over([of(a) - of(b) for a, b in pairs]), digits)))
    for index, seed in enumerate(plan.seeds):
        for arm in ARMS:
            steps = arms[arm][index]["rounds"]
            golds = ", ".join(f"{r['gain']['after']:.3f} (KL {r['kl']['mean']:.1f})" for r in steps)
            own = [golds if a == arm else "" for a in ARMS]
            rows.append((f"seed {seed}, {arm}: gold after each round", *own, ""))
    each = plan.comparisons // plan.rounds
    return Claim(
        13,
        "online comparisons make a better policy than as many static ones",
        "Bai et al. 2022, section 4.5: at an equal number of comparisons, a policy trained on an even "
        "mixture of the base's and the online ones is clearly preferred.",
        f"{plan.comparisons} prompts get a comparison in each arm, before repeated texts are removed. "
        f"Static: all from the base. Online: {plan.rounds} rounds of {each}, the first from the base, then "
        "half from the newest policy and half from the one before it (the base at first); reward model and "
        "PPO are trained anew on all. The first round's comparisons are among the static arm's. The gold "
        "judge ranks with noise, and scores the last policies on the same held-out prompts.",
        [above("gold score after PPO, online less static, paired by prompt", gain)],
        ("", *ARMS, "online less static"),
        rows,
        (
            "Rows of figures: mean over the seeds and Student's interval over them.",
            "Reward accuracy: of each arm's last reward model on pairs of its last policy's responses to "
            f"{plan.fresh} held-out prompts, ranked by the gold judge (noise {plan.noise:g}), ties left out. "
            "The two arms are asked about different responses.",
            "Both arms have the same PPO; the online arm has trained more policies on the way.",
        ),
    )


def page(content: dict[str, Any]) -> str:
    """The study as one Markdown page, from study.json."""
    return engine.page(
        content,
        {},
        title="Static against online comparisons",
        intro="The gold lab: a judge that the policy never sees ranks responses with an annotator's noise.",
        seeds="comparisons, reward model, policy and sampling",
        models=[],
        end="A unit is all rounds of an arm and seed.",
    )
