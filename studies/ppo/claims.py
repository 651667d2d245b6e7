"""From trajectories to verdicts: every claim that the arms of a study can tell about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from studies.engine.verdicts import Claim, Statement, Verdict
from studies.ppo.comparisons import ablations, bounded, estimators, forward
from studies.ppo.curves import Curves
from studies.ppo.fits import seeds_needed
from studies.ppo.laws import divergence, overoptimization, price, root_law


def all_claims(curves: Curves) -> list[Claim]:
    """Every claim that the arms of the study can tell about, each with what it would take where undecided."""
    made = (root_law, divergence, overoptimization, price, estimators, ablations, forward, bounded)
    found = [claim for make in made if (claim := make(curves)) is not None]
    return [replace(c, notes=(*c.notes, *_needed(c.statements))) for c in found]


def _needed(statements: Sequence[Statement]) -> list[str]:
    """For each undecided statement, the seeds that it would take."""
    lines = []
    for s in statements:
        if s.verdict != Verdict.UNDECIDED:
            continue
        bounds = [
            float(x)
            for x in s.rule.replace("[", " ").replace("]", " ").replace(",", " ").split()
            if _is_number(x)
        ]
        needed = [n for b in bounds if (n := seeds_needed(s.estimate, b)) is not None]
        many = (
            f"about {max(needed)} seeds"
            if len(needed) == len(bounds)
            else "more than 200 seeds, or other arms"
        )
        if s.estimate.n < 2:
            many = "at least two seeds"
        lines.append(f"Undecided: {s.text}. To decide it with this mean and spread: {many}.")
    return lines


def _is_number(word: str) -> bool:
    return word.lstrip("-").replace(".", "", 1).isdigit()
