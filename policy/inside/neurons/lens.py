"""The Activation Difference Lens: what a training left in the states of text it has nothing to do with.

Minder 2025 (arXiv 2510.13900): the mean over unrelated texts of the states after less before, at the first
few positions, is read through the last norm and the unembedding; of narrow fine-tuning its first tokens
tell the subject. Here the mean is over the first positions together, and what the tokens tell is measured:
the share of them that are among the tokens which the training made more probable in responses.

Shape suffixes: ``_N`` text, ``_P`` position, ``_L`` layer, ``_D`` hidden unit, ``_K`` top token, ``_V``
vocabulary, ``_G`` group of texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from policy.inside.neurons.change import last_states, read, responses_of
from policy.inside.neurons.question import SHOWN, WINDOW, Texts, readout
from policy.inside.neurons.vocabulary import Readout
from policy.inside.questions import Inspection
from policy.inside.solutions.barriers import Point
from policy.inside.solutions.policies import BETWEEN, read_policies, set_point
from policy.inside.subject import Batch, Site, Subject, of_role
from rlhf.models.log_probs import logits_head
from rlhf.stats.intervals import mean_interval
from rlhf.training.progress import progress

RISEN = 0.05  # of the vocabulary
TOP = 20  # tokens of a layer that are judged
GROUPS = 8  # of texts, over which intervals are
DIRECTIONS = 20  # random ones, a layer
OWN = "this run's policy"


class States(NamedTuple):
    """Of one model on the first positions of some texts."""

    mean_NLD: Tensor
    """Output of each layer, mean over the positions; float32 on the CPU."""
    size_L: Tensor
    """Median norm of an output."""


def states_of(
    subject: Subject, texts: Sequence[Sequence[int]], size: int, tick: Callable[[], object]
) -> States:
    """What each layer gives at the first ``WINDOW`` tokens of the texts, ``size`` texts a pass."""
    sites = [Site(layer, "state") for layer in range(subject.layers)]
    device, means, sizes = next(subject.decoder.parameters()).device, [], []
    for first in range(0, len(texts), size):
        ids_NP = torch.tensor([list(text[:WINDOW]) for text in texts[first : first + size]]).to(device)
        mask_NP = torch.ones_like(ids_NP, dtype=torch.bool)
        kept = read(subject, Batch(ids_NP, mask_NP), sites, mask_NP)
        stacked = torch.stack([kept[site].unflatten(0, ids_NP.shape) for site in sites], 1).cpu()
        means.append(stacked.mean(2))
        sizes.append(stacked.norm(dim=-1).transpose(0, 1).flatten(1))
        tick()
    return States(torch.cat(means), torch.cat(sizes, 1).median(1).values)


def expected_use(subject: Subject, head: Any, batches: Sequence[Batch]) -> Tensor:
    """How often each token is to be expected at the response positions of these rows, [V]: the sum over them
    of its probability, float64 on the CPU. ``head``: from the decoder's last states to logits."""
    found = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        before_BT = responses_of(batch).roll(-1, 1)  # what predicts a response token; no row begins with one
        states_ND = last_states(subject, batch)[before_BT]
        found = found + head(states_ND).float().softmax(-1).sum(0).double().cpu()
    return found


def risen(after_V: Tensor, before_V: Tensor) -> Tensor:
    """The ``RISEN`` of the vocabulary whose expected use grew by the largest factor; True = one, [V]."""
    tiny = 1e-30
    factor_V = (after_V.clamp(min=tiny) / before_V.clamp(min=tiny)).log()
    found_V = torch.zeros(len(factor_V), dtype=torch.bool)
    found_V[factor_V.topk(math.ceil(RISEN * len(factor_V))).indices] = True
    return found_V


def shares(readout: Readout, vectors_ND: Tensor, risen_V: Tensor) -> Tensor:
    """Share of the first ``TOP`` tokens of each direction that have risen, [N]."""
    device = readout.head_VD.device
    tokens_NK = readout(vectors_ND.to(device)).topk(min(TOP, len(risen_V))).indices
    return risen_V.to(device)[tokens_NK].double().mean(-1).cpu()


