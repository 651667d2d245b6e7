"""What is measured on held-out sequences before and after a distillation.

Several processes share the batches; which rows are read together does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policy.distillation.data import Passage
from policy.distillation.loss import full_kl, measure
from policy.distillation.prompted_model import PromptedModel
from policy.distillation.report import Measured
from policy.distillation.student import Student, collate, width
from policy.distillation.teacher_cache import TeacherCache
from rlhf.models.log_probs import chunk_of
from rlhf.models.token_batches import token_batches
from rlhf.models.trunk_cache import TrunkCache
from rlhf.training.progress import progress
from rlhf.training.runtime import Runtime


@torch.no_grad()
def measured(
    student: Student,
    runtime: Runtime,
    teacher: Callable[[], PromptedModel],
    file: TeacherCache,
    passages: Sequence[Passage],
    rows: Sequence[int],
    trunk: TrunkCache | None,
    *,
    budget: int,
    full: int,
) -> Measured:
    """The student's KL and loss on held-out sequences.

    Args:
        student: the model.
        runtime: the processes; all of them call this, and all get the figures.
        teacher: gives the teacher; not called where ``full`` is 0.
        file: the teacher's log-probs on ``passages``.
        passages: all sequences.
        rows: the held-out ones.
        trunk: its states below the first layer that learns, where they are kept.
        budget: tokens in memory at once.
        full: number of sequences, the first ones, whose KL over the whole vocabulary is measured too.
    """
    device = student.device
    chunk = chunk_of(student.vocabulary)
    shared = runtime.world > 1 and not runtime.shards_weights  # a pass over sharded weights is everybody's

    def mine(work: Sequence[Any]) -> Sequence[Any]:
        return work[runtime.rank :: runtime.world] if shared else work

    sums = {name: np.zeros(len(rows)) for name in ("kl", "places", "log_prob", "taught", "spoken")}
    with student.folded():
        for part in progress("held out", mine(token_batches([width(passages[row]) for row in rows], budget))):
            batch = collate([rows[n] for n in part], passages, file, device)
            hidden_ND = student.states(batch, trunk)
            kl_N, log_prob_N = measure(hidden_ND, student.head, batch.teacher, batch.targets_N, chunk=chunk)
            of, spoken = batch.row_N.cpu().numpy(), batch.spoken_N.cpu().numpy()
            for name, values_N, counted in (
                ("kl", kl_N, np.ones_like(spoken)),
                ("places", torch.ones_like(kl_N), np.ones_like(spoken)),
                ("log_prob", log_prob_N, spoken),
                ("taught", batch.taught_N, spoken),
                ("spoken", torch.ones_like(kl_N), spoken),
            ):
                weights = values_N.double().cpu().numpy() * counted
                sums[name][part] = np.bincount(of, weights=weights, minlength=len(part))
    whole = np.zeros(min(full, len(rows)))
    for n in progress("held out, whole vocabulary", mine(range(len(whole)))):
        whole[n] = _full(student, teacher(), rows[n], passages, file, trunk)

    def of_all(own: NDArray[np.float64]) -> list[float]:
        """Sums of all rows; a row was read by one process, or by all of them alike."""
        total = torch.from_numpy(own).to(device)
        return [float(x) for x in (runtime.all_sum(total) if shared else total)]

    found = {name: of_all(own) for name, own in sums.items()}
    return Measured(**found, full_kl=of_all(whole), full_coarse=found["kl"][: len(whole)])


def _full(
    student: Student,
    teacher: PromptedModel,
    row: int,
    passages: Sequence[Passage],
    file: TeacherCache,
    trunk: TrunkCache | None,
) -> float:
    """Sum over a sequence's places of the KL over the whole vocabulary."""
    passage = passages[row]
    batch = collate([row], passages, file, student.device)
    theirs_ND = teacher.states([passage])[passage.first - teacher.first_of(passage) :]
    mine_ND = student.states(batch, trunk)
    total = 0.0
    for start in range(0, len(mine_ND), chunk_of(student.vocabulary)):
        part = slice(start, start + chunk_of(student.vocabulary))
        theirs_CV, mine_CV = teacher.head(theirs_ND[part]), student.head(mine_ND[part])
        shared = min(theirs_CV.shape[-1], mine_CV.shape[-1])
        total += float(full_kl(theirs_CV[:, :shared], mine_CV[:, :shared]).double().sum())
    return total
