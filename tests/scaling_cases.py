"""Finished units of a scaling study, made up: every figure is known, nothing is trained."""

from dataclasses import replace

import numpy as np

from studies.engine.units import with_needs
from studies.scaling.data import world
from studies.scaling.data.items import TASKS
from studies.scaling.figures import Study
from studies.scaling.plan import FULL, PPO, Given, units_of

ITEMS = 40
DEFAULTS = {
    "gone": 0.9,  # share of the KL that distillation takes away
    "recovered": 0.85,
    "word": 0.7,  # right on last words, before
    "tax": lambda layers: 0.03 / layers,  # of PPO on the held-out loss
    "ptx": 0.5,  # share of that tax with text mixed in
    "word_tax": lambda layers: 0.1 / layers,
    "accuracy": lambda layers: 0.8 - 0.1 * layers,  # on inverse-scaling items
    "mass": 0.5,
    "ptx_reward": 0.5,
}
REWARD = 0.5  # of PPO

FRAMES = (
    "the a is has it day says that near never without if then so not let be what colour which or write line "
    "ends in yes no . , ? :"
)
LISTS = ("GOOD", "BAD", "NAMES", "ANIMALS", "OBJECTS", "PLACES", "COLOURS", "THINGS", "TRAITS", "VERBS")
WORDS = set(FRAMES.split()).union(*(getattr(world, name) for name in LISTS))
"""Every word that text and items are made of."""


def plan_of(sizes=(1, 2, 3), seeds=(0, 1, 2)):
    return replace(FULL, sizes=sizes, seeds=seeds)


def estimate(mean, half=0.01):
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": 10}


def share(value, rng):
    """Zeros and ones of about this mean."""
    return (rng.permutation(ITEMS) < value * ITEMS).astype(float)


def result_of(unit, told):
    s = unit.settings
    layers, seed = s["layers"], s["seed"]
    rng = np.random.default_rng([layers, seed])
    noise = 0.001 * rng.standard_normal()
    if unit.kind == "rung":
        return {"N": 196_608 * layers**3, "parameters": 10**layers, "vocabulary": 700, "last_loss": 2.0}
    if unit.kind == "distil":
        return {
            "kl_before": estimate(0.5),
            "kl_after": estimate(0.05),
            "kl_recovered": estimate(told["gone"] + noise),
            "prompt_gain": estimate(0.3),
            "distilled_gain": estimate(0.25),
            "log_prob_recovered": None if told["recovered"] is None else estimate(told["recovered"] + noise),
            "empty_context_kl": told.get("empty", 0.0),
            "bounded": 1.0,
            "context_tokens": 120,
        }
    if unit.kind == "ppo":
        return {"score_last": REWARD + noise, "kl_last": 3.0 + noise, "entropy_last": 1.0 + noise}
    return evaluation(s["arm"], layers, np.random.default_rng(seed), rng, told)


def evaluation(arm, layers, same, own, told):
    """What an arm did; ``same``: random numbers that all arms and rungs of a seed share."""
    paid = {PPO: 1.0, "ppo-ptx": told["ptx"]}.get(arm, 0.0)
    loss = 1.0 / layers + same.standard_normal(ITEMS) + 0.001 * own.standard_normal(ITEMS)
    rewards = {PPO: REWARD, "ppo-ptx": told["ptx_reward"]}
    found = {
        "lm_loss": {
            "nats_per_byte": (loss + paid * told["tax"](layers)).tolist(),
            "nats_per_token": loss.tolist(),
        },
        "last_word": {
            "acc": share(told["word"] - paid * told["word_tax"](layers), own).tolist(),
            "nll": [1.0] * ITEMS,
        },
        "judged": {"score": (rewards.get(arm, 0.0) + 0.001 * own.standard_normal(ITEMS)).tolist()},
    }
    for task in TASKS:
        found[task] = {
            "acc": share(told["accuracy"](layers), own).tolist(),
            "total_logprob": [float(np.log(told["mass"]))] * ITEMS,
        }
    return found


def study(sizes=(1, 2, 3), seeds=(0, 1, 2), **told):
    """A finished study."""
    units = with_needs(units_of(plan_of(sizes, seeds), Given()))
    told = DEFAULTS | told
    found = [{"result": result_of(u, told), "seconds": 60.0, "cpu_seconds": 30.0} for u in units]
    return Study(units, found)
