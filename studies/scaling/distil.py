"""A context distilled into a rung: the rung under the context teaches itself without, through an adapter.

Shape suffixes: ``_B`` row, ``_T`` token, ``_D`` hidden unit, ``_N`` place where a token is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policy.distillation.data import TEXTS, Passage
from policy.distillation.loss import (
    TeacherTargets,
    TopKLogProbs,
    distil_kl,
    full_kl,
    measure,
    teach,
)
from policy.distillation.prompted_model import PromptedModel
from policy.distillation.report import Measured, figures
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.log_probs import chunk_of
from rlhf.models.masks import positions_from_mask, right_pad
from rlhf.models.token_batches import token_batches
from rlhf.training.schedule import learning_rate_factor
from studies.engine.training import index_stream
from studies.engine.units import Settings
from studies.scaling.adapters import ADAPTER, bare_ids, lead_of
from studies.scaling.data.texts import Library

TOKENS_AT_ONCE = 4096
CONTINUED = "continuations"
FULL_KL = 16  # held-out sequences whose KL is also taken over the whole vocabulary
_ROUNDING = 1e-5  # nats; a lower bound may exceed its number by as much


class Taught(NamedTuple):
    """A passage, and what the teacher says at each of its places."""

    passage: Passage
    words: TeacherTargets
    log_prob_N: Tensor
    """Of the token that follows."""


def passages(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], lead: Sequence[int]) -> list[Passage]:
    """Texts as what teacher and student read; the lead stands before the student's."""
    none = np.zeros(0, dtype=np.uint32)
    before = np.asarray(lead, dtype=np.uint32)
    return [
        Passage(TEXTS, text, none, before, np.asarray(bare_ids(tokenizer, text), dtype=np.uint32), 0, 0)
        for text in texts
    ]


def taught(teacher: PromptedModel, some: Sequence[Passage], k: int, vocabulary: int) -> list[Taught]:
    """What the teacher says about passages."""
    made: dict[int, Taught] = {}
    for batch in token_batches([len(p.opening) + len(p.ids) for p in some], TOKENS_AT_ONCE):
        rows = [some[n] for n in batch]
        targets_N = torch.from_numpy(np.concatenate([p.ids for p in rows]).astype(np.int64))
        words, log_prob_N = teach(
            teacher.states(rows),
            teacher.head,
            targets_N.to(teacher.device),
            k=k,
            chunk=chunk_of(vocabulary),
            vocabulary=vocabulary,
        )
        start = 0
        for n, passage in zip(batch, rows, strict=True):
            here = slice(start, start + len(passage.ids))
            start = here.stop
            coarse = TopKLogProbs(*(x[here] for x in words.top_k))
            made[n] = Taught(passage, TeacherTargets(words.indices_NK[here], coarse), log_prob_N[here])
    return [made[n] for n in range(len(some))]


def student_states(backbone: Backbone, some: Sequence[Passage]) -> Tensor:
    """The student's last hidden states at the places of passages, one after the other, [N, D]."""
    rows = [[*p.lead.tolist(), *p.ids.tolist()] for p in some]
    ids_BT, mask_BT = (t.to(backbone.device) for t in right_pad(rows, 0))
    backbone.activate(ADAPTER)
    hidden_BTD = backbone.decoder(
        input_ids=ids_BT,
        attention_mask=mask_BT.long(),
        position_ids=positions_from_mask(mask_BT),
        use_cache=False,
    ).last_hidden_state
    wanted_BT = torch.zeros_like(mask_BT)
    for row, p in enumerate(some):
        wanted_BT[row, len(p.lead) - 1 : len(p.lead) - 1 + len(p.ids)] = True
    return hidden_BTD[wanted_BT]


def joined(some: Sequence[Taught]) -> TeacherTargets:
    """The words of several passages, one after the other."""
    coarse = TopKLogProbs(*(torch.cat(x) for x in zip(*(t.words.top_k for t in some), strict=True)))
    return TeacherTargets(torch.cat([t.words.indices_NK for t in some]), coarse)


