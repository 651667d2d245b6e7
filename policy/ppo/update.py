"""One rollout's update: epochs of minibatches, each one optimiser step, cut into micro-batches.

A minibatch is a list of parts, each a forward pass of one role and a share of the loss; the parts of a role
stand together, so that its adapter is folded into the weights once for all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from policy.ppo import invariants
from policy.ppo.bad_updates import BadUpdates
from policy.ppo.batching import micro_batches, minibatch_rows
from policy.ppo.loss import PolicyStats, kl_loss, policy_loss, token_weights, value_loss
from policy.ppo.ptx import PtxBatches, Texts
from policy.ppo.reward_shaping import Targets
from policy.ppo.rollout import Rollout, window
from rlhf.models.backbone import Backbone
from rlhf.models.masks import masked_sum
from rlhf.recipe.schema import Ppo
from rlhf.training.runtime import Runtime


class Batch(NamedTuple):
    """What the parts of one minibatch share."""

    rollout: Rollout
    targets: Targets
    weights_BR: Tensor
    """What each action counts; 0 outside the minibatch."""
    kl_coef: float


class Part(NamedTuple):
    """A share of a minibatch's loss."""

    role: str
    loss: Callable[[], Tensor]


class Updater:
    """Trains on rollouts.

    Args:
        backbone: the bare module, for folding.
        runtime: the processes; its ``model`` is the prepared module.
        section: the recipe's ``ppo`` section.
        seed: the recipe's seed.
        bad: counts updates that are not finite.
        texts: plain texts for every optimiser step, with PPO-ptx.
    """

    def __init__(
        self,
        backbone: Backbone,
        runtime: Runtime,
        section: Ppo,
        *,
        seed: int,
        bad: BadUpdates,
        texts: PtxBatches | None,
    ) -> None:
        self.backbone, self.runtime, self.section, self.seed = backbone, runtime, section, seed
        self.bad, self.texts = bad, texts
        self._stats: PolicyStats | None = None
        self._sums: dict[str, Tensor] = {}

    def __call__(self, step: int, rollout: Rollout, targets: Targets, kl_coef: float) -> dict[str, float]:
        """Take ``epochs`` passes over a rollout; returns the means of what its updates did.

        Args:
            step: of PPO, from 0.
            rollout: this process's share.
            targets: what is aimed at.
            kl_coef: price of the KL, where it is in the loss.
        """
        section, runtime = self.section, self.runtime
        seen: list[dict[str, float]] = []
        for epoch in range(section.epochs):
            for number, rows in enumerate(
                minibatch_rows(
                    section.batch_size,
                    section.minibatches,
                    seed=self.seed,
                    step=step,
                    epoch=epoch,
                    rank=runtime.rank,
                    world=runtime.world,
                )
            ):
                batch = Batch(rollout, targets, self._weights(rollout, rows), kl_coef)
                stats = self._minibatch(step, (epoch, number), batch, rows)
                if stats is not None:
                    seen.append(stats)
            went = seen[-1].get("policy/kl_step", 0.0) if seen else 0.0
            if section.stop_kl is not None and went > section.stop_kl:
                break
        means = {name: sum(s[name] for s in seen) / len(seen) for name in (seen[0] if seen else {})}
        if "policy/kl_step" in means:
            means["policy/kl_step"] = seen[-1]["policy/kl_step"]  # how far this step went in the end
        return means | {"policy/updates": float(len(seen)), "policy/bad_updates": float(self.bad.count)}

    def _weights(self, rollout: Rollout, rows: list[int]) -> Tensor:
        weights_BR = torch.zeros(rollout.actions_BR.shape, device=rollout.actions_BR.device)
        weights_BR[rows] = token_weights(
            rollout.actions_BR[rows], self.section.loss_level, self.runtime.all_sum
        )
        return weights_BR

    def _minibatch(
        self, step: int, place: tuple[int, int], batch: Batch, rows: list[int]
    ) -> dict[str, float] | None:
        """One optimiser step; None where a loss was not finite and the weights stayed as they were."""
        runtime = self.runtime
        self._stats, self._sums = None, {}
        parts = self._parts(step, place, batch, rows)
        done = 0
        for role, group in itertools.groupby(parts, key=lambda part: part.role):
            with self.backbone.folded(role):
                for part in group:
                    loss = part.loss()
                    if self.bad.spoils(loss, step, batch.rollout):
                        return None
                    done += 1
                    runtime.backward(loss, last=done == len(parts))
        if place == (0, 0) and self.section.check_invariants and self._stats is not None:
            invariants.check_first_ratio(self._stats.max_ratio_error)
        norm = runtime.step()
        if not math.isfinite(norm):
            self.bad.note(step, batch.rollout, "the gradient norm")
            return None
        if self._stats is not None:
            self._sums["policy/ratio"] = self._stats.ratio
            self._sums["policy/clip_fraction"] = self._stats.clip_fraction
            self._sums["policy/kl_step"] = self._stats.kl_k3
        sums = runtime.all_sum(torch.stack([*self._sums.values()])).tolist()
        return dict(zip(self._sums, sums, strict=True)) | {"policy/grad_norm": norm}

    def _parts(self, step: int, place: tuple[int, int], batch: Batch, rows: list[int]) -> list[Part]:
        """The forward passes of a minibatch, those of a role together."""
        section = self.section
        micros = micro_batches(rows, batch.rollout.mask_BT.sum(-1), section.micro_batch_size)
        policy: list[Part] = []
        if step >= section.value_warmup:
            policy = [Part("policy", partial(self._policy_part, batch, micro)) for micro in micros]
            if self.texts is not None:
                epoch, number = place
                texts = self.texts((step * section.epochs + epoch) * section.minibatches + number)
                policy += [
                    Part("policy", partial(self._text_part, texts, slice(i, i + section.micro_batch_size)))
                    for i in range(0, len(texts.ids_BT), section.micro_batch_size)
                ]
        if not section.has_value or (section.value == "shared" and policy):
            return policy
        return policy + [Part("value", partial(self._value_part, batch, micro)) for micro in micros]

    def _policy_part(self, batch: Batch, micro: Tensor) -> Tensor:
        """The policy's loss of some rows, and the value's where it is a head on the same adapter."""
        section, rollout = self.section, batch.rollout
        actions, weights = rollout.actions_BR[micro], batch.weights_BR[micro]
        part = window(rollout.ids_BT, rollout.mask_BT, rollout.hidden_BTD, rollout.start, micro)
        shared = section.has_value and section.value == "shared"
        log_probs_BR, entropy_BR, *values = self.runtime.model(
            "policy",
            *part[:3],
            start=part.start,
            temperature=section.temperature,
            targets_mask_BR=None if self.runtime.shards_weights else actions,
            bonus=section.entropy_coef > 0,
            value="value" if shared else None,
        )
        loss, stats = policy_loss(
            log_probs_BR,
            rollout.log_probs_BR[micro],
            batch.targets.advantages_BR[micro],
            actions,
            weights_BT=weights,
            clip=section.clip,
            dual_clip=section.dual_clip,
        )
        self._stats = stats if self._stats is None else self._stats.plus(stats)
        self._add("policy/loss", loss)
        if section.kl_in == "loss":
            assert section.kl_estimator != "k1", "the recipe refuses it"
            price = kl_loss(
                log_probs_BR,
                rollout.reference_log_probs_BR[micro],
                actions,
                weights_BT=weights,
                estimator=section.kl_estimator,
            )
            self._add("policy/kl_loss", price)
            loss = loss + batch.kl_coef * price
        if section.entropy_coef:
            loss = loss - section.entropy_coef * masked_sum(entropy_BR * weights, actions)
        return loss + self._value_error(batch, micro, values[0]) if shared else loss

    def _value_part(self, batch: Batch, micro: Tensor) -> Tensor:
        rollout = batch.rollout
        part = window(rollout.ids_BT, rollout.mask_BT, rollout.hidden_BTD, rollout.start, micro)
        return self._value_error(batch, micro, self.runtime.model("value", *part[:3], start=part.start))

    def _value_error(self, batch: Batch, micro: Tensor, values_BR: Tensor) -> Tensor:
        """The value's share of the loss for some rows."""
        error, clipped = value_loss(
            values_BR,
            batch.rollout.values_BR[micro],
            batch.targets.returns_BR[micro],
            batch.rollout.actions_BR[micro],
            weights_BT=batch.weights_BR[micro],
            clip=self.section.value_clip,
        )
        self._add("value/loss", error)
        self._add("value/clip_fraction", clipped)
        return self.section.value_coef * error

    def _text_part(self, texts: Texts, rows: slice) -> Tensor:
        """The language-model loss of some plain texts."""
        wanted = texts.wanted_BR[rows]
        log_probs_BR, _ = self.runtime.model(
            "policy",
            texts.ids_BT[rows],
            texts.mask_BT[rows],
            start=1,
            targets_mask_BR=None if self.runtime.shards_weights else wanted,
        )
        loss = -masked_sum(log_probs_BR, wanted) / texts.total
        self._add("ptx/loss", loss)
        return self.section.ptx_coef * loss

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value.detach()
