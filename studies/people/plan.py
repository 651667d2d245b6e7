"""Which units a study consists of: the halves, a reward model on each, a policy an arm and seed."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.errors import UserError
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import hash_of
from studies.engine.units import Settings, Unit

ARMS = {
    "ppo": "PPO",
    "rloo": "RLOO",
    "dpo": "DPO, on the comparisons",
    "trl_rloo": "trl.RLOOTrainer",
    "trl_grpo": "trl.GRPOTrainer",
}
SAMPLES = 4  # responses a prompt where the samples of a prompt are compared, unless the recipe says so


@dataclass(frozen=True)
class Plan:
    """One study."""

    recipe: str
    """File of the recipe."""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the policies; data and reward models have the recipe's."""
    arms: tuple[str, ...] = tuple(ARMS)
    best_of: int = 16
    """Responses of the base a prompt, for best of n."""
    variants: tuple[str, ...] = ()
    """Further arms of PPO, by what they override, such as ``ppo.kl_coef=0.1``."""


def units_of(plan: Plan, recipe: Recipe) -> list[Unit]:
    """All policies of a study; the halves and the reward models come as their needs.

    recipe: the plan's, loaded: a changed one gives other units.
    """
    content = hash_of(recipe.model_dump(mode="json"))[:8]
    own: Settings = {"recipe": plan.recipe, "overrides": list(plan.overrides), "content": content}
    halves = Unit("halves", own)
    judges = tuple(Unit("reward", own | {"half": half}, (halves,), 10.0) for half in ("train", "test"))
    return [
        Unit("policy", own | {"arm": arm, "seed": seed, "best_of": plan.best_of}, judges, 20.0)
        for seed in plan.seeds
        for arm in (*plan.arms, *plan.variants)
    ]


def check_variants(plan: Plan) -> None:
    """A variant may differ in PPO alone, since reward models and judge are the same.

    Raises:
        UserError: a variant overrides something else, its reward, or nothing, stands twice, or is no recipe.
    """
    for variant in plan.variants:
        words = variant.split()
        if not words or any(not word.startswith("ppo.") or "=" not in word for word in words):
            raise UserError(f"--variant {variant!r}: give options of PPO, for example 'ppo.kl_coef=0.1'")
        if any(word.startswith(("ppo.rewards", "ppo.reward_model")) for word in words):
            raise UserError(f"--variant {variant!r}: all arms learn from one reward model; leave it out")
        if plan.variants.count(variant) > 1:
            raise UserError(f"--variant {variant!r} stands twice; give it once")
        load(plan.recipe, [*plan.overrides, *words])


def label_of(arm: str) -> str:
    """What an arm is called on the page."""
    return ARMS.get(arm) or f"PPO, `{arm}`"


def samples(recipe: Recipe) -> int:
    """Responses a prompt where the samples of a prompt are compared."""
    own = recipe.ppo.samples_per_prompt
    return own if own > 1 else SAMPLES
