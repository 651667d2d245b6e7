"""Preference objectives over the same ladder: ranked and binary preference models against imitation.

They are the units ``versus`` of :mod:`studies.preference`, whose report is read where it is there. Nothing is
trained twice: without the report its units are run, in the work folder of that study.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf.errors import UserError
from rlhf.stats.intervals import SHARE
from studies.engine.command import Do
from studies.engine.ladder import matrix_weights
from studies.engine.results import Results
from studies.engine.seeds import SeedMean, combine
from studies.engine.units import Unit
from studies.preference.plan import FULL, QUICK, units_of
from studies.preference.report import short
from studies.scaling.figures import Figure, RungOf
from studies.scaling.plan import Plan

RANKED, BINARY = "ranked", "binary"


def units(plan: Plan) -> list[Unit]:
    """The units of that study for the seeds and sizes of this one."""
    theirs = QUICK if plan.name == "quick" else FULL
    theirs = replace(theirs, seeds=plan.seeds, sizes=plan.sizes, small_sizes=())
    return [u for u in units_of(theirs) if u.settings["labels"] == "true"]


def train(plan: Plan, folder: Path, do: Do) -> Results:
    """Run them, where they are not done; returns their accuracies."""
    from studies.preference.units import compute

    wanted = units(plan)
    do(wanted, folder, compute)
    found = Results.read(wanted, folder).found
    return Results(wanted, [{"result": short(f["result"])} for f in found])


def read(file: Path) -> Results:
    """The accuracies of a report of ``python -m studies.preference``.

    Raises:
        UserError: the file is no such report.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["units"]
        some = [u for u in rows if u["kind"] == "versus" and u["settings"]["labels"] == "true"]
        found = [{"result": {"accuracy": dict(u["result"]["accuracy"])}} for u in some]
        return Results([Unit("versus", u["settings"]) for u in some], found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a report of `python -m studies.preference` ({type(error).__name__}: {error}); name "
            "its study.json with --preference"
        ) from None


def figures(results: Results) -> list[Figure]:
    """Accuracy of each objective, and the gaps; the rungs and seeds are those of the results."""
    made = []
    for data in (RANKED, BINARY):
        best = _best_imitation(results, data)
        made += [
            _figure(results, data, "preference model", {("pm", "score"): 1.0}),
            _figure(results, data, f"imitation, scored by the {best}", {("il", best): 1.0}),
            gap(results, data),
        ]
    return made


def gap(results: Results, data: str) -> Figure:
    """Accuracy of the preference model less that of imitation.

    The report keeps no single pairs, so the error takes the two for independent: wider than it would be.
    """
    both = {("pm", "score"): 1.0, ("il", _best_imitation(results, data)): -1.0}
    return _figure(results, data, "preference model less imitation", both)


def _figure(results: Results, data: str, name: str, parts: Mapping[tuple[str, str], float]) -> Figure:
    """A weighted sum of accuracies, by arm and score, each with the standard error of a share."""

    def point(layers: int, seed: int) -> SeedMean:
        shares = []
        for arm, score in parts:
            place = {"layers": layers, "seed": seed, "data": data, "arm": arm}
            share = results.one("versus", **place)["accuracy"][score]
            (number,) = results.values("versus", "test", **place)
            shares.append(SeedMean(share, math.sqrt(share * (1 - share) / number)))
        return combine(shares, [*parts.values()])

    sizes, seeds = (results.values("versus", key) for key in ("layers", "seed"))
    rungs = [RungOf(float(matrix_weights(layers)), layers) for layers in sizes]
    points = [[point(layers, seed) for seed in seeds] for layers in sizes]
    return Figure(f"preference objectives, {data} pairs", name, "share right", rungs, points, SHARE)


def _best_imitation(results: Results, data: str) -> str:
    """Which score of imitation is right more often, over all rungs: the sum or the mean."""
    found = [r["accuracy"] for r in results.all("versus", data=data, arm="il")]
    return max(("mean", "sum"), key=lambda score: float(np.mean([a[score] for a in found])))
