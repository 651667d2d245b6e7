"""One rollout's update: epochs of minibatches, each one optimizer step, cut into micro-batches.

The forward passes of a role stand together, so that its adapter is folded into the weights once for all of
them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from policy.ppo.batching import PtxBatches, Texts, micro_batches, minibatch_rows
from policy.ppo.checks import check_first_ratio
from policy.ppo.loss import PolicyStats, kl_loss, policy_loss, token_weights, value_loss
from policy.ppo.rollout import Rollout, window
from policy.ppo.weights import AdapterWeights
from rlhf.errors import UserError
from rlhf.models.masks import masked_sum
from rlhf.runs.artifacts import write_atomically
from rlhf.training.runtime import Runtime


class NonfiniteUpdates:
    """Updates that are not finite: skipped on every process, counted, their batch saved; too many end the
    run.

    Args:
        folder: of the stage; batches go to ``nonfinite_batches`` in it.
        runtime: the processes.
        limit: number of them that does not end the run.
    """

    def __init__(self, folder: Path, runtime: Runtime, limit: int) -> None:
        self.folder = folder / "nonfinite_batches"
        self.runtime, self.limit = runtime, limit
        self.count = 0

    def skips(self, loss: Tensor, step: int, rollout: Rollout) -> bool:
        """Whether a loss is not finite on any process; then all gradients are dropped and it is counted."""
        if not self.runtime.any_process(not bool(loss.detach().isfinite())):
            return False
        self.runtime.discard_gradients()
        self.add(step, rollout, "a loss")
        return True

    def add(self, step: int, rollout: Rollout, what: str) -> None:
        """Count an update that was skipped and save its batch.

        Raises:
            UserError: there have been too many.
        """
        self.count += 1
        file = self.folder / f"step-{step + 1:07d}-rank-{self.runtime.rank}.safetensors"
        tensors = {k: v.contiguous() for k, v in rollout._asdict().items() if isinstance(v, Tensor)}
        write_atomically(file, save(tensors))
        if self.count > self.limit:
            raise UserError(
                f"ppo: {what} was not finite {self.count} times (ppo.max_nonfinite_updates is {self.limit}): "
                f"lower ppo.learning_rate; the batches are in {self.folder}"
            )


class Batch(NamedTuple):
    """What the micro-batches of one minibatch share."""

    rollout: Rollout
    advantages_BR: Tensor
    returns_BR: Tensor
    weights_BR: Tensor
    """What each action counts; 0 outside the minibatch."""
    kl_coef: float


class Updater:
    """Trains on rollouts.

    Args:
        weights: the adapters that learn, and their optimizer.
        seed: the recipe's seed.
        nonfinite: counts updates that are not finite.
        texts: plain texts for every optimizer step, with PPO-ptx.
    """

    def __init__(
        self, weights: AdapterWeights, *, seed: int, nonfinite: NonfiniteUpdates, texts: PtxBatches | None
    ) -> None:
        self.weights, self.seed, self.nonfinite, self.texts = weights, seed, nonfinite, texts
        self.backbone, self.runtime, self.section = weights.backbone, weights.runtime, weights.section
        self._stats: PolicyStats | None = None
        self._sums: dict[str, Tensor] = {}

    def __call__(
        self, step: int, rollout: Rollout, advantages_BR: Tensor, returns_BR: Tensor, kl_coef: float
    ) -> dict[str, float]:
        """Take ``epochs`` passes over a rollout; returns the means of what its updates did.

        Args:
            step: of PPO, from 0.
            rollout: this process's share.
            advantages_BR: of every action.
            returns_BR: what the value is trained towards.
            kl_coef: coefficient of the KL, where it is in the loss.
        """
        section, runtime = self.section, self.runtime
        learning_rate = self.weights.set_learning_rates(step)
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
                batch = Batch(rollout, advantages_BR, returns_BR, self._token_weights(rollout, rows), kl_coef)
                stats = self._minibatch(step, (epoch, number), batch, rows)
                if stats is not None:
                    seen.append(stats)
            went = seen[-1].get("policy/kl_step", 0.0) if seen else 0.0
            if section.target_kl is not None and went > section.target_kl:
                break
        means = {name: sum(s[name] for s in seen) / len(seen) for name in (seen[0] if seen else {})}
        if "policy/kl_step" in means:
            means["policy/kl_step"] = seen[-1]["policy/kl_step"]  # how far this step went in the end
        self.weights.update_ema()
        return means | {
            "policy/updates": float(len(seen)),
            "policy/nonfinite_updates": float(self.nonfinite.count),
            "policy/learning_rate": learning_rate,
            "objective/kl_coef": kl_coef,
        }

    def _token_weights(self, rollout: Rollout, rows: list[int]) -> Tensor:
        weights_BR = torch.zeros(rollout.actions_BR.shape, device=rollout.actions_BR.device)
        weights_BR[rows] = token_weights(
            rollout.actions_BR[rows], self.section.loss_level, self.runtime.all_sum
        )
        return weights_BR

    def _minibatch(
        self, step: int, place: tuple[int, int], batch: Batch, rows: list[int]
    ) -> dict[str, float] | None:
        """One optimizer step; None where a loss was not finite and the weights stayed as they were."""
        section, runtime = self.section, self.runtime
        self._stats, self._sums = None, {}
        micros = micro_batches(rows, batch.rollout.mask_BT.sum(-1), section.micro_batch_size)
        learns = step >= self.weights.value_warmup.steps
        texts = self._texts(step, place) if learns and self.texts is not None else []
        own_value = section.has_value and not (section.value == "shared" and learns)
        left = (len(micros) + len(texts)) * learns + len(micros) * own_value
        if learns:
            with self.backbone.folded("policy"):
                for micro in micros:
                    left -= 1
                    if not self._backward(self._policy_loss(batch, micro), step, batch, last=not left):
                        return None
                for part in texts:
                    left -= 1
                    if not self._backward(self._text_loss(part), step, batch, last=not left):
                        return None
        if own_value:
            with self.backbone.folded("value"):
                for micro in micros:
                    left -= 1
                    if not self._backward(self._value_loss(batch, micro), step, batch, last=not left):
                        return None
        if place == (0, 0) and self._stats is not None:
            check_first_ratio(self._stats.max_ratio_error)
        norm = runtime.step()
        if not math.isfinite(norm):
            self.nonfinite.add(step, batch.rollout, "the gradient norm")
            return None
        if self._stats is not None:
            self._sums["policy/ratio"] = self._stats.ratio
            self._sums["policy/clip_fraction"] = self._stats.clip_fraction
            self._sums["policy/kl_step"] = self._stats.kl_k3
        sums = runtime.all_sum(torch.stack([*self._sums.values()])).tolist()
        return dict(zip(self._sums, sums, strict=True)) | {"policy/grad_norm": norm}

    def _backward(self, loss: Tensor, step: int, batch: Batch, *, last: bool) -> bool:
        """Add the gradients of a micro-batch; False where its loss is not finite and all are dropped."""
        if self.nonfinite.skips(loss, step, batch.rollout):
            return False
        self.runtime.backward(loss, last=last)
        return True

    def _policy_loss(self, batch: Batch, micro: Tensor) -> Tensor:
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
            batch.advantages_BR[micro],
            actions,
            weights_BT=weights,
            clip=section.clip_range,
            dual_clip=section.dual_clip,
        )
        self._stats = stats if self._stats is None else self._stats.plus(stats)
        self._add("policy/loss", loss)
        if section.kl_in == "loss":
            assert section.kl_estimator != "k1", "the recipe refuses it"
            penalty = kl_loss(
                log_probs_BR,
                rollout.reference_log_probs_BR[micro],
                actions,
                weights_BT=weights,
                estimator=section.kl_estimator,
            )
            self._add("policy/kl_loss", penalty)
            loss = loss + batch.kl_coef * penalty
        if section.entropy_coef:
            loss = loss - section.entropy_coef * masked_sum(entropy_BR * weights, actions)
        return loss + self._value_error(batch, micro, values[0]) if shared else loss

    def _value_loss(self, batch: Batch, micro: Tensor) -> Tensor:
        """The loss of some rows under the value's own adapter."""
        rollout = batch.rollout
        part = window(rollout.ids_BT, rollout.mask_BT, rollout.hidden_BTD, rollout.start, micro)
        return self._value_error(batch, micro, self.runtime.model("value", *part[:3], start=part.start))

    def _value_error(self, batch: Batch, micro: Tensor, values_BR: Tensor) -> Tensor:
        """The value's share of the loss for some rows."""
        error, clipped = value_loss(
            values_BR,
            batch.rollout.values_BR[micro],
            batch.returns_BR[micro],
            batch.rollout.actions_BR[micro],
            weights_BT=batch.weights_BR[micro],
            clip=self.section.value_clip_range,
        )
        self._add("value/loss", error)
        self._add("value/clip_fraction", clipped)
        return self.section.value_coef * error

    def _texts(self, step: int, place: tuple[int, int]) -> list[Texts]:
        """The plain texts of a minibatch, a micro-batch each."""
        assert self.texts is not None, "asked for with PPO-ptx only"
        section, (epoch, number) = self.section, place
        *rows, total = self.texts((step * section.epochs + epoch) * section.minibatches + number)
        parts = zip(*(tensor.split(section.micro_batch_size) for tensor in rows), strict=True)
        return [Texts(ids_BT, mask_BT, wanted_BR, total) for ids_BT, mask_BT, wanted_BR in parts]

    def _text_loss(self, texts: Texts) -> Tensor:
        """The language-model loss of some plain texts."""
        wanted = texts.wanted_BR
        log_probs_BR, _ = self.runtime.model(
            "policy",
            texts.ids_BT,
            texts.mask_BT,
            start=1,
            targets_mask_BR=None if self.runtime.shards_weights else wanted,
        )
        loss = -masked_sum(log_probs_BR, wanted) / texts.total
        self._add("ptx/loss", loss)
        return self.section.ptx_coef * loss

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value.detach()
