"""Figures of the gold comparison from what was judged at the marks; no torch.

A record of a seed: ``reference`` and every side by name. A side has ``marks``, each with ``step``,
``seconds`` of training until then, and a number a held-out prompt of ``gold``, ``kl`` and ``length``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Figures
from rlhf.stats.intervals import AT_LEAST_0, UNBOUNDED, mean_interval

GAIN = 0.4
"""Gold above the reference's, of which the seconds are told."""
MEASURES = ("gold", "kl", "gold_per_nat", "gold_at_time", "seconds")
BY_PROMPT = ("gold", "kl", "gold_at_time")


def at_time(side: Figures, reference: Figures, seconds: float) -> list[float]:
    """Gold of every prompt at the last mark that a side has reached within so many seconds of training; the
    reference's before the first one."""
    reached = [mark for mark in side["marks"] if mark["seconds"] <= seconds]
    return list((reached or [reference])[-1]["gold"])


def seconds_to(side: Figures, reference: Figures, gain: float = GAIN) -> float | None:
    """Seconds of training to the first mark whose mean gold is so much above the reference's; None: never."""
    wanted = np.mean(reference["gold"]) + gain
    return next((m["seconds"] for m in side["marks"] if np.mean(m["gold"]) >= wanted), None)


def of_seed(record: Mapping[str, Figures]) -> dict[str, Figures]:
    """Every side's figures of one seed: numbers, ``marks`` without prompts, ``by_prompt``."""
    reference = record["reference"]
    sides = {name: side for name, side in record.items() if name != "reference"}
    first = min(side["marks"][-1]["seconds"] for side in sides.values())
    found = {}
    for name, side in sides.items():
        end = side["marks"][-1]
        by_prompt = {"gold": end["gold"], "kl": end["kl"], "gold_at_time": at_time(side, reference, first)}
        means = {key: float(np.mean(values)) for key, values in by_prompt.items()}
        gained = means["gold"] - float(np.mean(reference["gold"]))
        found[name] = {
            **means,
            "gold_per_nat": gained / means["kl"] if means["kl"] else None,
            "seconds": end["seconds"],
            "seconds_to_gain": seconds_to(side, reference),
            "length": float(np.mean(end["length"])),
            "marks": [
                {k: float(np.mean(mark[k])) for k in ("step", "seconds", "gold", "kl")}
                for mark in side["marks"]
            ],
            "by_prompt": by_prompt,
        }
    return found


def over_seeds(values: Sequence[float | None], bounds: tuple[float, float] = UNBOUNDED) -> Figures:
    """Mean over seeds with a 95% interval by Student's t, as seeds are few; one alone has none.

    bounds: of the quantity; the interval is cut there.

    Returns:
        {mean, ci95, n, by_seed}; mean and interval are None where a seed's value is.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "ci95": None, "n": len(known), "by_seed": [*values]}
    return {**mean_interval(known).cut(bounds).as_dict(), "by_seed": [*values]}


def verdict(by_seed: Figures, by_prompt: Figures | None) -> str:
    """What a difference says: ``higher``, ``lower``, or that it is undecided.

    The intervals over seeds and over prompts must both leave out 0. One seed has only the second, and says
    nothing about others.
    """
    intervals = [part["ci95"] for part in (by_seed, by_prompt) if part is not None]
    if intervals[0] is None or None in intervals:
        return "undecided (one seed)"
    for word, sign in (("higher", 1.0), ("lower", -1.0)):
        if all(min(sign * end for end in ends) > 0 for ends in intervals):
            return word
    return "undecided"


def compared(records: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
    """All figures of the report.

    Args:
        records: the record of every seed, by the seed's number in words.

    Returns:
        ``reference``: mean gold; ``sides``: every measure over seeds; ``differences``: ours less theirs, by
        peer and measure, with ``by_seed`` (a seed is a unit), ``by_prompt`` (a prompt within its seed is one,
        the seeds as they are) and ``verdict``; ``curves``: the means at the marks.
    """
    seeds = {seed: of_seed(record) for seed, record in records.items()}
    names = [*next(iter(seeds.values()))]

    def each(name: str, measure: str) -> list[Any]:
        return [seed[name][measure] for seed in seeds.values()]

    differences: dict[str, Any] = {}
    for peer in names:
        if peer == "ours":
            continue
        differences[peer] = {}
        for measure in MEASURES:
            pairs = zip(each("ours", measure), each(peer, measure), strict=True)
            by_seed = over_seeds([None if None in pair else pair[0] - pair[1] for pair in pairs])
            by_prompt = None
            if measure in BY_PROMPT:
                some = [np.subtract(s["ours"]["by_prompt"][measure], s[peer]["by_prompt"][measure])
                        for s in seeds.values()]  # fmt: skip
                by_prompt = mean_interval(np.concatenate(some)).as_dict()
            told = {"by_seed": by_seed, "by_prompt": by_prompt, "verdict": verdict(by_seed, by_prompt)}
            differences[peer][measure] = told
    measures = (*MEASURES, "seconds_to_gain", "length")
    return {
        "reference": over_seeds([float(np.mean(r["reference"]["gold"])) for r in records.values()]),
        "sides": {
            name: {
                key: over_seeds(each(name, key), AT_LEAST_0 if key == "kl" else UNBOUNDED) for key in measures
            }
            for name in names
        },
        "differences": differences,
        "curves": {seed: {name: side["marks"] for name, side in s.items()} for seed, s in seeds.items()},
    }
