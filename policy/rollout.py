"""A rollout: sampled responses with everything that the update needs, computed once.

Which prompts a step takes, which rows a process owns and which rows make a minibatch are pure functions of
(seed, step), so that a resumed run, and a run on another number of processes, goes through the same data.

Shape suffixes: ``_B`` response row of this process, ``_T`` token (prompt, response, closing column),
``_R`` response token, ``_D`` hidden unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from policy.invariants import check_scores
from rlhf.backbone import REFERENCE, Backbone
from rlhf.comparisons import Prompt
from rlhf.dialogue import Dialogue
from rlhf.runtime import Runtime
from rlhf.sampling import Sampled, sample, uniforms
from rlhf.schema import Ppo
from rlhf.sequences import action_mask, ended

_PROMPTS, _MINIBATCHES = 1, 2  # set the random numbers of the two purposes apart


class Responses(NamedTuple):
    """What a score function may look at."""

    prompts: list[Prompt]
    """The dialogue before each response."""
    texts: list[str]
    """The responses as text, without EOS."""
    ids_BT: Tensor
    """Left-padded prompt, response, closing EOS."""
    mask_BT: Tensor
    """True = a real token; the last one is EOS in every row."""
    hidden_BTD: Tensor | None
    """The trunk's hidden states, where they are cached."""


ScoreFn = Callable[[Responses], Tensor]
"""Scores of responses, [B], higher is better. The PPO loop knows nothing else about rewards."""


class Rollout(NamedTuple):
    """One step's experience on this process."""

    ids_BT: Tensor
    """Left-padded prompt, response, closing column."""
    mask_BT: Tensor
    """True = a real token, the closing EOS included."""
    hidden_BTD: Tensor | None
    """Hidden states of the frozen trunk, or None."""
    actions_BR: Tensor
    """True = a sampled token, EOS included."""
    sampled_log_probs_BR: Tensor
    """Log-probs that the tokens were sampled with."""
    log_probs_BR: Tensor
    """The same from the training forward pass: the denominator of the ratio."""
    reference_log_probs_BR: Tensor
    """Log-probs under the reference."""
    entropy_BR: Tensor
    """Entropy of the policy at each action, in nats."""
    values_BR: Tensor
    """Value before each action."""
    scores_B: Tensor
    """What the score function said."""
    ended_B: Tensor
    """True = the policy itself ended the response."""
    texts: list[str]
    """The responses as text."""
    start: int
    """First response column of ``ids_BT``."""


