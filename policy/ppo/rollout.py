"""A rollout: sampled responses with everything that the update needs, computed once.

Shape suffixes: ``_B`` response row of this process, ``_T`` token (prompt, response, closing column),
``_R`` response token, ``_D`` hidden unit.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.ppo.batching import first_pass, micro_batches, own_rows, prompt_indices, prompt_of_row
from rlhf.data.comparisons import Prompt
from rlhf.generation.sampling import Sampled, sample, uniforms
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.masks import action_mask, ended
from rlhf.models.trunk_cache import keeps_trunk, trunk_bytes
from rlhf.recipe.schema import Ppo
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.runtime import Runtime, gathered


class Responses(NamedTuple):
    """What a reward function may look at."""

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
    start: int = 0
    """First column of the responses."""
    logged: bool = True
    """False = responses of the reference, whose scores are no part of what a reward function logs."""


RewardFn = Callable[[Responses], Tensor]
"""Scores of responses, [B], higher is better. The PPO loop knows nothing else about rewards, but for three
things that an object may have: a true ``whole_rollout``, where it wants all responses of a rollout in one
call; ``state()`` and ``restore(state)``, what a checkpoint keeps of it, JSON-able."""


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
    """What the reward function returned."""
    ended_B: Tensor
    """True = the policy itself ended the response."""
    texts: list[str]
    """The responses as text."""
    start: int
    """First response column of ``ids_BT``."""
    seconds: Mapping[str, float] = MappingProxyType({})
    """How long sampling took, and log-probs, values and scores together, by their names in the log."""
    baseline_BM: Tensor | None = None
    """Scores of M responses of the reference to the same prompts; None without a score shape."""


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


def of_rows(responses: Responses, rows: Tensor) -> Responses:
    """Some of the responses, cut free of the padding that all of them share."""
    prompts, texts = ([column[i] for i in rows] for column in responses[:2])
    return Responses(prompts, texts, *window(*responses[2:5], responses.start, rows), responses.logged)


def collect(
    backbone: Backbone,
    runtime: Runtime,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    reward_fn: RewardFn,
    section: Ppo,
    *,
    seed: int,
    step: int,
) -> Rollout:
    """Sample a batch and score it once with every role.

    Args:
        backbone: the bare module, for sampling.
        runtime: the processes; its ``model`` is the prepared module or engine around the backbone.
        dialogue: the token contract.
        prompts: all training prompts.
        reward_fn: scores of responses.
        section: the recipe's ``ppo`` section.
        seed: the recipe's seed.
        step: number of the step, from 0.

    Raises:
        UserError: the samples of a prompt would be on several processes.
    """
    began = time.monotonic()
    prompt_B = prompt_of_row(section.batch_size, section.samples_per_prompt, runtime.world)
    indices = prompt_indices(seed, step, section.batch_size // section.samples_per_prompt, len(prompts))
    rows = own_rows(section.batch_size, runtime.rank, runtime.world)
    chosen = [prompts[indices[prompt_B[row]]] for row in rows]
    encoded = [dialogue.encode_prompt(prompt) for prompt in chosen]
    tokens = len(rows) * (max(map(len, encoded)) + dialogue.max_response_tokens + 1)
    needed = trunk_bytes(backbone.base, tokens)
    keep = keeps_trunk(
        section, backbone.frozen_layers, needed, runtime.any_process, no_trunk=backbone.no_trunk
    )
    ids_BT, mask_BT, actions_BR, sampled_BR, hidden_BTD = _sampled(
        backbone, runtime, dialogue, encoded, section, seed=seed, step=step, rows=rows, keep_trunk=keep
    )
    start = ids_BT.shape[1] - actions_BR.shape[1] - 1
    ended_B = ended(ids_BT[:, start:-1], dialogue.end_ids)
    generated = time.monotonic()
    if backbone.is_float32:  # to rounding no row depends on the others: those of one length together
        order = micro_batches(range(len(rows)), mask_BT.sum(-1), section.micro_batch_size)
    else:
        place = {"seed": seed, "step": step, "rank": runtime.rank, "world": runtime.world}
        order = first_pass(section, mask_BT.sum(-1), **place)
    texts = [dialogue.decode(ids) for ids in ids_BT[:, start:-1].tolist()]
    with torch.no_grad():
        if keep and hidden_BTD is None:
            states = [backbone(role="trunk", ids_BT=ids_BT[m], mask_BT=mask_BT[m]) for m in order]
            hidden_BTD = _in_order(states, order)
        part = functools.partial(window, ids_BT, mask_BT, hidden_BTD, start)
        counted_BR = None if runtime.shards_weights else actions_BR
        whole = _scored_by_roles(runtime.model, backbone, section, part, counted_BR, order)
        scores_B = _scores(reward_fn, Responses(chosen, texts, ids_BT, mask_BT, hidden_BTD, start), order)
        baseline_BM = None
        if section.score_shape != "none":
            slots = [prompt_B[row] for row in rows]
            asked = dict(sorted(zip(slots, chosen, strict=True), key=lambda pair: pair[0]))
            index = {slot: number for number, slot in enumerate(asked)}
            baseline_BM = _baseline(
                backbone, runtime, dialogue, asked, reward_fn, section, seed=seed, step=step
            )[[index[slot] for slot in slots]]  # fmt: skip
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
        scores_B,
        ended_B,
        texts,
        start,
        {"time/generate": generated - began, "time/score": time.monotonic() - generated},
        baseline_BM,
    )


def _scores(reward_fn: RewardFn, responses: Responses, order: Sequence[Tensor]) -> Tensor:
    """Scores of responses, [B], in micro-batches unless the function wants all of them together."""
    device = responses.ids_BT.device
    if getattr(reward_fn, "whole_rollout", False):
        return reward_fn(responses).to(device)
    return _in_order([reward_fn(of_rows(responses, micro)).to(device) for micro in order], order)


def _baseline(
    backbone: Backbone,
    runtime: Runtime,
    dialogue: Dialogue,
    prompts: Mapping[int, Prompt],
    reward_fn: RewardFn,
    section: Ppo,
    *,
    seed: int,
    step: int,
) -> Tensor:
    """Scores of ``reference_samples`` responses of the reference to each prompt, [prompts, M].

    prompts: by their place in the rollout, which the random numbers depend on; the result is in its order.
    """
    samples = section.reference_samples
    slots = [slot for slot in prompts for _ in range(samples)]
    rows = [slot * samples + number % samples for number, slot in enumerate(slots)]
    asked = [prompts[slot] for slot in slots]
    ids_BT, mask_BT, actions_BR, _, _ = _sampled(
        backbone, runtime, dialogue, [dialogue.encode_prompt(prompt) for prompt in asked], section,
        seed=seed, step=step, rows=rows, keep_trunk=False, role=REFERENCE,
    )  # fmt: skip
    start = ids_BT.shape[1] - actions_BR.shape[1] - 1
    texts = [dialogue.decode(ids) for ids in ids_BT[:, start:-1].tolist()]
    order = micro_batches(range(len(rows)), mask_BT.sum(-1), section.micro_batch_size)
    responses = Responses(asked, texts, ids_BT, mask_BT, None, start, logged=False)
    return _scores(reward_fn, responses, order).view(-1, samples)


def _scored_by_roles(
    model: Any,
    backbone: Backbone,
    section: Ppo,
    part: Callable[[Tensor], Window],
    counted_BR: Tensor | None,
    order: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Log-probs, entropies, reference log-probs and values of the sampled tokens, [B, R] each; no value is
    all 0.

    A role at a time, its adapter folded in. ``counted_BR``: True = a token to look at; None = all of them.
    """
    shared = section.has_value and section.value == "shared"
    pieces: dict[str, list[Tensor]] = {}
    for role, names in (("policy", ("log_probs", "entropy", "values")), (REFERENCE, ("reference", "-"))):
        with backbone.folded(role):
            for micro in order:
                rows = part(micro)
                outputs = model(
                    role,
                    *rows[:3],
                    start=rows.start,
                    temperature=section.temperature,
                    targets_mask_BR=None if counted_BR is None else counted_BR[micro],
                    value="value" if shared and role == "policy" else None,
                )
                for name, tensor_BR in zip(names, outputs, strict=False):
                    pieces.setdefault(name, []).append(tensor_BR)
    if section.has_value and not shared:
        with backbone.folded("value"):
            pieces["values"] = [model("value", *part(m)[:3], start=part(m).start) for m in order]
    whole = {name: _in_order(parts, order) for name, parts in pieces.items()}
    return {"values": torch.zeros_like(whole["log_probs"])} | whole


