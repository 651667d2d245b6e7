"""What each kind of unit does.

rung       a small language model, trained from nothing                     (weights)
pairs      its continuations in pairs, labeled by the gold score with noise
reward     a reward model on some of the pairs                              (a folder)
average    the averaged weights of several of these                        (a folder)
policy     a policy against a reward model, step by step
best       best of n of the rung by every reward model
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from studies.engine.units import Compute, Unit
from studies.ppo import models, policies

KINDS: dict[str, Compute] = {
    "rung": models.rung,
    "pairs": models.pairs,
    "reward": models.reward,
    "average": models.average,
    "policy": policies.optimize,
    "best": policies.best,
}


def compute(unit: Unit, folder: Path) -> dict[str, Any]:
    """Do a unit; returns its result, and leaves the weights that others need in the folder."""
    return KINDS[unit.kind](unit, folder)
