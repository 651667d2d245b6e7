"""Which units the study consists of: an arm of a seed is a run of rounds, the static arm one of one round."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import hash_of
from studies.engine.units import Settings, Unit

ARMS = ("static", "online")


@dataclass(frozen=True)
class Plan:
    """One study."""

    recipe: str
    """File of the recipe."""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 3
    """Of the online arm."""
    comparisons: int = 384
    """Prompts that get a comparison, in each arm."""
    fresh: int = 128
    """Held-out prompts whose comparisons of the final policy say how right its reward model is there."""
    noise: float = 0.0
    """Of the gold judge's ranking of those."""


def units_of(plan: Plan, recipe: Recipe) -> list[Unit]:
    """Both arms of all seeds; the base model comes as their need.

    recipe: the plan's, loaded: a changed one gives other units.

    Raises:
        UserError: the recipe is of no gold lab, or the comparisons do not divide into the rounds.
    """
    if not recipe.data.sampled or recipe.evaluate.judge == "reward":
        raise UserError(
            f"{plan.recipe}: this study needs a gold lab: set data.comparisons=sampled, and "
            "evaluate.judge to a gold judge"
        )
    if plan.rounds < 2 or plan.comparisons % plan.rounds:
        raise UserError(
            f"--comparisons {plan.comparisons} must divide into --rounds {plan.rounds}, of which there are 2 "
            "or more"
        )
    content = hash_of(recipe.model_dump(mode="json"))[:8]
    own: Settings = {"recipe": plan.recipe, "overrides": list(plan.overrides), "content": content}
    base = Unit("base", own)
    made = []
    for seed in plan.seeds:
        for arm in ARMS:
            rounds = plan.rounds if arm == "online" else 1
            sizes = {
                "rounds": rounds,
                "prompts": plan.comparisons // rounds,
                "fresh": plan.fresh,
                "noise": plan.noise,
            }
            made.append(Unit("arm", own | {"arm": arm, "seed": seed} | sizes, (base,), 10.0 * rounds))
    return made
