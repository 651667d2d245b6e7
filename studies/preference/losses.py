"""How the models of the ladder are trained and measured: losses and scores.

The losses are the project's own: preference models minimise ``reward.loss.ranked_loss`` on the score read at
END, imitation is the mean token log-loss of the good side (Askell et al. 2021, arXiv 2112.00861, section 3).
Everything runs on the CPU, in float32, without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward.loss import pair_accuracy, ranked_loss
from rlhf.models.masks import masked_mean, masked_sum
from studies.preference.data import BAD, GOOD, Floats, Ints, Pairs, Sentences, with_control
from studies.preference.model import Rung

EVALUATION_BATCH = 256
ScoreOf = Callable[[Rung, Tensor, Tensor], Tensor]  # (model, ids_BT, mask_BT) -> score_B


def imitation_loss(model: Rung, sentences: Sentences, items: Ints) -> Tensor:
    """Mean log-loss, in nats, of the tokens after the topic."""
    logp, mask = model.log_probs(*_tensors(sentences.ids_NT[items], sentences.mask_NT[items]))
    return -masked_mean(logp, mask)


def preference_loss(model: Rung, pairs: Pairs, items: Ints) -> Tensor:
    """-log sigmoid(score good - score bad), mean over the pairs."""
    good, bad = pairs.good.take(items), pairs.bad.take(items)
    return ordered_loss(model, [(good.ids_NT, good.mask_NT), (bad.ids_NT, bad.mask_NT)])


def binarized_loss(model: Rung, pairs: Pairs, items: Ints) -> Tensor:
    """The same for the two absolute comparisons GOOD:A > BAD:A and BAD:B > GOOD:B of every pair A > B.

    Askell et al. 2021, section 4.1: what is compared differs in the control token alone.
    """
    a, b = pairs.good.take(items), pairs.bad.take(items)
    mask_NT = np.concatenate([a.mask_NT, b.mask_NT])
    better = np.concatenate([with_control(a.ids_NT, GOOD), with_control(b.ids_NT, BAD)])
    worse = np.concatenate([with_control(a.ids_NT, BAD), with_control(b.ids_NT, GOOD)])
    return ordered_loss(model, [(better, mask_NT), (worse, mask_NT)])


def ordered_loss(model: Rung, sides: list[tuple[Ints, Any]]) -> Tensor:
    """Ranked loss of sentences given as (ids, mask) from the best to the worst, row by row."""
    rows = len(sides[0][0])
    scores = model.score(
        *_tensors(np.concatenate([s[0] for s in sides]), np.concatenate([s[1] for s in sides]))
    )
    ranks_BK = torch.arange(len(sides)).expand(rows, -1)
    return ranked_loss(scores.view(len(sides), rows).T, ranks_BK, torch.ones_like(ranks_BK, dtype=torch.bool))


def set_loss(model: Rung, sentences: Sentences, ranks_NK: Ints, prompts: Ints) -> Tensor:
    """Ranked loss of whole ranked sets: K forward passes a prompt for its C(K, 2) comparisons."""
    k = ranks_NK.shape[1]
    rows = (prompts[:, None] * k + np.arange(k)).ravel()
    scores = model.score(*_tensors(sentences.ids_NT[rows], sentences.mask_NT[rows]))
    ranks_BK = torch.from_numpy(ranks_NK[prompts])
    return ranked_loss(scores.view(-1, k), ranks_BK, torch.ones_like(ranks_BK, dtype=torch.bool))


def reward(model: Rung, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Score of a preference model."""
    return model.score(ids_BT, mask_BT)


def summed_log_prob(model: Rung, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Log-probability of the sentence after its topic: imitation, scored by the sum."""
    return masked_sum(*model.log_probs(ids_BT, mask_BT), dim=1)


def good_less_bad(model: Rung, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """How much better GOOD fits the sentence than BAD: the score of a model trained on control tokens."""
    ids_NT = ids_BT.numpy()
    good, bad = (torch.from_numpy(with_control(ids_NT, token)) for token in (GOOD, BAD))
    return model.score(good, mask_BT) - model.score(bad, mask_BT)


def scores_of(model: Rung, sentences: Sentences, score: ScoreOf) -> Floats:
    """Score of every sentence, without gradient."""
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(sentences), EVALUATION_BATCH):
            here = slice(start, start + EVALUATION_BATCH)
            parts.append(score(model, *_tensors(sentences.ids_NT[here], sentences.mask_NT[here])))
    model.train()
    return torch.cat(parts).double().numpy()


def credit(good_N: Floats, bad_N: Floats) -> Floats:
    """Per pair: 1 for the right order, 1/2 for equal scores, 0 for the wrong order (``pair_accuracy``)."""
    scores = torch.from_numpy(np.stack([good_N, bad_N], axis=1))
    ranks = torch.tensor([[0, 1]]).expand(len(scores), 2)
    correct_N, _ = pair_accuracy(scores, ranks, torch.ones_like(ranks, dtype=torch.bool))
    return correct_N.double().numpy()


def set_losses(scores_NK: Floats, ranks_NK: Ints) -> Floats:
    """Ranked loss of every set [N] on its own."""
    scores, ranks = torch.from_numpy(scores_NK), torch.from_numpy(ranks_NK)
    mask = torch.ones_like(ranks, dtype=torch.bool)
    rows = zip(scores.split(1), ranks.split(1), mask.split(1), strict=True)
    return np.array([float(ranked_loss(*row)) for row in rows])


def _tensors(ids_NT: Ints, mask_NT: Any) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(ids_NT), torch.from_numpy(mask_NT)