def prompt_indices(seed: int, step: int, batch_size: int, available: int) -> list[int]:
    """Prompts of a step (counted from 0): each pass over the prompts has an order of its own."""
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        order = np.random.default_rng([seed % 2**63, _PROMPTS, position // available]).permutation(available)
        indices.append(int(order[position % available]))
    return indices


def own_rows(batch_size: int, rank: int, world: int) -> list[int]:
    """Rows of the global batch that a process owns."""
    return list(range(rank, batch_size, world))


def minibatch_rows(
    batch_size: int, minibatches: int, *, seed: int, step: int, epoch: int, rank: int, world: int
) -> list[list[int]]:
    """Each minibatch of an epoch as indices into this process's own rows.

    Row i of the batch belongs to stratum i mod (batch_size / minibatches); every minibatch takes one row of
    each stratum, in an order drawn for the stratum. A process owns whole strata, so the union over the
    processes is the same minibatch for any number of processes that divides its size.
    """
    size = batch_size // minibatches
    batches: list[list[int]] = [[] for _ in range(minibatches)]
    for stratum in range(rank, size, world):
        rng = np.random.default_rng([seed % 2**63, _MINIBATCHES, step, epoch, stratum])
        for batch, member in zip(batches, rng.permutation(minibatches), strict=True):
            batch.append((stratum + size * int(member) - rank) // world)
    return batches


def micro_batches(rows: Sequence[int], lengths: Tensor, size: int) -> list[Tensor]:
    """Rows of similar prompt length together, ``size`` at a time; the order does not change the result."""
    order = sorted(rows, key=lambda row: (int(lengths[row]), row))
    return [torch.tensor(order[i : i + size]) for i in range(0, len(order), size)]


class Window(NamedTuple):
    """Some rows of a rollout, cut free of the padding that all of them share."""

    ids_BT: Tensor
    mask_BT: Tensor
    hidden_BTD: Tensor | None
    start: int


def window(ids_BT: Tensor, mask_BT: Tensor, hidden_BTD: Tensor | None, start: int, rows: Tensor) -> Window:
    """Select rows and drop the leading columns that are padding in all of them."""
    mask = mask_BT[rows]
    first = int(mask.any(0).float().argmax())
    hidden = None if hidden_BTD is None else hidden_BTD[rows][:, first:]
    return Window(ids_BT[rows][:, first:], mask[:, first:], hidden, start - first)


def collect(
    model: Any,
    backbone: Backbone,
    runtime: Runtime,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    score_fn: ScoreFn,
    section: Ppo,
    *,
    seed: int,
    step: int,
) -> Rollout:
    """Sample a batch and score it once with every role.

    Args:
        model: the prepared module or engine around the backbone.
        backbone: the bare module, for sampling.
        runtime: the processes.
        dialogue: the token contract.
        prompts: all training prompts.
        score_fn: scores of responses.
        section: the recipe's ``ppo`` section.
        seed: the recipe's seed.
        step: number of the step, from 0.

    Raises:
        InvariantError: the score function did not return one finite number a response.
    """
    indices = prompt_indices(seed, step, section.batch_size, len(prompts))
    rows = own_rows(section.batch_size, runtime.rank, runtime.world)
    chosen = [prompts[indices[row]] for row in rows]
    ids_BT, mask_BT, actions_BR, sampled_BR, ended_B, start = _sampled(
        backbone, runtime, dialogue, chosen, section, seed=seed, step=step, rows=rows
    )
    lengths = mask_BT.sum(-1)
    order = micro_batches(range(len(rows)), lengths, section.micro_batch_size)
    pieces: dict[str, list[Tensor]] = {}
    texts = [dialogue.decode(ids) for ids in ids_BT[:, start:-1].tolist()]
    with torch.no_grad():
        hidden_BTD = _trunk(backbone, ids_BT, mask_BT, order)
        for micro in order:
            part = window(ids_BT, mask_BT, hidden_BTD, start, micro)
            actions = None if runtime.shards_weights else actions_BR[micro]
            options: dict[str, Any] = {
                "start": part.start,
                "temperature": section.temperature,
                "targets_mask_BR": actions,
            }
            log_probs, entropy = model("policy", *part[:3], **options)
            reference, _ = model(REFERENCE, *part[:3], **options)
            values = model("value", *part[:3], start=part.start)
            said = Responses([chosen[i] for i in micro], [texts[i] for i in micro], *part[:3])
            scores = score_fn(said).to(runtime.device)
            check_scores(scores, len(micro))
            for name, tensor in (
                ("log_probs", log_probs),
                ("reference", reference),
                ("entropy", entropy),
                ("values", values),
                ("scores", scores),
            ):
                pieces.setdefault(name, []).append(tensor)
    back = torch.argsort(torch.cat(order)).to(runtime.device)
    whole = {name: torch.cat(parts)[back] for name, parts in pieces.items()}
    return Rollout(
        ids_BT,
        mask_BT,
        hidden_BTD,
        actions_BR,
        sampled_BR,
        whole["log_probs"],
        whole["reference"],
        whole["entropy"],
        whole["values"],
        whole["scores"],
        ended_B,
        texts,
        start,
    )


def _sampled(
    backbone: Backbone,
    runtime: Runtime,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    section: Ppo,
    *,
    seed: int,
    step: int,
    rows: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Sample all rows of this process and lay them out as closed sequences of one width."""
    encoded = [dialogue.encode_prompt(p) for p in prompts]
    batches: list[Sampled] = []
    with runtime.whole_weights(backbone):
        for first in range(0, len(rows), section.rollout_batch_size):
            part = slice(first, first + section.rollout_batch_size)
            batches.append(
                sample(
                    backbone,
                    "policy",
                    encoded[part],
                    uniforms(seed, "rollout", step, rows[part], dialogue.max_response_tokens),
                    eos_id=dialogue.eos_id,
                    pad_id=dialogue.pad_id,
                    temperature=section.temperature,
                    any_process=runtime.any_process if runtime.shards_weights else bool,
                )
            )
    start = max(b.prompt_ids_BP.shape[1] for b in batches)
    closed = [close(b, start, eos_id=dialogue.eos_id, pad_id=dialogue.pad_id) for b in batches]
    ids_BT, mask_BT, actions_BR = (torch.cat(parts) for parts in zip(*closed, strict=True))
    sampled_BR = torch.cat([b.log_probs_BR for b in batches])
    ended_B = ended(ids_BT[:, start:-1], dialogue.eos_id)
    return ids_BT, mask_BT, actions_BR, sampled_BR, ended_B, start


def close(sampled: Sampled, width: int, *, eos_id: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay sampled responses out as sequences that all end in EOS.

    Args:
        sampled: responses with their prompts.
        width: prompt columns of the result, at least those of the prompts.
        eos_id: closes a response that the policy did not end.
        pad_id: fills the rest.

    Returns:
        ids [B, width + R + 1] (prompt, response, closing column), their mask (True = a real token, the
        closing EOS included), and the action mask [B, R] (True = a sampled token).
    """
    rows = len(sampled.response_ids_BR)
    more = width - sampled.prompt_ids_BP.shape[1]
    device = sampled.response_ids_BR.device
    padding = torch.full((rows, more), pad_id, device=device)
    actions_BR = action_mask(sampled.response_ids_BR, eos_id)
    open_B = ~ended(sampled.response_ids_BR, eos_id)
    closing_B1 = torch.where(open_B, eos_id, pad_id)[:, None]
    response_BR = torch.where(actions_BR, sampled.response_ids_BR, pad_id)
    ids_BT = torch.cat([padding, sampled.prompt_ids_BP, response_BR, closing_B1], dim=1)
    mask_BT = torch.cat(
        [torch.zeros_like(padding, dtype=torch.bool), sampled.prompt_mask_BP, actions_BR, open_B[:, None]],
        dim=1,
    )
    return ids_BT, mask_BT, actions_BR


def _trunk(backbone: Backbone, ids_BT: Tensor, mask_BT: Tensor, order: Sequence[Tensor]) -> Tensor | None:
    """Hidden states of the frozen trunk, computed a micro-batch at a time."""
    if not backbone.frozen_layers:
        return None
    whole: Tensor | None = None
    for micro in order:
        part = window(ids_BT, mask_BT, None, 0, micro)
        hidden = backbone.trunk(part.ids_BT, part.mask_BT)
        assert hidden is not None, "a backbone with frozen layers has a trunk"
        if whole is None:
            whole = hidden.new_zeros(*ids_BT.shape, hidden.shape[-1])
        whole[micro, ids_BT.shape[1] - hidden.shape[1] :] = hidden
    return whole