def _in_order(parts: Sequence[Tensor], order: Sequence[Tensor]) -> Tensor:
    """Tensors of micro-batches as one, the rows back where they were."""
    whole = torch.cat(list(parts))
    return whole[torch.argsort(torch.cat(list(order))).to(whole.device)]


def _sampled(
    backbone: Backbone,
    runtime: Runtime,
    dialogue: Dialogue,
    prompts: Sequence[Sequence[int]],
    section: Ppo,
    *,
    seed: int,
    step: int,
    rows: Sequence[int],
    keep_trunk: bool,
    role: str = "policy",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Sample all rows of this process and lay them out as closed sequences of one width.

    Prompts of one length are sampled together, and equal ones side by side, which saves padding and reading.

    Returns:
        ids, mask and actions as of ``close``, the sampled log-probs [B, R], and the trunk's hidden states
        [B, T, D] where sampling could keep them.
    """
    start = max(map(len, prompts))
    order = sorted(range(len(rows)), key=lambda i: (len(prompts[i]), list(prompts[i]), i))
    pieces: list[tuple[Tensor, ...]] = []
    hidden_BTD: Tensor | None = None
    purpose = "rollout" if role == "policy" else role
    with gathered(backbone.parameters(), changed=False), backbone.folded(role):
        for first in range(0, len(rows), section.rollout_batch_size):
            part = order[first : first + section.rollout_batch_size]
            sampled = sample(
                backbone,
                role,
                [prompts[i] for i in part],
                uniforms(seed, purpose, step, [rows[i] for i in part], dialogue.max_response_tokens),
                eos_id=dialogue.end_ids,
                pad_id=dialogue.pad_id,
                temperature=section.temperature,
                any_process=runtime.any_process if runtime.shards_weights else bool,
                keep_trunk=keep_trunk and not runtime.shards_weights,
            )
            closed = close(sampled, start, eos_id=dialogue.end_ids, pad_id=dialogue.pad_id)
            pieces.append((*closed, sampled.log_probs_BR))
            if sampled.trunk_BTD is not None:
                hidden = sampled.trunk_BTD
                if hidden_BTD is None:
                    hidden_BTD = hidden.new_zeros(len(rows), closed[0].shape[1], hidden.shape[-1])
                hidden_BTD[part, -hidden.shape[1] :] = hidden
    back = torch.argsort(torch.tensor(order)).to(runtime.device)
    ids_BT, mask_BT, actions_BR, sampled_BR = (torch.cat(parts)[back] for parts in zip(*pieces, strict=True))
    return ids_BT, mask_BT, actions_BR, sampled_BR, hidden_BTD


def close(
    sampled: Sampled, width: int, *, eos_id: int | Sequence[int], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Lay sampled responses out as sequences that all end in EOS.

    Args:
        sampled: responses with their prompts.
        width: prompt columns of the result, at least those of the prompts.
        eos_id: closes a response that the policy did not end; the first of several ids that end one. A
            response that ended in another one is closed behind it, and that one is not counted by the mask:
            the reward is read as if it were not there.
        pad_id: fills the rest.

    Returns:
        ids [B, width + R + 1] (prompt, response, closing column), their mask (True = a real token, the
        closing EOS included), and the action mask [B, R] (True = a sampled token).
    """
    more = width - sampled.prompt_ids_BP.shape[1]
    first, *others = [eos_id] if isinstance(eos_id, int) else eos_id
    actions_BR = action_mask(sampled.response_ids_BR, [first, *others])
    response_BR = torch.where(actions_BR, sampled.response_ids_BR, pad_id)
    otherwise_BR = actions_BR & torch.isin(response_BR, response_BR.new_tensor(others))
    open_B1 = ~((response_BR == first) & actions_BR).any(-1, keepdim=True)
    behind_BR1 = F.one_hot(actions_BR.sum(-1), actions_BR.shape[1] + 1).bool() & open_B1
    response_BR1 = torch.where(behind_BR1, first, F.pad(response_BR, (0, 1), value=pad_id))
    ids_BT = torch.cat([sampled.prompt_ids_BP, response_BR1], dim=1)
    mask_BT = torch.cat(
        [sampled.prompt_mask_BP, F.pad(actions_BR & ~otherwise_BR, (0, 1)) | behind_BR1], dim=1
    )
    return F.pad(ids_BT, (more, 0), value=pad_id), F.pad(mask_BT, (more, 0), value=False), actions_BR
