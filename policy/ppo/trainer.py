"""PPO on one base with adapters: the loop; every formula is a pure function elsewhere.

Shaping of rewards: :mod:`policy.ppo.reward_shaping`; advantages: :mod:`policy.ppo.advantages`; losses:
:mod:`policy.ppo.update` and :mod:`policy.ppo.loss`. RLOO, GRPO, Dr. GRPO and REINFORCE are the same loop
without a value. Huang 2024 ("The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031) is followed
where the recipe does not choose otherwise.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from policy.ppo import checks
from policy.ppo.advantages import estimate_advantages
from policy.ppo.batching import PtxBatches
from policy.ppo.checks import GuardedScore, SamplerGap
from policy.ppo.kl import KLController
from policy.ppo.metrics import rollout_metrics, tokens_per_second
from policy.ppo.reward_shaping import RewardShaper
from policy.ppo.rollout import RewardFn, Rollout, collect
from policy.ppo.update import NonfiniteUpdates, Updater
from policy.ppo.weights import AdapterWeights
from rlhf.data.comparisons import Prompt
from rlhf.errors import lost_process, lost_process_error
from rlhf.models.backbone import Backbone
from rlhf.models.base import precision_of
from rlhf.models.lora import HEAD
from rlhf.recipe.schema import Distributed, Ppo
from rlhf.runs.artifacts import Checkpoints, check_anchors, read_json, step_of, write_atomically
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.metrics import Metrics
from rlhf.training.runtime import Runtime
from rlhf.training.signals import StopRequest

_ANCHORS = {
    "reference": "the base or the adapter that the policy started from",
    "contract": "the tokenizer or its template",
}
SHOWN = {"objective/score": ".3f", "objective/kl": ".2f", "policy/entropy": ".2f", "response/length": ".1f"}


class PpoTrainer:
    """Trains the ``policy`` (and ``value``) adapter of a backbone against a reward function.

    Args:
        backbone: one base with an adapter ``policy`` and, for the algorithm ``ppo``, a head ``value``
            (:func:`policy.ppo.setup.new_backbone` makes one).
        dialogue: tokenizer, template and lengths.
        prompts: training prompts.
        reward_fn: scores of responses; the only thing the loop knows about rewards.
        section: the hyperparameters, as in the recipe's ``ppo`` section.
        folder: where checkpoints and ``metrics.jsonl`` go. One that holds a checkpoint is resumed.
        seed: of all sampling and shuffling.
        runtime: the processes; its ``model`` and optimizer are made here. None = one process.
        reward_metrics: further metrics of a step from the reward function; every process calls it.
        on_checkpoint: called behind every checkpoint, on the main process.
        trackers: ``tensorboard``, ``wandb`` or ``trackio``, beside ``metrics.jsonl``; None = those of the
            recipe in the folder, where there is one.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        dialogue: Dialogue,
        prompts: Sequence[Prompt],
        reward_fn: RewardFn,
        section: Ppo,
        folder: str | Path,
        seed: int = 0,
        runtime: Runtime | None = None,
        reward_metrics: Callable[[], dict[str, float]] = dict,
        on_checkpoint: Callable[[], None] = lambda: None,
        trackers: Sequence[str] | None = None,
    ) -> None:
        self.runtime = runtime or Runtime(
            Distributed(),
            seed=seed,
            max_grad_norm=section.max_grad_norm,
            micro_batch_size=section.micro_batch_size,
        )
        self.backbone, self.dialogue, self.prompts = backbone, dialogue, prompts
        self.section, self.seed, self.folder = section, seed, Path(folder)
        learning = [p for p in backbone.parameters() if p.requires_grad and not self.runtime.shards_weights]
        self.reward_fn = GuardedScore(reward_fn, section.score_timeout_minutes, learning)
        self.reward_metrics, self.on_checkpoint, self.trackers = reward_metrics, on_checkpoint, trackers
        self.is_main = self.runtime.rank == 0
        self.ended_early: str | None = None
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        checkpoint = self.checkpoints.newest()
        self.done = self.saved = step_of(checkpoint)
        self._anchors = {"reference": backbone.reference_hash(), "contract": dialogue.fingerprint()}
        self.reward_shaper = RewardShaper(section, self.runtime)
        self.kl_controller = KLController(section, self.runtime)
        self.sampler_gap = SamplerGap(section.max_log_prob_gap, precision_of(backbone), self.runtime.gather)
        self.nonfinite = NonfiniteUpdates(self.folder, self.runtime, section.max_nonfinite_updates)
        self.weights = AdapterWeights(backbone, self.runtime, section, checkpoint)
        self.update = Updater(
            self.weights,
            seed=seed,
            nonfinite=self.nonfinite,
            texts=PtxBatches(section, dialogue, self.runtime, seed) if section.ptx_coef else None,
        )
        self.stop, self.collected_at, self.kl = StopRequest(), 0.0, 0.0
        self.gaps: dict[str, float] = {}  # between sampling and training, of the last rollout
        self.metrics: Metrics | None = None
        if checkpoint:
            self._restore(checkpoint)

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run all remaining steps, or up to where ``max_kl`` ends the stage.

        Raises:
            UserError: an invariant does not hold, or too many updates were not finite.
            SystemExit: SIGTERM was received; a checkpoint has been written.
        """
        with self._running():
            for step in self.remaining_steps():
                rollout = self.collect_rollout(step)  # sample, score, log-probs, values
                rewards = self.reward_shaper(rollout, self.kl_controller.coef)  # score - KL penalty
                advantages, returns = self.estimate_advantages(rollout, rewards)  # GAE, GRPO, ...
                stats = self.update(step, rollout, advantages, returns, self.kl_controller.coef)  # PPO clip
                self.kl_controller.update(rollout)
                figures = self.figures_of(step, rollout, rewards, returns, stats)
                self.note_figures(step, figures)  # end of the value's warm-up, best policy, KL for max_kl
                self.log(figures)
                if self.save_or_stop():
                    break

    def remaining_steps(self) -> range:
        """Steps that are not done, counted from 0; none behind an early end."""
        return range(self.done, self.section.steps if self.ended_early is None else self.done)

    def collect_rollout(self, step: int) -> Rollout:
        """Sample a batch of responses, score it, and compute log-probs, reference log-probs and values."""
        began = time.monotonic()
        self.weights.note_sampled()
        rollout = collect(
            self.backbone,
            self.runtime,
            self.dialogue,
            self.prompts,
            self.reward_fn,
            self.section,
            seed=self.seed,
            step=step,
        )
        self.check_rollout(rollout, step)
        self.stop_if_asked()
        self.collected_at = time.monotonic()
        rollout = rollout._replace(
            seconds=dict(rollout.seconds) | {"time/rollout": self.collected_at - began}
        )
        return self.center_values(rollout) if step == 0 and self.section.has_value else rollout

    def estimate_advantages(self, rollout: Rollout, rewards_BR: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns [B, R] of a rollout, by ``section.algorithm``; the returns are Monte-Carlo
        while only the value learns."""
        section, warms_up = self.section, self.weights.value_warmup.runs(self.done)
        return estimate_advantages(
            rewards_BR,
            rollout.values_BR,
            rollout.actions_BR,
            algorithm=section.algorithm,
            gamma=section.gamma,
            lam=section.lam,
            lam_value=1.0 if warms_up else section.lam_value,
            lam_length=section.lam_length,
            samples=section.samples_per_prompt,
            whiten=section.whitens_advantages,
            all_reduce=self.runtime.all_sum,
        )

    def figures_of(
        self, step: int, rollout: Rollout, rewards_BR: Tensor, returns_BR: Tensor, stats: dict[str, float]
    ) -> dict[str, float]:
        """The metrics of a step, over all processes; every process must call it."""
        found = rollout_metrics(self.runtime, rollout, rewards_BR, returns_BR, self.section.batch_size)
        found |= stats | self.gaps | self.reward_metrics() | dict(rollout.seconds)
        found["progress/episodes"] = float((step + 1) * self.section.batch_size)
        found["time/update"] = time.monotonic() - self.collected_at
        return found | tokens_per_second(found, self.section.batch_size)

    def note_figures(self, step: int, figures: dict[str, float]) -> None:
        """The step is done: let its figures decide when the value's warm-up ends and which policy is best,
        and keep its KL for ``max_kl``.

        Raises:
            UserError: the warm-up missed its goal, or ``keep_best`` has no test model.
        """
        self.weights.note_figures(step, figures)
        self.kl, self.done = figures["objective/kl"], step + 1

    def log(self, figures: dict[str, float]) -> None:
        """Write the metrics of the last step that is done."""
        assert self.metrics is not None, "there is a log while the loop runs"
        self.metrics.log(self.done, figures)

    def save_or_stop(self) -> bool:
        """Checkpoint where it is time; True at the last step, also one that ``max_kl`` makes the last."""
        section = self.section
        if section.max_kl is not None and self.kl > section.max_kl:
            self.ended_early = f"KL {self.kl:.2f} above max_kl {section.max_kl:g}"
        last = self.done == section.steps or self.ended_early is not None
        if last or self.done % section.checkpoint_every == 0:
            self._checkpoint()
        if not last:
            self.stop_if_asked()
        return last

    def save(self) -> None:
        """Write the trained adapters in peft's format, each in a folder of its name with the tokenizer.

        With ``ema_decay`` the policy is the moving average, with ``keep_best`` the best one, and
        ``policy_last`` the last weights. Every process must call it.
        """
        adapters = self.weights.gathered()
        if not self.is_main:
            return
        if self.section.has_value:
            adapters["value"][f"{HEAD}.bias"] += self.backbone.offsets["value"]  # peft's format has no offset
        chosen = self.weights.chosen()
        if chosen is not None:
            adapters["policy_last"] = adapters["policy"]
            adapters["policy"] = chosen
        self.weights.write_adapters(self.folder, adapters)
        for adapter in adapters:
            self.dialogue.tokenizer.save_pretrained(str(self.folder / adapter))

    # ---------------------------------------------------------------- parts of a step

    def check_rollout(self, rollout: Rollout, step: int) -> None:
        """The invariants of a rollout (:mod:`policy.ppo.checks`)."""
        actions = rollout.actions_BR
        checks.check_closed(rollout.ids_BT, rollout.mask_BT, self.dialogue.end_id)
        self.gaps = self.sampler_gap(rollout.sampled_log_probs_BR, rollout.log_probs_BR, actions)
        if step == 0:
            checks.check_reference(rollout.log_probs_BR, rollout.reference_log_probs_BR, actions)

    def center_values(self, rollout: Rollout) -> Rollout:
        """Shift the value so that it starts at the mean score.

        The reward head was trained on the closing EOS only; elsewhere it can be far off, and the value clip
        would reduce that bias only a little a step.
        """
        actions = rollout.actions_BR
        scores_B = self.reward_shaper.shaped(rollout)
        sums = torch.stack([(rollout.values_BR * actions).sum(), actions.sum(), scores_B.sum()])
        value, number, score = self.runtime.all_sum(sums).tolist()
        shift = score / self.section.batch_size - value / number
        self.backbone.set_offset("value", self.backbone.offsets["value"] + shift)
        return rollout._replace(values_BR=rollout.values_BR + shift)

    def stop_if_asked(self) -> None:
        """Save and exit where any process got SIGTERM; the weights are those after the last whole step."""
        if not self.runtime.any_process(self.stop.asked):
            return
        if self.saved != self.done:
            self._checkpoint()
        saved = f"saved after step {self.done} of {self.section.steps}"
        self.stop.leave("ppo", saved if self.done else "no step was done", is_main=self.is_main)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """The log is open and SIGTERM is noted; a lost process ends the run with one line."""
        self.metrics = metrics = Metrics(
            self.folder,
            total=self.section.steps,
            done=self.done,
            shown=SHOWN,
            description="ppo",
            active=self.is_main,
            trackers=self.trackers,
        )
        with self.stop.listening(), contextlib.closing(metrics):
            try:
                yield
            except RuntimeError as error:
                reason = lost_process(error)
                if reason is None:
                    raise
                raise lost_process_error(reason, "ppo", f"after step {self.saved}") from error

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint(self) -> None:
        """Write everything that the next step depends on."""
        weights = self.weights.gathered()
        moments = self.runtime.optimizer_tensors()
        if self.is_main:
            self.checkpoints.clean()
            with self.checkpoints.writing(self.done) as folder:
                self.weights.save(folder, weights, moments)
                write_atomically(folder / "rng.safetensors", save({"torch": torch.get_rng_state()}))
                state = {
                    "step": self.done,
                    "nonfinite_updates": self.nonfinite.count,
                    "ended_early": self.ended_early,
                    "value_warmup": self.weights.value_warmup.steps,
                    "value_offset": self.backbone.offsets.get("value", 0.0),
                    **self.kl_controller.state(),
                    **self.reward_shaper.state(),
                    **self.sampler_gap.state(),
                    **self.reward_fn.state(),
                    **self._anchors,
                }
                write_atomically(folder / "state.json", json.dumps(state))
            self.on_checkpoint()
        self.runtime.barrier()
        self.saved = self.done

    def _restore(self, checkpoint: Path) -> None:
        """Put back everything but the adapters, which were read before the optimizer was made.

        Raises:
            UserError: the checkpoint lacks optimizer state, or belongs to another reference or tokenizer.
        """
        state: dict[str, Any] = read_json(checkpoint / "state.json")
        check_anchors(checkpoint, state, self._anchors, _ANCHORS)
        self.nonfinite.count = int(state.get("nonfinite_updates", state.get("bad_updates", 0)))
        self.ended_early = state["ended_early"]
        self.weights.value_warmup.steps = int(state.get("value_warmup", self.section.value_warmup))
        if "value" in self.backbone.offsets:
            self.backbone.set_offset("value", float(state["value_offset"]))
        self.kl_controller.restore(state)
        self.reward_shaper.restore(state)
        self.sampler_gap.restore(state)
        self.reward_fn.restore(state)
        self.weights.restore(checkpoint)
        torch.set_rng_state(load((checkpoint / "rng.safetensors").read_bytes())["torch"])
        if self.is_main:
            print(f"ppo: going on after step {self.done} of {self.section.steps}", flush=True)
