"""study.md of the study, from study.json alone."""

from __future__ import annotations

from typing import Any

from rlhf.markdown import table
from rlhf.stats.intervals import SHARE
from studies.engine import report as engine
from studies.engine.verdicts import shown
from studies.ppo.curves import Curves, estimate
from studies.ppo.plots import PLOTS


def reward_models(curves: Curves) -> list[list[str]]:
    """Size, comparisons and held-out accuracy of every kind of reward model."""
    rows, units, own = [], curves.results, {"closed": False, "member": None}
    for layers in units.values("reward", "layers", **own):
        for number in units.values("reward", "comparisons", layers=layers, **own):
            for half in units.values("reward", "half", layers=layers, comparisons=number, **own):
                some = units.by_seed("reward", layers=layers, comparisons=number, half=half, **own)
                right = (
                    shown(estimate([r[k]["mean"] for r in some]).cut(SHARE))
                    for k in ("accuracy", "train_accuracy")
                )
                rows.append([str(layers), str(number), half, *right])
    return rows


def page(content: dict[str, Any]) -> str:
    """The study as one Markdown page."""
    plan = content["plan"]
    small, large = plan["layers"]
    made = {claim["number"] for claim in content["claims"]}
    models = [
        "## The models",
        f"Policy: {small} layer of width {128 * small}, trained from nothing on {plan['tokens']:,} "
        f"tokens of a small world, LoRA of rank {plan['rank']}; {plan['steps']} steps of "
        f"{plan['responses']} responses of at most {plan['response_tokens']} tokens. Reward models: on "
        f"rungs of {small} and {large} layers, on noisy labels (P(i over j) = sigmoid(gap / "
        f"{plan['noise']:g})). Gold: VADER's sentiment of the response. The gold score itself agrees "
        f"with a share of {content['labels_right']} of the labels; the rung has {content['base']} of it.",
        table(
            ("layers", "comparisons", "half", "held-out accuracy", "training accuracy"),
            content["reward_models"],
        ),
        "Arms are `free SIZE DATA` (no KL price; size of the proxy, 0 to 2 its comparisons from few to "
        "many), `price BETA`, `ppo` (KL price 0.05, the small proxy with the most comparisons) and single "
        "changes of `ppo`. *At the end*: over the last tenth of the steps. Intervals are cut where the "
        "quantity ends: 0 and 1 of shares and R^2, 0 of a KL, -1 and 1 of the gold score.",
    ]
    return engine.page(
        content,
        {number: plot for number, plot in PLOTS.items() if number in made},
        title="What optimization does to a reward",
        intro="The gold score is known, and PPO never sees it. Claims 15 and 16 (KL estimators; GAE, PPO "
        "and RLOO gradients) are exact and tested: `tests/test_policy_ppo_kl.py`, "
        "`tests/test_policy_ppo_exact.py`.",
        seeds="world, text, weights, comparisons and sampling",
        models=models,
        end="A unit is a rung, its pairs, a reward model, a policy, or best of n.",
    )
