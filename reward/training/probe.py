"""The frozen-feature linear probe: what a reward model has to beat, and where in the base it reads best.

Logistic regression on the base model's hidden states. No weight of the base moves, so a trained reward
model that is no better has learned nothing that was not there. Two figures: at the last layer's closing
token, where a reward model of all layers reads; and at the layer and the pooling that cross-validation on the
training part finds best (Alain and Bengio 2016, arXiv 1610.01644).

Shape suffixes: ``_R`` response, flat and in order, ``_P`` pair, ``_D`` hidden unit, ``_F``
fold, ``_C`` regression.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from reward.loss import pair_accuracy, ranked_loss
from reward.model.batch import Example, group_of, layout
from reward.training.features import POOLINGS, Features, features
from rlhf.data.comparisons import Comparison, prompt_key
from rlhf.models.trunk_cache import ResponseStates
from rlhf.runs.artifacts import write_jsonl
from rlhf.stats.intervals import Estimate, cluster_mean_interval
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.optimizer import lbfgs
from rlhf.training.progress import progress

_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)  # of L2
_FOLDS, _MANY = 5, 4000  # three folds where there are more pairs than that: they are known well enough then


def _fit(x_ND: Tensor, where: tuple[Tensor, Tensor, Tensor], penalty: float) -> Tensor:
    """Weights that minimize the ranked loss plus an L2 penalty."""
    rows_BK, ranks_BK, mask_BK = where

    def loss(weights: Tensor) -> Tensor:
        ranked = ranked_loss((x_ND @ weights)[rows_BK], ranks_BK, mask_BK)
        return ranked + penalty * weights.square().sum()

    return lbfgs(loss, torch.zeros(x_ND.shape[1]), max_iter=200)


def _accuracy(weights: Tensor, x_ND: Tensor, where: tuple[Tensor, Tensor, Tensor]) -> Estimate:
    rows_BK, ranks_BK, mask_BK = where
    correct, pairs = pair_accuracy((x_ND @ weights)[rows_BK], ranks_BK, mask_BK)
    return cluster_mean_interval(correct.numpy(), pairs.numpy())


Head = tuple[int | Literal["auto"], str]
"""The layer (``auto``: the best) and the pooling that a head reads."""


class Pairs(NamedTuple):
    """The untied pairs of some comparisons."""

    better_P: Tensor
    worse_P: Tensor
    """Places of the two in the flat list of responses."""
    weight_P: Tensor
    """1 over the number of pairs of the same comparison."""
    owner_P: Tensor
    """Number of the comparison."""


def pairs_of(examples: Sequence[Example]) -> Pairs:
    """All untied pairs, by loops over the comparisons."""
    parts, first = [], 0
    for number, example in enumerate(examples):
        ranks_K = torch.tensor(example["ranks"])
        better, worse = (ranks_K[:, None] < ranks_K[None, :]).nonzero(as_tuple=True)
        weight = torch.full((len(better),), 1 / max(1, len(better)))
        parts.append((better + first, worse + first, weight, torch.full_like(better, number)))
        first += len(ranks_K)
    return Pairs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def fit_pairs(
    x_RD: Tensor, pairs: Pairs, weight_PC: Tensor, penalty_C: Tensor, *, steps: int = 200
) -> Tensor:
    """Many logistic regressions on the same features at once, weights [C, D]: each minimizes
    :func:`reward.loss.ranked_loss` plus an L2 penalty, as :func:`_fit` does for one.

    One L-BFGS over all of them, with the gradient in closed form: their products with the features are one.

    x_RD: features. weight_PC: of each pair in each regression, 0 = left out; every column is scaled to sum 1.
    penalty_C: of each regression. steps: at most, of L-BFGS.
    """
    from scipy.optimize import minimize

    b, w, weight_PC = pairs.better_P, pairs.worse_P, weight_PC / weight_PC.sum(0)
    few = len(b) <= len(x_RD)  # then the differences are the smaller matrix
    rows = x_RD[b] - x_RD[w] if few else x_RD
    shape = len(penalty_C), x_RD.shape[1]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights_CD = torch.from_numpy(flat).float().view(shape)
        scores = rows @ weights_CD.T
        lead_PC = scores if few else scores[b] - scores[w]
        value = (weight_PC * softplus(-lead_PC)).sum() + (penalty_C @ weights_CD.square()).sum()
        pull = -weight_PC * torch.sigmoid(-lead_PC)
        if not few:
            pull = torch.zeros_like(scores).index_add_(0, b, pull).index_add_(0, w, -pull)
        gradient_CD = pull.T @ rows + 2 * penalty_C[:, None] * weights_CD
        return float(value), gradient_CD.flatten().double().numpy()

    start = np.zeros(shape[0] * shape[1])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": steps, "ftol": 1e-7})
    return torch.from_numpy(found.x).float().view(shape)


def folds_of(examples: Sequence[Example], folds: int = _FOLDS) -> Tensor:
    """Number of the fold of each comparison, [B]: those of one group, else of one prompt, stand together, and
    the folds have about as many comparisons. Fewer groups than folds make fewer folds; of one
    group each comparison stands by itself."""
    members: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        members.setdefault(group_of(example), []).append(index)
    groups = list(members.values()) if len(members) > 1 else [[index] for index in range(len(examples))]
    random.Random(0).shuffle(groups)
    sizes = [0] * min(folds, len(groups))
    fold_B = torch.zeros(len(examples), dtype=torch.long)
    for group in sorted(groups, key=len, reverse=True):
        smallest = sizes.index(min(sizes))
        fold_B[group] = smallest
        sizes[smallest] += len(group)
    return fold_B


class Probe(NamedTuple):
    """Fitted probes, JSON-able."""

    weights: list[float]
    """Of a bias-free head on the unscaled features at its place, of layer ``layers``."""
    layers: int | None
    """The layer that the weights are for; None = the last."""
    accuracy: dict[str, Any]
    """Held-out pair accuracy at the last layer's last token, its interval clustered by comparison."""
    best: dict[str, Any] | None
    """``layer``, ``pooling`` and ``penalty`` that are best by cross-validation on the training part, the
    held-out ``accuracy`` there, and ``cv``: accuracy and best penalty of each layer and pooling."""
    scores: dict[str, list[float]]
    """Of every held-out response, flat, by ``last``, the probe of ``accuracy``, and by ``best``."""


