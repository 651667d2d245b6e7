"""A context distilled into a rung by the project's own trainer: the rung under the context teaches itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policy.distillation.data import TEXTS, Passage
from policy.distillation.evaluation import HeldOut, figures
from policy.distillation.loss import full_kl, kl_and_log_probs
from policy.distillation.student import Batch, Student, collate
from policy.distillation.teacher import PromptedModel
from policy.distillation.teacher_cache import TeacherCache, shard_records
from policy.distillation.trainer import DistillTrainer
from rlhf.models.backbone import Backbone
from rlhf.models.log_probs import chunk_of
from rlhf.recipe.schema import Distill, Distributed
from rlhf.training.metrics import read_metrics
from rlhf.training.runtime import Runtime
from studies.engine.units import Settings
from studies.scaling.adapters import bare_ids, lead_of, quiet_folder
from studies.scaling.data.texts import Library

TOKENS_AT_ONCE = 4096
CONTINUED = "continuations"
FULL_KL = 16  # held-out sequences whose KL is also taken over the whole vocabulary
_ROUNDING = 1e-5  # nats; a lower bound may exceed its number by as much
Taught = tuple[PromptedModel, TeacherCache]
Teach = Callable[[Sequence[int], Sequence[Passage], str], Taught]


def passages(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], lead: Sequence[int]) -> list[Passage]:
    """Texts as what teacher and student read; the lead stands before the student's."""
    none = np.zeros(0, dtype=np.uint32)
    before = np.asarray(lead, dtype=np.uint32)
    return [
        Passage(TEXTS, text, none, before, np.asarray(bare_ids(tokenizer, text), dtype=np.uint32), 0, 0)
        for text in texts
    ]


def distil(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    library: Library,
    s: Settings,
    folder: Path,
    *,
    continued: bool,
) -> dict[str, Any]:
    """Distil a context into the adapter; returns its figures on held-out texts.

    The teacher is the rung itself under the context, the student the rung with the adapter, without it
    (Askell 2021; Bai 2022, A.1, but for the size of the data and generic text only).

    folder: for what the loop writes; it is removed at the end. continued: the context is the library's own,
    so its effect on the log-probability of text is measured on continuations of its story, where it helps;
    else on the held-out texts, as the KL always is.

    Beside the figures: ``empty_context_kl``, the largest KL at any place with no context and a fresh adapter,
    which is exactly 0, and ``bounded``, the share of places where the KL on k + 1 classes is no larger than
    the whole one.
    """
    student = Student.of(backbone)
    lead, known = lead_of(tokenizer), bare_ids(tokenizer, context)
    train, test = (
        passages(tokenizer, library.stories(purpose, number, s["words"]), lead)
        for purpose, number in (("distil", s["sequences"]), ("distil test", s["test"]))
    )
    halves = [TEXTS] * len(test)
    if continued:
        test += passages(tokenizer, library.continuations(s["test"], s["words"]), lead)
        halves += [CONTINUED] * (len(test) - len(halves))
    every, rows = [*train, *test], range(len(train), len(train) + len(test))
    section = Distill(
        texts=["the library's"],
        text_share=1.0,
        epochs=s["epochs"],
        batch_size=min(s["batch"], len(train)),
        tokens_per_micro_batch=TOKENS_AT_ONCE,
        checkpoint_every=10**6,
    )
    runtime = Runtime(Distributed(), seed=s["seed"], max_grad_norm=section.max_grad_norm, micro_batch_size=1)

    def taught(prefix_ids: Sequence[int], some: Sequence[Passage], name: str) -> Taught:
        """The rung behind these tokens, and what it says about passages."""
        model = PromptedModel(backbone, prefix_ids)
        k, vocabulary = min(s["top_k"], student.vocabulary - 1), student.vocabulary
        cache = TeacherCache(
            folder / name, {}, [len(p.ids) for p in some], k=k, vocabulary=vocabulary, shard=len(some)
        )
        cache.write(0, shard_records(model, some, cache, TOKENS_AT_ONCE))
        return model, cache

    with quiet_folder(folder):
        nothing = _without_context(student, taught, test[:FULL_KL])
        teacher, cache = taught((*lead, *known), every, "teacher")
        held_out = HeldOut(cache, every, rows, None, runtime, budget=TOKENS_AT_ONCE, full=FULL_KL)
        look = partial(held_out.measure, student, teacher)
        bounded = partial(_bounded, student, teacher, cache, every, rows[:FULL_KL])
        before, bound = look(), bounded()
        DistillTrainer(
            student=student,
            runtime=runtime,
            cache=cache,
            passages=every,
            number=len(train),
            trunk=None,
            section=section,
            seed=s["seed"],
            rate=s["learning_rate"],
            contract="",
            folder=folder,
        ).train()
        losses = [row["distill/kl"] for row in read_metrics(folder)]
        after, bound_after = look(), bounded()
    found = figures(before, after, halves, [str(n) for n in range(len(test))])
    of_texts, of_context = found[TEXTS], found[CONTINUED if continued else TEXTS]
    return {
        **{key: of_texts[key] for key in ("kl_before", "kl_after", "kl_recovered")},
        **{key: of_context[key] for key in ("prompt_gain", "distilled_gain", "log_prob_recovered")},
        **{key: found[key] for key in ("full_kl_before", "full_kl_after")},
        "empty_context_kl": nothing,
        "bounded": (bound + bound_after) / 2,
        "context_tokens": len(known),
        "losses": [losses[0], losses[-1]],
    }


def _without_context(student: Student, taught: Teach, some: Sequence[Passage]) -> float:
    """The largest KL at any place from a teacher that reads what the student reads, in the same pass."""
    same = [p._replace(teacher_prefix=p.student_prefix) for p in sorted(some, key=lambda p: len(p.ids))]
    _, cache = taught((), same, "nothing")
    kl_N, _ = _measured(student, collate(range(len(same)), same, cache, student.device))
    return float(kl_N.abs().max())


def _bounded(
    student: Student,
    teacher: PromptedModel,
    cache: TeacherCache,
    every: Sequence[Passage],
    rows: Sequence[int],
) -> float:
    """On which share of places the KL on k + 1 classes is no larger than that over the whole vocabulary."""
    holds = []
    for row in rows:
        batch = collate([row], every, cache, student.device)
        kl_N, states_ND = _measured(student, batch)
        logits = teacher.head(teacher.states([every[row]])), student.head(states_ND)
        whole_N = full_kl(*(x[:, : student.vocabulary] for x in logits))
        holds.append(kl_N <= whole_N + _ROUNDING)
    return float(torch.cat(holds).double().mean())


@torch.no_grad()
def _measured(student: Student, batch: Batch) -> tuple[Tensor, Tensor]:
    """KL at each place of a batch, and the student's states there."""
    states_ND = student.states(batch)
    chunk = chunk_of(student.vocabulary)
    kl_N, _ = kl_and_log_probs(states_ND, student.head, batch.teacher, batch.targets_N, chunk=chunk)
    return kl_N, states_ND
