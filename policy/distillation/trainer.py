"""The training loop of context distillation.

Several processes share the sequences of every batch. Which sequences make a batch does not depend on their
number, and the loss of each is its share of the whole batch's tokens.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from policy.distillation.data import HALVES, Passage
from policy.distillation.loss import distill_kl
from policy.distillation.student import Batch, Student, collate
from policy.distillation.teacher_cache import TeacherCache
from rlhf.errors import UserError
from rlhf.models.log_probs import chunk_of
from rlhf.models.token_batches import token_batches
from rlhf.models.trunk_cache import TrunkCache
from rlhf.recipe.schema import Distill
from rlhf.runs.artifacts import (
    Checkpoints,
    check_anchors,
    optimizer_state_of,
    read_json,
    step_of,
    write_atomically,
)
from rlhf.training.metrics import Metrics
from rlhf.training.runtime import Runtime, all_max
from rlhf.training.schedule import learning_rate_factor
from rlhf.training.signals import StopRequest

SHOWN = {"distill/kl": ".4f"}
_ANCHORS = {"words": "the cache of the teacher's log-probs", "contract": "the tokenizer or its template"}
_EPSILON = 1e-8  # of AdamW
_ORDER = 5  # sets the random numbers of this purpose apart


def batch_rows(seed: int, step: int, batch_size: int, number: int) -> list[int]:
    """Rows of an optimizer step, from 0: every pass has an order of its own, its last batch may be small."""
    epoch, index = divmod(step, -(-number // batch_size))
    order = np.random.default_rng([seed % 2**63, _ORDER, epoch]).permutation(number)
    return [int(row) for row in order[index * batch_size : (index + 1) * batch_size]]


class DistillStep(nn.Module):
    """The forward pass of a step as one module, as DeepSpeed wants it."""

    def __init__(self, student: Student, trunk: TrunkCache | None) -> None:
        super().__init__()
        self.inside = student.module
        self._student, self._trunk = student, trunk

    def forward(self, batch: Batch) -> Tensor:
        """KL(teacher || student) at each place of a batch, [N], nats."""
        hidden_ND = self._student.states(batch, self._trunk)
        chunk = chunk_of(self._student.vocabulary)
        return distill_kl(hidden_ND, self._student.head, batch.teacher, chunk=chunk)


class DistillTrainer:
    """Trains a student on a teacher's log-probs.

    Args:
        student: at its start, on its device.
        runtime: the optimizer is made in it.
        cache: the teacher's log-probs on ``passages``.
        passages: all sequences; the first ``number`` are trained on.
        number: how many.
        trunk: states of all sequences below the first layer that learns, where they are kept.
        section: the recipe's ``distill`` section.
        seed: the recipe's seed.
        rate: learning rate of the first step.
        contract: fingerprint of tokenizer and template.
        folder: where checkpoints and ``metrics.jsonl`` go.
        on_checkpoint: called behind every checkpoint, on the main process.
        stop: whether somebody asked the run to end.
    """

    def __init__(
        self,
        *,
        student: Student,
        runtime: Runtime,
        cache: TeacherCache,
        passages: Sequence[Passage],
        number: int,
        trunk: TrunkCache | None,
        section: Distill,
        seed: int,
        rate: float,
        contract: str,
        folder: Path,
        on_checkpoint: Callable[[], None] = lambda: None,
        stop: StopRequest | None = None,
    ) -> None:
        self.stop = stop or StopRequest()
        self.student, self.runtime, self.cache, self.trunk = student, runtime, cache, trunk
        self.passages, self.number, self.section = passages, number, section
        self.seed, self.rate, self.folder, self.on_checkpoint = seed, rate, folder, on_checkpoint
        self.is_main = runtime.rank == 0
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.steps = steps_of(section, number)
        self._anchors = {"words": cache.identity, "contract": contract}
        checkpoint = self.checkpoints.newest()
        self.done = self.saved = step_of(checkpoint)
        if checkpoint:
            student.load(checkpoint / "student")
        named = student.parameters()
        groups = [{"params": [*named.values()], "lr": rate}]
        runtime.prepare(DistillStep(student, trunk), groups, named, epsilon=_EPSILON)
        if checkpoint:
            self._restore(checkpoint)

    def train(self) -> None:
        """Run all remaining steps.

        Raises:
            UserError: the loss or its gradient is not finite.
            SystemExit: SIGTERM was received; a checkpoint has been written.
        """
        metrics = Metrics(
            self.folder,
            total=self.steps,
            done=self.done,
            shown=SHOWN,
            description="distill",
            active=self.is_main,
        )
        with contextlib.closing(metrics):
            for step in range(self.done, self.steps):
                began = time.monotonic()
                figures = self._step(step)
                metrics.log(step + 1, figures | {"time/step": time.monotonic() - began})
                self.done = step + 1
                if self.done == self.steps or self.done % self.section.checkpoint_every == 0:
                    self._checkpoint()
                if self.runtime.any_process(self.stop.asked):
                    if self.saved != self.done:
                        self._checkpoint()
                    kept = f"saved after step {self.done} of {self.steps}"
                    self.stop.leave("distill", kept, is_main=self.is_main)

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step: the mean KL over all tokens of the batch, a micro-batch at a time."""
        rate = self.rate * learning_rate_factor(
            step, self.steps, kind="linear", warmup=self.section.warmup_steps
        )
        self.runtime.set_learning_rates([rate])
        rows = batch_rows(self.seed, step, self.section.batch_size, self.number)
        total = sum(self.passages[row].places for row in rows)
        sums = torch.zeros(len(HALVES), 2, dtype=torch.float64)  # KL and places of each half
        parts = self._micro_batches(rows)
        with self.student.folded():
            for index, (part, weight) in enumerate(parts):
                batch = collate(part, self.passages, self.cache, self.runtime.device)
                kl_N = weight * self.runtime.model(batch)
                self.runtime.backward(kl_N.sum() / total, last=index == len(parts) - 1)
                by_row = torch.zeros(len(part), device=kl_N.device).index_add(0, batch.row_N, kl_N.detach())
                for row, kl in zip(part, by_row.tolist(), strict=True):
                    passage = self.passages[row]
                    found = torch.tensor([kl, weight * passage.places], dtype=torch.float64)
                    sums[HALVES.index(passage.half)] += found
        norm = self.runtime.step()
        by_half = self.runtime.all_sum(sums.to(self.runtime.device)).tolist()
        loss = sum(kl for kl, _ in by_half) / total
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise UserError(
                f"distill: the loss ({loss:g}) or its gradient ({norm:g}) is not finite in step {step + 1}: "
                f"lower distill.learning_rate, which is {self.rate:g}"
            )
        return {
            "distill/kl": loss,
            **{
                f"distill/kl_{half}": kl / places
                for half, (kl, places) in zip(HALVES, by_half, strict=True)
                if places
            },
            "distill/learning_rate": rate,
            "distill/grad_norm": norm,
            "distill/tokens": float(total),
        }

    def _micro_batches(self, rows: Sequence[int]) -> list[tuple[list[int], float]]:
        """This process's micro-batches of a step, each with its weight; all processes have as many.

        Whoever is done goes on with weight 0: a backward pass over several processes is everybody's.
        """
        own = rows[self.runtime.rank :: self.runtime.world]
        widths = [len(self.passages[row].student_ids) for row in own]
        parts = [
            ([own[n] for n in part], 1.0)
            for part in token_batches(widths, self.section.tokens_per_micro_batch)
        ]
        number = all_max(len(parts), self.runtime.device)
        return parts + [([rows[0]], 0.0)] * (number - len(parts))

    def _checkpoint(self) -> None:
        """Write everything that the next step depends on."""
        weights = self.runtime.gather_state() if self.runtime.shards_weights else None
        moments = self.runtime.optimizer_tensors()
        if self.is_main:
            self.checkpoints.clean()
            with self.checkpoints.writing(self.done) as folder:
                (folder / "student").mkdir()
                self.student.save(folder / "student", weights)
                write_atomically(folder / "optimizer.safetensors", save(moments))
                write_atomically(folder / "state.json", json.dumps({"step": self.done, **self._anchors}))
            self.on_checkpoint()
        self.runtime.barrier()
        self.saved = self.done

    def _restore(self, checkpoint: Path) -> None:
        """Put the optimizer back; the weights were read before it was made.

        Raises:
            UserError: the optimizer's state is missing, or the teacher's log-probs or the tokenizer are
            others.
        """
        state = read_json(checkpoint / "state.json")
        check_anchors(checkpoint, state, self._anchors, _ANCHORS)
        with optimizer_state_of(checkpoint):
            self.runtime.load_optimizer_tensors(load_file(checkpoint / "optimizer.safetensors"))
        if self.is_main:
            print(f"distill: going on after step {self.done} of {self.steps}", flush=True)


def steps_of(section: Distill, number: int) -> int:
    """Optimizer steps of a recipe over so many sequences.

    Raises:
        UserError: all of them would be warm-up.
    """
    steps = section.epochs * -(-number // section.batch_size)
    if section.warmup_steps >= steps:
        raise UserError(
            f"distill.warmup_steps: {section.warmup_steps} leaves nothing of {steps} steps, with "
            f"{number} sequences to train on"
        )
    return steps