def fit_probe(
    model: nn.Module,
    train: Sequence[Example],
    held_out: Sequence[Example],
    pad_id: int,
    *,
    share: bool = False,
    trunk: ResponseStates | None = None,
    layers: Sequence[int] = (),
    head: Head | None = None,
) -> Probe:
    """Fit linear probes and judge them.

    Args:
        model: a reward model whose adapter changes nothing yet.
        train: encoded comparisons to fit on.
        held_out: encoded comparisons to judge on.
        pad_id: padding token.
        share: pack the responses of a prompt behind one copy of it.
        trunk: states of all examples, where they have been computed.
        layers: numbers of the layers that are compared; () = none, only the last is looked at.
        head: where the weights are wanted; None = at the last layer's last token, with a fifth of the
            training part to choose the penalty.
    """
    options: dict[str, Any] = {"share": share, "trunk": trunk}
    x, y = (features(model, part, pad_id, layers, **options) for part in (train, held_out))
    x_RD, spread_D, y_RD = _standardized(x.last_RD, y.last_RD)
    whole = layout(train)
    cut = max(1, len(train) * 4 // 5)
    fit, choose = tuple(t[:cut] for t in whole), tuple(t[cut:] for t in whole)
    penalty = _PENALTIES[2]
    if len(choose[0]):
        penalty = max(_PENALTIES, key=lambda p: _accuracy(_fit(x_RD, fit, p), x_RD, choose).mean)  # type: ignore[arg-type]
    weights_D = _fit(x_RD, whole, penalty)
    accuracy = _accuracy(weights_D, y_RD, layout(held_out)).as_dict()
    scores = {"last": (y_RD @ weights_D).tolist()}
    # the mean of the features changes no comparison, so only their spread has to be undone
    weights_D, best, layer = weights_D / spread_D, None, None
    if layers:
        table = cross_validated(x, train)
        best = max(table, key=lambda row: row["accuracy"])
        _, scores_R, figure = _refitted(x, y, train, held_out, best)
        scores["best"] = scores_R.tolist()
        best = {**best, "cv_accuracy": best["accuracy"], "accuracy": figure.as_dict(), "cv": table}
        if head is not None:
            rows = [r for r in table if r["pooling"] == head[1] and head[0] in ("auto", r["layer"])]
            chosen = max(rows, key=lambda row: row["accuracy"])
            layer, (weights_D, *_) = chosen["layer"], _refitted(x, y, train, held_out, chosen)
    return Probe(weights_D.tolist(), layer, accuracy, best, scores)


def cross_validated(x: Features, train: Sequence[Example]) -> list[dict[str, Any]]:
    """Pair accuracy by cross-validation of each layer and pooling, with the penalty that is best there."""
    pairs = pairs_of(train)
    fold_B = folds_of(train, _FOLDS if len(pairs.better_P) <= _MANY else 3)
    folds, fold_P = int(fold_B.max()) + 1, fold_B[pairs.owner_P]
    left_out_PF = fold_P[:, None] == torch.arange(folds)
    fits_PF = ~left_out_PF if folds > 1 else left_out_PF  # one comparison: nothing is unseen
    grid = [(penalty, fold) for penalty in _PENALTIES for fold in range(folds)]
    penalty_C, fold_C = torch.tensor([p for p, _ in grid]), torch.tensor([f for _, f in grid])
    weight_PC = pairs.weight_P[:, None] * fits_PF[:, fold_C]
    table = []
    places = [(i, p) for i in range(len(x.layers)) for p in range(len(POOLINGS))]
    for index, pooling in progress("probe: layers", places):
        x_RD, _, _ = _standardized(x.pooled_LPRD[index, pooling].float())
        scores_RC = x_RD @ fit_pairs(x_RD, pairs, weight_PC, penalty_C, steps=40).T
        lead_PC = scores_RC[pairs.better_P] - scores_RC[pairs.worse_P]
        right_PC = 0.5 * (lead_PC.sign() + 1) * left_out_PF[:, fold_C]
        share = right_PC.sum(0).view(len(_PENALTIES), folds).sum(1) / len(lead_PC)
        best = int(share.argmax())
        row = {"layer": x.layers[index], "pooling": POOLINGS[pooling], "penalty": _PENALTIES[best]}
        table.append({**row, "accuracy": float(share[best])})
    return table


def _refitted(
    x: Features, y: Features, train: Sequence[Example], held_out: Sequence[Example], row: dict[str, Any]
) -> tuple[Tensor, Tensor, Estimate]:
    """Weights on the unscaled features of a row of the table, fitted to all of the training part, and the
    held-out scores and accuracy."""
    place = x.layers.index(row["layer"]), POOLINGS.index(row["pooling"])
    x_RD, spread_D, y_RD = _standardized(x.pooled_LPRD[place].float(), y.pooled_LPRD[place].float())
    pairs = pairs_of(train)
    (weights_D,) = fit_pairs(x_RD, pairs, pairs.weight_P[:, None], torch.tensor([row["penalty"]]))
    return weights_D / spread_D, y_RD @ weights_D, _accuracy(weights_D, y_RD, layout(held_out))


def _standardized(x_RD: Tensor, y_RD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Training features with mean 0 and variance 1, their spread, and others in the same unit."""
    mean_D, spread_D = x_RD.mean(0), x_RD.std(0).clamp_min(1e-6)
    other = x_RD[:0] if y_RD is None else y_RD
    return (x_RD - mean_D) / spread_D, spread_D, (other - mean_D) / spread_D


def keep_scores(
    file: Path, probe: Probe, rows: Sequence[Example], held_out: Sequence[Comparison], dialogue: Dialogue
) -> None:
    """Write what the probes give every held-out response, for the card; None where it was left out."""
    ids = [(tuple(e["prompt"]), tuple(r)) for e in rows for r in e["responses"]]
    scores = {name: dict(zip(ids, flat, strict=True)) for name, flat in probe.scores.items()}

    def line(c: Comparison) -> dict[str, Any]:
        prompt = tuple(dialogue.encode_prompt(c.prompt))
        read = [(prompt, tuple(dialogue.close([], dialogue.encode_response(r)))) for r in c.responses]
        given = {name: [of.get(key) for key in read] for name, of in scores.items()}
        return {"prompt": prompt_key(c.prompt), "responses": c.responses, **given}

    write_jsonl(file, map(line, held_out))
