"""Preference objectives over the same ladder: ranked and binary preference models against imitation.

They are the units ``versus`` of :mod:`studies.preference`, whose report is read where it is there. Nothing is
trained twice: without the report its units are run, in the work folder of that study.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import UserError
from studies.engine.command import Do
from studies.engine.ladder import matrix_weights
from studies.engine.results import Results
from studies.engine.units import Unit
from studies.preference.plan import FULL, QUICK, units_of
from studies.preference.report import short
from studies.scaling.figures import Figure, RungOf
from studies.scaling.plan import Plan
from studies.scaling.trend import Point

RANKED, BINARY = "ranked", "binary"
Row = tuple[dict[str, Any], dict[str, float]]  # settings, and accuracy by score
Rows = list[Row]


def units(plan: Plan) -> list[Unit]:
    """The units of that study for the seeds and sizes of this one."""
    theirs = QUICK if plan.name == "quick" else FULL
    theirs = replace(theirs, seeds=plan.seeds, sizes=plan.sizes, small_sizes=())
    return [u for u in units_of(theirs) if u.settings["labels"] == "true"]


def train(plan: Plan, folder: Path, do: Do) -> Rows:
    """Run them, where they are not done; returns their accuracies."""
    from studies.preference.units import compute

    wanted = units(plan)
    do(wanted, folder, compute)
    found = Results.read(wanted, folder).found
    return [(u.settings, short(f["result"])["accuracy"]) for u, f in zip(wanted, found, strict=True)]


def read(file: Path) -> Rows:
    """The accuracies of a report of ``python -m studies.preference``.

    Raises:
        UserError: the file is no such report.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["units"]
        return [
            (u["settings"], u["result"]["accuracy"])
            for u in rows
            if u["kind"] == "versus" and u["settings"]["labels"] == "true"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a report of `python -m studies.preference` ({type(error).__name__}: {error}); name "
            "its study.json with --preference"
        ) from None


def figures(rows: Rows) -> list[Figure]:
    """Accuracy of each objective, and the gaps; the rungs and seeds are those of the rows."""
    made = []
    for data in (RANKED, BINARY):
        best = _best_imitation(rows, data)
        group = f"preference objectives, {data} pairs"
        made += [
            _figure(rows, group, "preference model", _reader(rows, data, "pm", "score")),
            _figure(rows, group, f"imitation, scored by the {best}", _reader(rows, data, "il", best)),
            gap(rows, data),
        ]
    return made


def gap(rows: Rows, data: str) -> Figure:
    """Accuracy of the preference model less that of imitation.

    The report keeps no single pairs, so the error takes the two for independent: wider than it would be.
    """
    best = _best_imitation(rows, data)

    def point(at: tuple[int, int]) -> Point:
        pm, il = _accuracy(rows, at, data, "pm", "score"), _accuracy(rows, at, data, "il", best)
        return Point(pm.mean - il.mean, math.hypot(pm.error, il.error))

    return _figure(rows, f"preference objectives, {data} pairs", "preference model less imitation", point)


def _reader(rows: Rows, data: str, arm: str, score: str) -> Callable[[tuple[int, int]], Point]:
    return lambda at: _accuracy(rows, at, data, arm, score)


def _figure(rows: Rows, group: str, name: str, point: Callable[[tuple[int, int]], Point]) -> Figure:
    sizes, seeds = (sorted({s[key] for s, _ in rows}) for key in ("layers", "seed"))
    rungs = [RungOf(float(matrix_weights(layers)), layers) for layers in sizes]
    points = [[point((layers, seed)) for seed in seeds] for layers in sizes]
    return Figure(group, name, "share right", rungs, points)


def _accuracy(rows: Iterable[Row], at: tuple[int, int], data: str, arm: str, score: str) -> Point:
    """Accuracy with the standard error of a share."""
    found = [
        (accuracy[score], s["test"])
        for s, accuracy in rows
        if (s["layers"], s["seed"], s["data"], s["arm"]) == (*at, data, arm)
    ]
    if len(found) != 1:
        raise KeyError(f"{len(found)} results for {data} {arm} at {at}")
    share, number = found[0]
    return Point(share, math.sqrt(share * (1 - share) / number))


def _best_imitation(rows: Iterable[Row], data: str) -> str:
    """Which score of imitation is right more often, over all rungs: the sum or the mean."""
    found = [accuracy for s, accuracy in rows if (s["data"], s["arm"]) == (data, "il")]
    return max(("mean", "sum"), key=lambda score: float(np.mean([a[score] for a in found])))
