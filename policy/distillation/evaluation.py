"""What context distillation brings on held-out sequences: KL and log-probs before and after, with intervals.

Every figure is a ratio of sums over sequences, with an interval over texts and prompts, whose sequences
depend on each other (:func:`rlhf.stats.intervals.cluster_mean_interval`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from policy.distillation.data import HALVES, QUESTIONS, Passage
from policy.distillation.loss import full_kl, kl_and_log_probs
from policy.distillation.student import Student, collate
from policy.distillation.teacher import PromptedModel
from policy.distillation.teacher_cache import TeacherCache
from rlhf.markdown import percent, plain
from rlhf.models.log_probs import chunk_of
from rlhf.models.token_batches import token_batches
from rlhf.models.trunk_cache import TrunkCache
from rlhf.stats.intervals import Estimate, cluster_mean_interval
from rlhf.training.progress import progress
from rlhf.training.runtime import Runtime


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


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out sequences, and all that a student is measured with on them."""

    cache: TeacherCache
    """The teacher's log-probs on ``passages``."""
    passages: Sequence[Passage]
    """All sequences."""
    rows: Sequence[int]
    """The held-out ones."""
    trunk: TrunkCache | None
    """States of all below the first layer that learns, where they are kept."""
    runtime: Runtime
    """The processes; they share the batches, which do not depend on their number."""
    budget: int
    """Tokens in memory at once."""
    full: int
    """Number of sequences, the first ones, whose KL over the whole vocabulary is measured too."""

    @torch.no_grad()
    def measure(self, student: Student, teacher: PromptedModel | None) -> Measured:
        """A student's KL and log-probs; every process must call it, and gets the figures.

        teacher: needed where ``full`` is not 0.
        """
        device, chunk = student.device, chunk_of(student.vocabulary)
        runtime, rows = self.runtime, self.rows
        shared = runtime.world > 1 and not runtime.shards_weights  # else every pass is everybody's
        mine = slice(runtime.rank, None, runtime.world) if shared else slice(None)
        sums_6R = torch.zeros(6, len(rows), dtype=torch.float64)
        with student.folded():
            widths = [len(self.passages[row].student_ids) for row in rows]
            for part in progress("held out", token_batches(widths, self.budget)[mine]):
                batch = collate([rows[n] for n in part], self.passages, self.cache, device)
                kl_N, log_prob_N = kl_and_log_probs(
                    student.states(batch, self.trunk),
                    student.head,
                    batch.teacher,
                    batch.targets_N,
                    chunk=chunk,
                )
                mask_N, ones_N = batch.response_N, torch.ones_like(kl_N)
                taught_N = batch.teacher_log_probs_N
                values = kl_N, ones_N, log_prob_N * mask_N, taught_N * mask_N, ones_N * mask_N
                of = batch.row_N.cpu().numpy()
                for sums_R, values_N in zip(sums_6R, values, strict=False):
                    found = np.bincount(of, weights=values_N.double().cpu().numpy(), minlength=len(part))
                    sums_R[part] = torch.from_numpy(found)
        number = min(self.full, len(rows))
        for n in progress("held out, whole vocabulary", range(number)[mine]):
            assert teacher, "the KL over the whole vocabulary needs the teacher itself"
            sums_6R[5, n] = self._full_kl(student, teacher, rows[n])
        if shared:
            sums_6R = runtime.all_sum(sums_6R.to(device))
        kl, places, log_prob, taught, spoken, whole = sums_6R.tolist()
        return Measured(kl, places, log_prob, taught, spoken, whole[:number], kl[:number])

    def _full_kl(self, student: Student, teacher: PromptedModel, row: int) -> float:
        """Sum over a sequence's places of the KL over the whole vocabulary, in nats."""
        passage, chunk = self.passages[row], chunk_of(student.vocabulary)
        batch = collate([row], self.passages, self.cache, student.device)
        theirs_ND = teacher.states([passage])[passage.first - teacher.first_of(passage) :]
        mine_ND = student.states(batch, self.trunk)
        total = 0.0
        for start in range(0, len(mine_ND), chunk):
            part = slice(start, start + chunk)
            theirs_CV, mine_CV = teacher.head(theirs_ND[part]), student.head(mine_ND[part])
            shared = min(theirs_CV.shape[-1], mine_CV.shape[-1])
            total += float(full_kl(theirs_CV[:, :shared], mine_CV[:, :shared]).double().sum())
        return total


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
    halves = {name: found[name] for name in HALVES if name in found}
    out = []
    for name, part in ({"held out": found} | halves).items():
        start = ""
        if "kl_start" in part:
            share = percent(part["recovered_at_start"])
            start = f"{plain(part['kl_start'], '.4f')} at the start ({share} recovered) -> "
        out.append(
            f"{name}: KL(teacher || student) {plain(part['kl_before'], '.4f')} -> {start}"
            f"{plain(part['kl_after'], '.4f')} nats a token, {percent(part['kl_recovered'])} of the "
            f"prompt's effect recovered ({part['sequences']} sequences, {part['tokens']} tokens)"
        )
    if "full_kl_before" in found:
        full, coarse = (
            " -> ".join(plain(found[f"{key}_{when}"], ".4f") for when in ("before", "after"))
            for key in ("full_kl", "full_coarse_kl")
        )
        out.append(
            f"whole vocabulary: {full} nats a token (on the stored tokens of the same sequences {coarse})"
        )
    for name, part in halves.items():
        share = part["log_prob_recovered"]
        of = f"{percent(share)} of it" if share else "the prompt's gain is not distinguishable from 0"
        out.append(
            f"{name}: log-prob of the {'answers' if name == QUESTIONS else 'texts'}: the prompt brings "
            f"{plain(part['prompt_gain'], '.4f')} nats a token, distillation "
            f"{plain(part['distilled_gain'], '.4f')}; {of}"
        )
    return out