def lens(
    after: States,
    before: States,
    readout: Readout,
    risen_V: Tensor,
    seed: int,
    subject_V: Tensor | None = None,
) -> dict[str, Any]:
    """The difference of two models' states, read as tokens; empty where no layer's states differ.

    Returns:
        ``layers``: of each that differs its number, the norm of the mean difference in median norms of a
        state, and its first tokens. By group of texts, mean over these layers: ``strength``, that norm;
        ``share`` of the first tokens that have risen, ``opposite`` of the difference with its sign
        turned, ``state`` of the mean state before, ``subject`` of the difference by the tokens of
        ``subject_V``, which are those that another training raised. ``random``: by random direction.
    """
    gap_NLD = after.mean_NLD - before.mean_NLD
    differing = [layer for layer in range(gap_NLD.shape[1]) if bool(gap_NLD[:, layer].any())]
    if not differing:
        return {}
    gap_NLD, state_NLD, size_L = (
        gap_NLD[:, differing],
        before.mean_NLD[:, differing],
        before.size_L[differing],
    )
    number, width = len(gap_NLD), gap_NLD.shape[-1]
    groups = [slice(first, None, min(GROUPS, number)) for first in range(min(GROUPS, number))]
    gap_GLD, state_GLD = (torch.stack([x[rows].mean(0) for rows in groups]) for x in (gap_NLD, state_NLD))

    def by_group(vectors_GLD: Tensor, chosen_V: Tensor = risen_V) -> list[float]:
        by_direction = shares(readout, vectors_GLD.flatten(0, 1), chosen_V)
        return [float(value) for value in by_direction.view(len(groups), -1).mean(1)]

    generator = torch.Generator().manual_seed(seed)
    random = shares(readout, torch.randn(DIRECTIONS * len(differing), width, generator=generator), risen_V)
    whole_LD = gap_NLD.mean(0)
    logits_LV = readout(whole_LD.to(readout.head_VD.device))
    relative_L = whole_LD.norm(dim=-1) / size_L
    top_LK = logits_LV.topk(min(TOP, len(risen_V))).indices.cpu()
    return {
        "layers": [
            {
                "layer": layer,
                "strength": relative,
                "tokens": tokens,
                "share": float(risen_V[tokens].double().mean()),
            }
            for layer, relative, tokens in zip(differing, relative_L.tolist(), top_LK.tolist(), strict=True)
        ],
        "strength": (gap_GLD.norm(dim=-1) / size_L).mean(1).tolist(),
        "share": by_group(gap_GLD),
        "subject": by_group(gap_GLD, risen_V if subject_V is None else subject_V),
        "opposite": by_group(-gap_GLD),
        "state": by_group(state_GLD),
        "random": random.view(DIRECTIONS, -1).mean(1).tolist(),
    }


def find_lens(
    models: Inspection, texts: Texts, others: Sequence[str], after: str, before: str
) -> dict[str, Any]:
    """The lens of the run's policy and of those in ``others``, on the same texts."""
    pieces = [piece for piece in texts.pieces if len(piece) >= WINDOW]
    if len(pieces) < 2:
        return {"skipped": f"{len(pieces)} of {texts.source} have {WINDOW} tokens or more"}
    backbone, size, seed = models.backbone, 8 * models.recipe.inside.micro_batch_size, models.recipe.seed
    old, read_out = of_role(backbone, before), readout(models)
    with (
        torch.no_grad(),
        progress("inside: lens", total=(2 + len(others)) * -(-len(pieces) // size), leave=True) as bar,
    ):
        tick: Callable[[], object] = bar.update
        base = states_of(old, pieces, size, tick)
        plain, head = models.write(before).batches, logits_head(backbone.base)

        def seen(role: str, subject_V: Tensor | None = None) -> tuple[dict[str, Any], Tensor]:
            new, batches = of_role(backbone, role), models.write(role).batches
            risen_V = risen(*(expected_use(one, head, [*batches, *plain]) for one in (new, old)))
            found = lens(states_of(new, pieces, size, tick), base, read_out, risen_V, seed, subject_V)
            gained = torch.cat([new.measure_plainly(batch) - old.measure_plainly(batch) for batch in batches])
            return {**found, "gained": gained.tolist()}, risen_V

        own, subject_V = seen(after)
        found = {OWN: own}
        if others:
            policies = read_policies(backbone, others)
            for n, folder in enumerate(others, 1):
                set_point(backbone, policies, Point(tuple(float(n == i) for i in range(len(policies)))), seed)
                found[folder] = seen(BETWEEN, subject_V)[0]
    decode = models.dialogue.tokenizer.decode
    summaries = {name: summary(one, own) for name, one in found.items()}
    for name, one in found.items():
        for layer in one.get("layers", ()):
            layer["tokens"] = [str(decode([token])) for token in layer["tokens"][: 2 * SHOWN]]
        summaries[name]["layers"] = one.get("layers", [])
    return {"texts": len(pieces), "source": texts.source, "own": texts.own, "policies": summaries}


def summary(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Figures with intervals over groups of texts; differences are paired by group."""
    figures: dict[str, Any] = {"gained": mean_interval(found["gained"]).as_dict()}
    if "share" not in found:
        return figures
    for key in ("strength", "share", "subject", "opposite", "state", "random"):
        figures[key] = mean_interval(found[key]).as_dict()
    for key in ("opposite", "state"):
        figures[f"less_{key}"] = _paired(found["share"], found[key])
    if found is not first and "share" in first:
        figures["less_policy"] = {k: _paired(found[k], first[k]) for k in ("strength", "subject")}
    return figures


def _paired(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    return mean_interval([a - b for a, b in zip(one, other, strict=True)]).as_dict()
