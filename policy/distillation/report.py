"""What context distillation has brought, on held-out sequences: figures for the manifest, lines to print.

Every figure is a ratio of sums over sequences, with an interval over texts and prompts, whose sequences
depend on each other (:func:`rlhf.stats.intervals.cluster_mean_interval`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.stats.intervals import Estimate, cluster_mean_interval

Sums = NDArray[np.float64]


class Measured(NamedTuple):
    """Sums over the places of each held-out sequence, one entry a sequence; a list or array each."""

    kl: Any
    """KL(teacher || student) on the stored tokens and the rest, in nats."""
    places: Any
    """How many places."""
    log_prob: Any
    """The student's log-prob of the answer's tokens (of a text: of all)."""
    taught: Any
    """The teacher's log-prob of the same, which it has from the prompt."""
    spoken: Any
    """How many tokens these are."""
    full_kl: Any
    """KL over the whole vocabulary of the first sequences."""
    full_coarse: Any
    """KL on the stored tokens and the rest of the same."""


def figures(
    before: Measured,
    after: Measured,
    halves: Sequence[str],
    groups: Sequence[str],
    start: Measured | None = None,
) -> dict[str, Any]:
    """Figures of all sequences and of each half.

    Args:
        before: of the base, without the prompt.
        after: of the trained student.
        halves: ``texts`` or ``questions``, a sequence.
        groups: the text or prompt of each.
        start: of the student as it started, where that was not the base.

    Returns:
        ``kl_before``, ``kl_after`` in nats a token; ``kl_recovered`` = 1 - after / before, the share of the
        prompt's effect on the distribution that the weights have taken over; ``prompt_gain`` and
        ``distilled_gain`` = log-prob of the answers' tokens under the prompt and after distillation, less
        that before, nats a token; ``log_prob_recovered`` = their ratio, None where the prompt's gain cannot
        be told from 0; ``full_...``: the KL over the whole vocabulary and, on the same first sequences, its
        lower bound; ``kl_start`` and ``recovered_at_start`` where there is a start. Each with mean, 95%
        interval and number of texts and prompts; and so again by half.
    """
    found = _figures(before, after, groups, start)
    number = len(before.full_kl)
    if number:
        places = np.asarray(before.places[:number], dtype=np.float64)
        for name, measured in (("before", before), ("after", after)):
            for key, sums in (("full_kl", measured.full_kl), ("full_coarse_kl", measured.full_coarse)):
                found[f"{key}_{name}"] = _ratio(sums, places, groups[:number]).as_dict()
        found["full_kl_recovered"] = _share_gone(before.full_kl, after.full_kl, groups[:number]).as_dict()
    for half in sorted(set(halves)):
        chosen = [n for n, name in enumerate(halves) if name == half]
        own_start = start and _some(start, chosen)
        own_groups = [groups[n] for n in chosen]
        found[half] = _figures(_some(before, chosen), _some(after, chosen), own_groups, own_start)
    return found


def _some(measured: Measured, rows: Sequence[int]) -> Measured:
    """Some sequences, without the KL over the whole vocabulary, which is of the first ones."""
    sums = {name: np.asarray(getattr(measured, name))[rows] for name in Measured._fields[:5]}
    return Measured(**sums, full_kl=[], full_coarse=[])


def _figures(
    before: Measured, after: Measured, groups: Sequence[str], start: Measured | None
) -> dict[str, Any]:
    prompted = np.asarray(before.taught) - np.asarray(before.log_prob)
    distilled = np.asarray(after.log_prob) - np.asarray(before.log_prob)
    gain = _ratio(prompted, before.spoken, groups)
    told_apart = not math.isnan(gain.low) and (gain.low > 0 or gain.high < 0)
    recovered = _ratio(distilled, prompted, groups).as_dict() if told_apart else None
    started = start and {
        "kl_start": _ratio(start.kl, start.places, groups).as_dict(),
        "recovered_at_start": _share_gone(before.kl, start.kl, groups).as_dict(),
    }
    return (started or {}) | {
        "sequences": len(groups),
        "tokens": int(np.sum(before.places)),
        "kl_before": _ratio(before.kl, before.places, groups).as_dict(),
        "kl_after": _ratio(after.kl, after.places, groups).as_dict(),
        "kl_recovered": _share_gone(before.kl, after.kl, groups).as_dict(),
        "prompt_gain": gain.as_dict(),
        "distilled_gain": _ratio(distilled, before.spoken, groups).as_dict(),
        "log_prob_recovered": recovered,
    }


def _ratio(numerators: Any, denominators: Any, groups: Sequence[str]) -> Estimate:
    """Ratio of sums, clustered by group."""
    names: dict[str, int] = {}
    of = [names.setdefault(group, len(names)) for group in groups]
    sums = (np.bincount(of, weights=np.asarray(x, dtype=np.float64)) for x in (numerators, denominators))
    return cluster_mean_interval(*sums)


def _share_gone(before: Any, after: Any, groups: Sequence[str]) -> Estimate:
    """1 - sum of after / sum of before; NaN where there was nothing before."""
    if not np.sum(before):
        return Estimate(math.nan, math.nan, math.nan, 0)
    left = _ratio(after, before, groups)
    return Estimate(1.0 - left.mean, 1.0 - left.high, 1.0 - left.low, left.n)


def lines(found: dict[str, Any]) -> list[str]:
    """The figures in words, a line each."""
    halves = {name: found[name] for name in ("texts", "questions") if name in found}
    said = []
    for name, part in ({"": found} | halves).items():
        start = ""
        if "kl_start" in part:
            share = shown(part["recovered_at_start"], percent=True)
            start = f"{shown(part['kl_start'])} at the start ({share} recovered) -> "
        said.append(
            f"{name or 'held out'}: KL(teacher || student) {shown(part['kl_before'])} -> {start}"
            f"{shown(part['kl_after'])} nats a token, {shown(part['kl_recovered'], percent=True)} of the "
            f"prompt's effect recovered ({part['sequences']} sequences, {part['tokens']} tokens)"
        )
    if "full_kl_before" in found:
        said.append(
            f"whole vocabulary: {shown(found['full_kl_before'])} -> {shown(found['full_kl_after'])} nats a "
            f"token (on the stored tokens of the same sequences {shown(found['full_coarse_kl_before'])} -> "
            f"{shown(found['full_coarse_kl_after'])})"
        )
    for name, part in halves.items():
        share = part["log_prob_recovered"]
        of = f"{shown(share, percent=True)} of it" if share else "the prompt's gain cannot be told from 0"
        said.append(
            f"{name}: log-prob of the {'answers' if name == 'questions' else 'texts'}: the prompt brings "
            f"{shown(part['prompt_gain'])} nats a token, distillation {shown(part['distilled_gain'])}; {of}"
        )
    return said


def shown(estimate: dict[str, Any], *, percent: bool = False) -> str:
    """An estimate as ``mean [low, high]``."""
    mean, ends = estimate["mean"], estimate["ci95"]
    if mean is None:
        return "unknown"
    form = (lambda x: f"{100 * x:.1f}%") if percent else (lambda x: f"{x:.4f}")
    return form(mean) + (f" [{form(ends[0])}, {form(ends[1])}]" if ends else "")
