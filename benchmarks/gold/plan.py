"""What the sides of the gold comparison have in common, and what theirs can do; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.errors import UserError
from rlhf.recipe.load import Recipe, load

PEERS = ("ppo", "rloo", "grpo")
GENERATIONS = 4
"""Responses to one prompt in a step of RLOO and GRPO, which have no value; ours and PPO have one."""
PLAIN = {
    "algorithm": "ppo",
    "kl_controller": "fixed",
    "kl_in": "reward",
    "missing_eos": "ignore",
    "samples_per_prompt": 1,
    "clip_range": 0.2,
    "dual_clip": None,
    "reward_model": [],
    "rewards": [],
    "start": None,
    "ptx_coef": 0.0,
    "score_clip": None,
    "score_normalization": "none",
    "score_shape": "none",
    "value": "adapter",
    "length_penalty": 0.0,
    "target_kl": None,
    "max_kl": None,
    "warmup_steps": 0,
    "ema_decay": None,
    "keep_best": False,
}
"""What theirs can do, of the keys of ``ppo`` that it does not have, or that a mark would not bear."""
SAME = ("steps", "batch_size", "start", "reward_model", "rewards", "test_reward_model", "ensemble")
"""What no variant may change: equal samples, one start, one reward."""
UNMARKED = ("target_kl", "max_kl", "ema_decay", "keep_best")
"""What would end a training early, or make its policy another than the one at the last mark."""


def schedule_of(recipe: Recipe) -> str:
    """The learning rate's schedule by transformers' name."""
    return recipe.ppo.schedule.partition("_")[0]


def check(recipe: Recipe) -> None:
    """Theirs must have what the recipe asks for.

    Raises:
        UserError: names the option that they do not have.
    """
    ppo = recipe.ppo
    if recipe.evaluate.judge == "reward":
        raise UserError("evaluate.judge: a gold judge is wanted, for example evaluate.judge=vader")
    for name in ("sft", "distill", "pmp"):
        if getattr(recipe, name) is not None:
            raise UserError(f"{name}: the comparison starts from the base; set {name}=null")
    for name, plain in PLAIN.items():
        if (found := getattr(ppo, name)) != plain:
            raise UserError(f"ppo.{name}: theirs has no {found!r}; set ppo.{name}={plain}")
    if ppo.batch_size % GENERATIONS:
        raise UserError(f"ppo.batch_size: {ppo.batch_size} is no multiple of {GENERATIONS}, their group")


def check_variants(recipe_file: str, overrides: Sequence[str], variants: Sequence[str]) -> None:
    """Our further sides may differ in PPO alone, since comparisons and reward model are the same.

    Raises:
        UserError: a variant overrides something else, or is none; names the option.
    """
    given = load(recipe_file, overrides).ppo
    for variant in variants:
        other = [word for word in variant.split() if not word.startswith("ppo.") or "=" not in word]
        if other or not variant.split():
            raise UserError(f"--variant {variant!r}: give options of PPO, for example 'ppo.kl_coef=0.1'")
        varied = load(recipe_file, [*overrides, *variant.split()]).ppo
        for name in SAME:
            if getattr(varied, name) != (same := getattr(given, name)):
                raise UserError(
                    f"--variant {variant!r}: ppo.{name} is {same!r} on all sides, which have one start, one "
                    "reward and as many responses; leave it out"
                )
        for name in UNMARKED:
            if getattr(varied, name) != PLAIN[name]:
                raise UserError(f"--variant {variant!r}: ppo.{name} does not go with marks; leave it out")
    for variant in variants:
        if variants.count(variant) > 1:
            raise UserError(f"--variant {variant!r} stands twice; give it once")