def distil(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    library: Library,
    s: Settings,
    *,
    continued: bool,
) -> dict[str, Any]:
    """Distil a context into the adapter; returns its figures on held-out texts.

    The teacher is the rung itself under the context, the student the rung with the adapter, without it
    (Askell 2021; Bai 2022, A.1, but for the size of the data and generic text only).

    continued: the context is the library's own, so its effect on the log-probability of text is measured on
    continuations of its story, where it helps; else on the held-out texts, as the KL always is.

    Beside the figures: ``empty_context_kl``, the largest KL at any place with no context and a fresh adapter,
    which is exactly 0, and ``bounded``, the share of places where the KL on k + 1 classes is no larger than
    the whole one.
    """
    model = backbone.base
    vocabulary = int(model.config.get_text_config().vocab_size)
    k = min(s["top_k"], vocabulary - 1)
    lead = lead_of(tokenizer)
    train, test = (
        passages(tokenizer, library.stories(purpose, number, s["words"]), lead)
        for purpose, number in (("distil", s["sequences"]), ("distil test", s["test"]))
    )

    def reference() -> None:
        backbone.activate(REFERENCE)

    nothing = _without_context(backbone, PromptedModel(model, (), reference), test[:FULL_KL], k, vocabulary)
    teacher = PromptedModel(model, (*lead, *bare_ids(tokenizer, context)), reference)
    halves = [TEXTS] * len(test)
    if continued:
        test = [*test, *passages(tokenizer, library.continuations(s["test"], s["words"]), lead)]
        halves += [CONTINUED] * (len(test) - len(halves))
    lessons, exam = (taught(teacher, part, k, vocabulary) for part in (train, test))
    before, bounded = _sums(backbone, teacher, exam, vocabulary)
    losses = _learn(backbone, lessons, vocabulary, s)
    after, bounded_after = _sums(backbone, teacher, exam, vocabulary)
    found = figures(before, after, halves, [str(n) for n in range(len(exam))])
    of_texts, of_context = found[TEXTS], found[CONTINUED if continued else TEXTS]
    return {
        **{key: of_texts[key] for key in ("kl_before", "kl_after", "kl_recovered")},
        **{key: of_context[key] for key in ("prompt_gain", "distilled_gain", "log_prob_recovered")},
        **{key: found[key] for key in ("full_kl_before", "full_kl_after")},
        "empty_context_kl": nothing,
        "bounded": (bounded + bounded_after) / 2,
        "context_tokens": len(bare_ids(tokenizer, context)),
        "losses": [losses[0], losses[-1]],
    }


@torch.no_grad()
def _without_context(
    backbone: Backbone, bare: PromptedModel, some: Sequence[Passage], k: int, vocabulary: int
) -> float:
    """The largest KL at any place from a teacher that reads what the student reads, in the same pass."""
    hidden_ND = bare.states([p._replace(opening=p.lead) for p in some])
    targets_N = torch.from_numpy(np.concatenate([p.ids for p in some]).astype(np.int64)).to(hidden_ND.device)
    chunk = chunk_of(vocabulary)
    words, _ = teach(hidden_ND, bare.head, targets_N, k=k, chunk=chunk, vocabulary=vocabulary)
    kl_N, _ = measure(student_states(backbone, some), _head(backbone), words, targets_N, chunk=chunk)
    return float(kl_N.abs().max())


def _learn(backbone: Backbone, lessons: Sequence[Taught], vocabulary: int, s: Settings) -> list[float]:
    """Minimise the mean KL of a batch's places; the rate falls linearly to 0."""
    batch = min(s["batch"], len(lessons))
    steps = max(1, s["epochs"] * len(lessons) // batch)
    stream = index_stream(len(lessons), batch, steps, np.random.default_rng([s["seed"], 2]))
    parameters = list(backbone.parameters_of(ADAPTER).values())
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    losses = []
    for step, items in enumerate(stream):
        some = [lessons[n] for n in items]
        for group in optimiser.param_groups:
            group["lr"] = s["learning_rate"] * learning_rate_factor(step, steps, kind="linear")
        hidden_ND = student_states(backbone, [t.passage for t in some])
        loss = distil_kl(hidden_ND, _head(backbone), joined(some), chunk=chunk_of(vocabulary)).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.item())
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(f"the loss is not finite after {steps} steps at {s['learning_rate']}")
    return losses


def _measured(backbone: Backbone, exam: Sequence[Taught], vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """KL and log-prob of the token that follows at the places of each passage."""
    for t in exam:
        with torch.no_grad():
            hidden_ND = student_states(backbone, [t.passage])
        targets_N = torch.from_numpy(t.passage.ids.astype(np.int64)).to(hidden_ND.device)
        yield measure(hidden_ND, _head(backbone), t.words, targets_N, chunk=chunk_of(vocabulary))


@torch.no_grad()
def _sums(
    backbone: Backbone, teacher: PromptedModel, exam: Sequence[Taught], vocabulary: int
) -> tuple[Measured, float]:
    """The student's figures on held-out passages, and on how many places the bound holds."""
    sums: dict[str, list[float]] = {name: [] for name in Measured._fields}
    bounded = []
    for n, (t, (kl_N, log_prob_N)) in enumerate(
        zip(exam, _measured(backbone, exam, vocabulary), strict=True)
    ):
        for name, value in (
            ("kl", kl_N.double().sum()),
            ("places", len(kl_N)),
            ("log_prob", log_prob_N.double().sum()),
            ("taught", t.log_prob_N.double().sum()),
            ("spoken", len(kl_N)),
        ):
            sums[name].append(float(value))
        if n < FULL_KL:
            wide_NV = teacher.head(teacher.states([t.passage]))[:, :vocabulary]
            own_NV = _head(backbone)(student_states(backbone, [t.passage]))[:, :vocabulary]
            whole_N = full_kl(wide_NV, own_NV)
            sums["full_kl"].append(float(whole_N.double().sum()))
            sums["full_coarse"].append(float(kl_N.double().sum()))
            bounded.append(kl_N <= whole_N + _ROUNDING)
    return Measured(**sums), float(torch.cat(bounded).double().mean())


def _head(backbone: Backbone) -> Any:
    return backbone.base.get_output_embeddings()
