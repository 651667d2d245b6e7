"""The training loop of context distillation, and what is measured on held-out sequences around it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from policy.distillation.data import Passage
from policy.distillation.loss import chunk_of, distil_kl, full_kl, measure
from policy.distillation.prompted import PromptedModel, cut
from policy.distillation.report import Measured
from policy.distillation.student import Student, Trunk, collate, width
from policy.distillation.teacher import TeacherFile
from policy.schedule import learning_rate_factor
from rlhf.artifacts import read_json, step_of, write_atomically
from rlhf.errors import UserError
from rlhf.metrics import Metrics
from rlhf.progress import progress
from rlhf.runtime import Runtime
from rlhf.schema import Distill
from rlhf.stage import StageRun

SHOWN = {"distill/kl": ".4f"}
_EPSILON = 1e-8  # of AdamW
_ORDER = 5  # sets the random numbers of this purpose apart


def batch_rows(seed: int, step: int, batch_size: int, number: int) -> list[int]:
    """Rows of an optimiser step, from 0: every pass has an order of its own, its last batch may be small."""
    epoch, index = divmod(step, -(-number // batch_size))
    order = np.random.default_rng([seed % 2**63, _ORDER, epoch]).permutation(number)
    return [int(row) for row in order[index * batch_size : (index + 1) * batch_size]]


class DistillTrainer:
    """Trains a student on a teacher's words.

    Args:
        student: at its start, on its device.
        runtime: the optimiser is made in it.
        file: the teacher's words on ``passages``.
        passages: all sequences; the first ``number`` are trained on.
        number: how many.
        trunk: states of all sequences below the first layer that learns, where they are kept.
        section: the recipe's ``distill`` section.
        seed: the recipe's seed.
        rate: learning rate of the first step.
        run: the open stage, for checkpoints.
        contract: fingerprint of tokenizer and template.
    """

    def __init__(
        self,
        *,
        student: Student,
        runtime: Runtime,
        file: TeacherFile,
        passages: Sequence[Passage],
        number: int,
        trunk: Trunk | None,
        section: Distill,
        seed: int,
        rate: float,
        run: StageRun,
        contract: str,
    ) -> None:
        self.student, self.runtime, self.file, self.trunk = student, runtime, file, trunk
        self.passages, self.number, self.section = passages, number, section
        self.seed, self.rate, self.run = seed, rate, run
        self.steps = steps_of(section, number)
        self._anchors = {"words": file.identity, "contract": contract}
        checkpoint = run.checkpoints.newest()
        self.done = self.saved = step_of(checkpoint)
        if checkpoint:
            student.load(checkpoint / "student")
        named = student.parameters()
        groups = [{"params": [*named.values()], "lr": rate}]
        runtime.prepare(student.module, groups, named, epsilon=_EPSILON)
        if checkpoint:
            self._restore(checkpoint)

    def train(self, leave: Callable[[Callable[[], None]], None]) -> None:
        """Run all remaining steps.

        Args:
            leave: called after every step with what saves it; ends the process where somebody asked for that.

        Raises:
            UserError: the loss or its gradient is not finite.
        """
        metrics = Metrics(
            self.run.folder, total=self.steps, done=self.done, shown=SHOWN, description="distill"
        )
        with contextlib.closing(metrics):
            for step in range(self.done, self.steps):
                began = time.monotonic()
                figures = self._step(step)
                metrics.log(step + 1, figures | {"time/step": time.monotonic() - began})
                self.done = step + 1
                if self.done == self.steps or self.done % self.section.checkpoint_every == 0:
                    self._checkpoint()
                leave(self._save)

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step: the mean KL over all tokens of the batch, a micro-batch at a time."""
        rate = self.rate * learning_rate_factor(step, self.steps, kind="linear", warmup=self.section.warmup)
        self.runtime.set_learning_rates([rate])
        rows = batch_rows(self.seed, step, self.section.batch_size, self.number)
        total = sum(len(self.passages[row].ids) - self.passages[row].first for row in rows)
        parts = cut([width(self.passages[row]) for row in rows], self.section.tokens_per_micro_batch)
        sums: dict[str, list[float]] = {}
        with self.student.folded():
            for index, part in enumerate(parts):
                batch = collate([rows[n] for n in part], self.passages, self.file, self.runtime.device)
                hidden_ND = self.student.states(batch, self.trunk)
                kl_N = distil_kl(
                    hidden_ND, self.student.head, batch.words, chunk=chunk_of(self.student.vocabulary)
                )
                self.runtime.backward(kl_N.sum() / total, last=index == len(parts) - 1)
                by_row = torch.zeros(len(part), device=kl_N.device).index_add(0, batch.row_N, kl_N.detach())
                for row, kl in zip(batch.rows, by_row.tolist(), strict=True):
                    passage = self.passages[row]
                    sums.setdefault(passage.half, []).append(kl)
                    sums.setdefault(f"{passage.half}_tokens", []).append(len(passage.ids) - passage.first)
        found = {name: sum(values) for name, values in sums.items()}
        halves = [name for name in found if not name.endswith("_tokens")]
        norm = self.runtime.step()
        loss = sum(found[half] for half in halves) / total
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise UserError(
                f"distill: the loss ({loss:g}) or its gradient ({norm:g}) is not finite in step {step + 1}: "
                f"lower distill.learning_rate, which is {self.rate:g}"
            )
        figures = {"distill/kl": loss}
        figures |= {f"distill/kl_{half}": found[half] / found[f"{half}_tokens"] for half in halves}
        return figures | {
            "distill/learning_rate": rate,
            "distill/grad_norm": norm,
            "distill/tokens": float(total),
        }

    def _save(self) -> None:
        """Write a checkpoint unless there is one of this step."""
        if self.saved != self.done:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Write everything that the next step depends on."""
        self.run.checkpoints.clean()
        with self.run.checkpoints.writing(self.done) as folder:
            (folder / "student").mkdir()
            self.student.save(folder / "student")
            write_atomically(folder / "optimizer.safetensors", save(self.runtime.optimizer_tensors()))
            write_atomically(folder / "state.json", json.dumps({"step": self.done, **self._anchors}))
        self.run.note_clock()
        self.saved = self.done

    def _restore(self, checkpoint: Path) -> None:
        """Put the optimiser back; the weights were read before it was made.

        Raises:
            UserError: the optimiser's state is missing, or the teacher's words or the tokenizer are others.
        """
        state = read_json(checkpoint / "state.json")
        for anchor, what in (("words", "the teacher's words have"), ("contract", "the tokenizer has")):
            if state[anchor] != self._anchors[anchor]:
                raise UserError(
                    f"{checkpoint}: {what} changed since it was written, so the run cannot go on; put the "
                    f"old back, or remove {self.run.folder} to start again"
                )
        try:
            self.runtime.load_optimizer_tensors(load_file(checkpoint / "optimizer.safetensors"))
        except (KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{checkpoint}: the optimiser state is incomplete ({error}); "
                f"remove {checkpoint} to go on from the one before"
            ) from None
        print(f"distill: going on after step {self.done} of {self.steps}", flush=True)


def steps_of(section: Distill, number: int) -> int:
    """Optimiser steps of a recipe over so many sequences.

    Raises:
        UserError: all of them would be warm-up.
    """
    steps = section.epochs * -(-number // section.batch_size)
    if section.warmup >= steps:
        raise UserError(
            f"distill.warmup: {section.warmup} leaves nothing of {steps} steps, with {number} sequences to "
            "train on"
        )
    return steps


@torch.no_grad()
def measured(
    student: Student,
    teacher: Callable[[], PromptedModel],
    file: TeacherFile,
    passages: Sequence[Passage],
    rows: Sequence[int],
    trunk: Trunk | None,
    *,
    budget: int,
    full: int,
) -> Measured:
    """What the student says of held-out sequences, beside the teacher's words.

    Args:
        student: the model.
        teacher: gives the teacher; not called where ``full`` is 0.
        file: the teacher's words on ``passages``.
        passages: all sequences.
        rows: the held-out ones.
        trunk: as in :class:`DistillTrainer`.
        budget: tokens in memory at once.
        full: number of sequences, the first ones, whose KL over the whole vocabulary is measured too.
    """
    device = next(student.module.parameters()).device
    chunk = chunk_of(student.vocabulary)
    sums = {name: np.zeros(len(rows)) for name in ("kl", "places", "log_prob", "taught", "spoken")}
    with student.folded():
        for part in progress("held out", cut([width(passages[row]) for row in rows], budget)):
            batch = collate([rows[n] for n in part], passages, file, device)
            hidden_ND = student.states(batch, trunk)
            kl_N, log_prob_N = measure(hidden_ND, student.head, batch.words, batch.targets_N, chunk=chunk)
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
    first = progress("held out, whole vocabulary", rows[:full])
    whole = [_full(student, teacher(), row, passages, file, trunk) for row in first]
    return Measured(
        **{name: sums[name].tolist() for name in ("kl", "places", "log_prob", "taught", "spoken")},
        full_kl=whole,
        full_coarse=sums["kl"][: len(whole)].tolist(),
    )


def _full(
    student: Student,
    teacher: PromptedModel,
    row: int,
    passages: Sequence[Passage],
    file: TeacherFile,
    trunk: Trunk | None,
) -> float:
    """Sum over a sequence's places of the KL over the whole vocabulary."""
    passage = passages[row]
    batch = collate([row], passages, file, next(student.module.parameters()).device)
    theirs_ND = teacher.states([passage])[passage.first - teacher.first_of(passage) :]
    mine_ND = student.states(batch, trunk)
    total = 0.0
    for start in range(0, len(mine_ND), chunk_of(student.vocabulary)):
        part = slice(start, start + chunk_of(student.vocabulary))
        theirs_CV, mine_CV = teacher.head(theirs_ND[part]), student.head(mine_ND[part])
        shared = min(theirs_CV.shape[-1], mine_CV.shape[-1])
        total += float(full_kl(theirs_CV[:, :shared], mine_CV[:, :shared]).double().sum())
    return total
