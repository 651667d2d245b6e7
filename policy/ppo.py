"""PPO on one base with adapters: the loop, readable as sentences; every formula is elsewhere.

Huang 2024 ("The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031) is followed where the recipe
does not say otherwise. Not here (yet): adaptive KL, entropy bonus, PPO-ptx, several samples a prompt.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from policy import invariants
from policy.advantages import gae, penalise_missing_eos, token_rewards
from policy.figures import Targets, rollout_figures
from policy.loss import PolicyStats, policy_loss, value_loss
from policy.rollout import Rollout, ScoreFn, collect, micro_batches, minibatch_rows, window
from rlhf.artifacts import read_json, step_of, write_atomically
from rlhf.backbone import Backbone
from rlhf.comparisons import Prompt
from rlhf.dialogue import Dialogue
from rlhf.errors import UserError
from rlhf.metrics import Metrics
from rlhf.runtime import Runtime
from rlhf.schema import Ppo
from rlhf.sequences import masked_whiten
from rlhf.stage import StageRun

LEARNS = ("policy", "value")  # the adapters that are trained
SHOWN = {"objective/score": ".3f", "objective/kl": ".2f", "policy/entropy": ".2f", "response/length": ".1f"}


class PpoTrainer:
    """Trains the ``policy`` and ``value`` adapters of a backbone against a score function.

    Args:
        backbone: one base with adapters ``policy`` and ``value``, the latter with a head.
        runtime: the processes; its ``model`` and optimiser are made here.
        dialogue: the token contract.
        prompts: training prompts.
        score_fn: scores of responses; the only thing the loop knows about rewards.
        section: the recipe's ``ppo`` section.
        seed: the recipe's seed.
        run: the open stage, for checkpoints.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        runtime: Runtime,
        dialogue: Dialogue,
        prompts: list[Prompt],
        score_fn: ScoreFn,
        section: Ppo,
        seed: int,
        run: StageRun,
    ) -> None:
        self.backbone, self.runtime, self.dialogue = backbone, runtime, dialogue
        self.prompts, self.score_fn, self.section, self.seed = prompts, score_fn, section, seed
        self.run = run
        self.bad_updates = 0
        checkpoint = run.checkpoints.newest()
        self.done = step_of(checkpoint)
        if checkpoint:
            for adapter in LEARNS:
                backbone.load_adapter(adapter, checkpoint / adapter)
        self._rates = [section.learning_rate, section.value_learning_rate or section.learning_rate]
        by_adapter = [backbone.parameters_of(adapter) for adapter in LEARNS]
        groups = [
            {"params": list(named.values()), "lr": rate}
            for named, rate in zip(by_adapter, self._rates, strict=True)
        ]
        named = {
            f"{adapter}.{name}": parameter
            for adapter, parameters in zip(LEARNS, by_adapter, strict=True)
            for name, parameter in parameters.items()
        }
        runtime.prepare(backbone, groups, named, epsilon=section.adam_epsilon)
        if checkpoint:
            self._restore(checkpoint)

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run all remaining steps.

        Raises:
            UserError: an invariant does not hold, or too many updates were not finite.
        """
        section = self.section
        metrics = Metrics(
            self.run.folder,
            total=section.steps,
            done=self.done,
            shown=SHOWN,
            description="ppo",
            active=self.run.is_main,
        )
        for step in range(self.done, section.steps):
            began = time.monotonic()
            rollout = self._collect(step)
            sampled = time.monotonic()
            if step == 0:
                rollout = self._centre_values(rollout)
            targets = self._aim(rollout)
            stats = self._update(step, rollout, targets)
            figures = rollout_figures(self.runtime, rollout, targets, section.batch_size) | stats
            figures["progress/episodes"] = float((step + 1) * section.batch_size)
            figures |= {"time/rollout": sampled - began, "time/update": time.monotonic() - sampled}
            metrics.log(step + 1, figures)
            self.done = step + 1
            if self.done % section.checkpoint_every == 0 or self.done == section.steps:
                self._checkpoint()
        metrics.close()

    def _collect(self, step: int) -> Rollout:
        """Sample a batch and score it, then check that it is what it should be."""
        section = self.section
        rollout = collect(
            self.runtime.model,
            self.backbone,
            self.runtime,
            self.dialogue,
            self.prompts,
            self.score_fn,
            section,
            seed=self.seed,
            step=step,
        )
        if section.check_invariants:
            invariants.check_closed(rollout.ids_BT, rollout.mask_BT, self.dialogue.eos_id)
            invariants.check_sampler(
                rollout.sampled_log_probs_BR,
                rollout.log_probs_BR,
                rollout.actions_BR,
                bound=section.max_log_prob_gap,
            )
            if step == 0:
                invariants.check_reference(
                    rollout.log_probs_BR, rollout.reference_log_probs_BR, rollout.actions_BR
                )
        return rollout

    def _centre_values(self, rollout: Rollout) -> Rollout:
        """Shift the value so that it starts at the mean score.

        The reward head was trained on the closing EOS only; elsewhere it can be far off, and the value clip
        would let that bias go by only a little a step.
        """
        actions = rollout.actions_BR
        sums = torch.stack([(rollout.values_BR * actions).sum(), actions.sum(), rollout.scores_B.sum()])
        value, number, score = self.runtime.all_sum(sums).tolist()
        shift = score / self.section.batch_size - value / number
        self.backbone.set_offset("value", self.backbone.offsets["value"] + shift)
        return rollout._replace(values_BR=rollout.values_BR + shift)

    def _aim(self, rollout: Rollout) -> Targets:
        """Shape token rewards and estimate advantages."""
        section, actions = self.section, rollout.actions_BR
        scores_B = rollout.scores_B
        if section.missing_eos != "ignore":
            scores_B = penalise_missing_eos(
                scores_B, rollout.ended_B, penalty=section.missing_eos_penalty, mode=section.missing_eos
            )
        rewards_BR = token_rewards(
            scores_B,
            rollout.log_probs_BR,
            rollout.reference_log_probs_BR,
            actions,
            kl_coef=section.kl_coef,
        )
        advantages_BR, returns_BR = gae(
            rewards_BR, rollout.values_BR, actions, gamma=section.gamma, lam=section.lam
        )
        if section.whiten_advantages:
            advantages_BR = masked_whiten(
                advantages_BR, actions, shift_mean=True, all_reduce=self.runtime.all_sum
            )
        return Targets(rewards_BR, advantages_BR, returns_BR, self.runtime.all_sum(actions.sum()))

    def _update(self, step: int, rollout: Rollout, targets: Targets) -> dict[str, float]:
        """Take ``epochs`` passes over the rollout, one optimiser step a minibatch."""
        section, runtime = self.section, self.runtime
        fade = 1.0 - step / section.steps if section.schedule == "linear" else 1.0
        runtime.set_learning_rates([rate * fade for rate in self._rates])
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
                first = epoch == number == 0
                stats = self._minibatch(step, rollout, targets, rows, first=first)
                if stats is not None:
                    seen.append(stats)
            if section.stop_kl is not None and seen and seen[-1]["policy/kl_step"] > section.stop_kl:
                break
        means = {name: sum(s[name] for s in seen) / len(seen) for name in (seen[0] if seen else {})}
        if seen:
            means["policy/kl_step"] = seen[-1]["policy/kl_step"]  # how far this step went in the end
        return means | {
            "policy/updates": float(len(seen)),
            "policy/bad_updates": float(self.bad_updates),
            "policy/learning_rate": self._rates[0] * fade,
        }

    def _minibatch(
        self, step: int, rollout: Rollout, targets: Targets, rows: list[int], *, first: bool
    ) -> dict[str, float] | None:
        """One optimiser step; None where the loss was not finite and the weights stayed as they were."""
        section, runtime = self.section, self.runtime
        actions = rollout.actions_BR
        normaliser = runtime.all_sum(actions[rows].sum())
        total: PolicyStats | None = None
        losses = torch.zeros(3, device=runtime.device)  # policy, value, value clip fraction
        micros = micro_batches(rows, rollout.mask_BT.sum(-1), section.micro_batch_size)
        for number, micro in enumerate(micros):
            part = window(rollout.ids_BT, rollout.mask_BT, rollout.hidden_BTD, rollout.start, micro)
            log_probs_BR, _ = runtime.model(
                "policy",
                *part[:3],
                start=part.start,
                temperature=section.temperature,
                targets_mask_BR=None if runtime.shards_weights else actions[micro],
            )
            objective, stats = policy_loss(
                log_probs_BR,
                rollout.log_probs_BR[micro],
                targets.advantages_BR[micro],
                actions[micro],
                clip=section.clip,
                normaliser=normaliser,
            )
            if not self._finite(objective, step, rollout):
                return None
            runtime.backward(objective, last=False)
            values_BR = runtime.model("value", *part[:3], start=part.start)
            error, clipped = value_loss(
                values_BR,
                rollout.values_BR[micro],
                targets.returns_BR[micro],
                actions[micro],
                clip=section.value_clip,
                normaliser=normaliser,
            )
            if not self._finite(error, step, rollout):
                return None
            runtime.backward(section.value_coef * error, last=number + 1 == len(micros))
            losses += torch.stack([objective.detach(), error.detach(), clipped.detach()])
            total = stats if total is None else total.plus(stats)
        assert total is not None, "a minibatch has rows"
        if first and section.check_invariants:
            invariants.check_first_ratio(total.max_ratio_error)
        norm = runtime.step()
        if not math.isfinite(norm):
            self._count_bad(step, rollout, "the gradient norm")
            return None
        sums = runtime.all_sum(torch.stack([*losses, total.ratio, total.clip_fraction, total.kl_k3])).tolist()
        return {
            "policy/loss": sums[0],
            "value/loss": sums[1],
            "value/clip_fraction": sums[2],
            "policy/ratio": sums[3],
            "policy/clip_fraction": sums[4],
            "policy/kl_step": sums[5],
            "policy/grad_norm": norm,
        }

    # ---------------------------------------------------------------- faults

    def _finite(self, loss: Tensor, step: int, rollout: Rollout) -> bool:
        """Whether a loss is finite on every process; if not, gradients are dropped and it is counted."""
        if not self.runtime.any_process(not bool(loss.detach().isfinite())):
            return True
        self.runtime.discard_gradients()
        self._count_bad(step, rollout, "a loss")
        return False

    def _count_bad(self, step: int, rollout: Rollout, what: str) -> None:
        self.bad_updates += 1
        file = self.run.folder / "bad_batches" / f"step-{step + 1:07d}-rank-{self.runtime.rank}.safetensors"
        tensors = {k: v.contiguous() for k, v in rollout._asdict().items() if isinstance(v, Tensor)}
        write_atomically(file, save(tensors))
        if self.bad_updates > self.section.max_bad_updates:
            raise UserError(
                f"ppo: {what} was not finite {self.bad_updates} times (ppo.max_bad_updates is "
                f"{self.section.max_bad_updates}): lower ppo.learning_rate; the batches are in {file.parent}"
            )

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint(self) -> None:
        """Write everything that the next step depends on."""
        weights = self.by_adapter(self.runtime.whole_parameters())
        moments = self.runtime.optimizer_tensors()
        if self.run.is_main:
            self.run.checkpoints.clean()
            with self.run.checkpoints.writing(self.done) as folder:
                self.write_adapters(folder, weights)
                write_atomically(folder / "optimizer.safetensors", save(moments))
                write_atomically(folder / "rng.safetensors", save({"torch": torch.get_rng_state()}))
                state = {
                    "step": self.done,
                    "bad_updates": self.bad_updates,
                    "value_offset": self.backbone.offsets["value"],
                }
                write_atomically(folder / "state.json", json.dumps(state))
            self.run.note_clock()
        self.runtime.barrier()

    def write_adapters(self, folder: Path, weights: dict[str, dict[str, Tensor]] | None = None) -> None:
        """Save the learning adapters in peft's format, each in a folder of its name."""
        weights = weights or self.by_adapter(self.runtime.whole_parameters())
        for adapter, tensors in weights.items():
            (folder / adapter).mkdir(parents=True, exist_ok=True)
            self.backbone.save_adapter(adapter, folder / adapter, tensors)

    @staticmethod
    def by_adapter(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Parameters by adapter and saved name, from their names in a checkpoint."""
        return {
            adapter: {
                name.removeprefix(f"{adapter}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{adapter}.")
            }
            for adapter in LEARNS
        }

    def _restore(self, checkpoint: Path) -> None:
        """Put back everything but the adapters, which were read before the optimiser was made.

        Raises:
            UserError: the checkpoint lacks optimiser state: going on with a fresh Adam would be another run.
        """
        state: Any = read_json(checkpoint / "state.json")
        self.bad_updates = int(state["bad_updates"])
        self.backbone.set_offset("value", float(state["value_offset"]))
        try:
            self.runtime.load_optimizer_tensors(load_file(checkpoint / "optimizer.safetensors"))
        except (KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{checkpoint}: the optimiser state is incomplete ({error}); "
                f"remove {checkpoint} to go on from the one before"
            ) from None
        torch.set_rng_state(load((checkpoint / "rng.safetensors").read_bytes())["torch"])
        if self.run.is_main:
            print(f"ppo: going on after step {self.done} of {self.section.steps}", flush=True)
