"""PPO on one base with adapters: the loop, readable as sentences; every formula is elsewhere.

Collect a rollout; shape its rewards and estimate advantages (``policy.ppo.reward_shaping``); update
(``policy.ppo.update``); log and checkpoint. RLOO and REINFORCE are the same loop without a value. Huang 2024
("The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031) is followed where the recipe does not
say otherwise.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from policy.ppo import invariants
from policy.ppo.bad_updates import BadUpdates
from policy.ppo.guarded_score import GuardedScore
from policy.ppo.metrics import rollout_figures
from policy.ppo.ptx import PtxBatches
from policy.ppo.reward_shaping import Aim
from policy.ppo.rollout import Rollout, ScoreFn, collect
from policy.ppo.update import Updater
from policy.ppo.weights import Learner
from rlhf.data.comparisons import Prompt
from rlhf.errors import UserError, lost_process, without
from rlhf.models.backbone import Backbone
from rlhf.recipe.schema import Ppo
from rlhf.runs.artifacts import read_json, step_of, write_atomically
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.metrics import Metrics
from rlhf.training.runtime import Runtime
from rlhf.training.signals import StopRequest

SHOWN = {"objective/score": ".3f", "objective/kl": ".2f", "policy/entropy": ".2f", "response/length": ".1f"}


class PpoTrainer:
    """Trains the ``policy`` (and ``value``) of a backbone against a score function.

    Args:
        backbone: one base with an adapter ``policy`` and, for the algorithm ``ppo``, a head ``value``.
        runtime: the processes; its ``model`` and optimiser are made here.
        dialogue: the token contract.
        prompts: training prompts.
        score_fn: scores of responses; the only thing the loop knows about rewards.
        section: the recipe's ``ppo`` section.
        seed: the recipe's seed.
        run: the open stage, for checkpoints.
        score_figures: what the score function has to say for the log of a step; every process calls it.
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
        score_figures: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.backbone, self.runtime, self.dialogue = backbone, runtime, dialogue
        self.prompts, self.section, self.seed, self.run = prompts, section, seed, run
        self.score_fn = GuardedScore(score_fn, section.score_timeout_minutes)
        self.score_figures = score_figures
        self.ended_early: str | None = None
        checkpoint = run.checkpoints.newest()
        self.done = self.saved = step_of(checkpoint)
        self._anchors = {"reference": backbone.reference_hash(), "contract": dialogue.fingerprint()}
        self.aim = Aim(section, runtime)
        self.bad = BadUpdates(run.folder, runtime, section.max_bad_updates)
        texts = PtxBatches(section, dialogue, runtime, seed) if section.ptx_coef else None
        self.learner = Learner(backbone, runtime, section, checkpoint)
        self.update = Updater(backbone, runtime, section, seed=seed, bad=self.bad, texts=texts)
        if checkpoint:
            self._restore(checkpoint)

    # ---------------------------------------------------------------- the loop

    def train(self) -> None:
        """Run all remaining steps, or up to where the recipe's limit on the KL ends the stage.

        Raises:
            UserError: an invariant does not hold, or too many updates were not finite.
            SystemExit: somebody sent SIGTERM; a checkpoint has been written.
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
        stop = StopRequest()
        with stop.listening(), self._naming_a_lost_process(), contextlib.closing(metrics):
            for step in range(self.done, section.steps if self.ended_early is None else self.done):
                began = time.monotonic()
                rollout = self._collect(step)
                self._leave_if(stop)
                collected = time.monotonic()
                if step == 0 and section.has_value:
                    rollout = self._centre_values(rollout)
                targets = self.aim(rollout)
                rate = self.learner.set_rates(step)
                stats = self.update(step, rollout, targets, self.aim.kl_coef)
                self.learner.follow()
                figures = rollout_figures(self.runtime, rollout, targets, section.batch_size) | stats
                figures |= self.score_figures()
                figures |= {"objective/kl_coef": self.aim.kl_coef, "policy/learning_rate": rate}
                figures["progress/episodes"] = float((step + 1) * section.batch_size)
                figures |= rollout.seconds
                figures |= {"time/rollout": collected - began, "time/update": time.monotonic() - collected}
                self.aim.follow(rollout)
                metrics.log(step + 1, figures)
                self.done = step + 1
                if section.max_kl is not None and figures["objective/kl"] > section.max_kl:
                    self.ended_early = f"KL {figures['objective/kl']:.2f} above max_kl {section.max_kl:g}"
                last = self.done == section.steps or self.ended_early is not None
                if last or self.done % section.checkpoint_every == 0:
                    self._checkpoint()
                if last:
                    break
                self._leave_if(stop)

    @contextlib.contextmanager
    def _naming_a_lost_process(self) -> Iterator[None]:
        """Say in one line that another process is gone, and where the run goes on."""
        try:
            yield
        except RuntimeError as error:
            reason = lost_process(error)
            if reason is None:
                raise
            raise without(reason, "ppo", f"after step {self.saved}") from error

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

    def _leave_if(self, stop: StopRequest) -> None:
        """Save and end where any process was asked to; the weights are those after the last whole step."""
        if not self.runtime.any_process(stop.asked):
            return
        if self.saved != self.done:
            self._checkpoint()
        if self.run.is_main:
            saved = f"saved after step {self.done} of {self.section.steps}"
            kept = saved if self.done else "no step was done"
            print(f"ppo: asked to stop (SIGTERM); {kept}, the same command goes on from there", flush=True)
        raise SystemExit(0)

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint(self) -> None:
        """Write everything that the next step depends on."""
        weights = self.learner.weights()
        moments = self.runtime.optimizer_tensors()
        if self.run.is_main:
            self.run.checkpoints.clean()
            with self.run.checkpoints.writing(self.done) as folder:
                self.learner.save(folder, weights, moments)
                write_atomically(folder / "rng.safetensors", save({"torch": torch.get_rng_state()}))
                state = {
                    "step": self.done,
                    "bad_updates": self.bad.count,
                    "ended_early": self.ended_early,
                    "value_offset": self.backbone.offsets.get("value", 0.0),
                    **self.aim.state(),
                    **self._anchors,
                }
                write_atomically(folder / "state.json", json.dumps(state))
            self.run.note_clock()
        self.runtime.barrier()
        self.saved = self.done

    def _restore(self, checkpoint: Path) -> None:
        """Put back everything but the adapters, which were read before the optimiser was made.

        Raises:
            UserError: the checkpoint lacks optimiser state, or stands on another reference or tokenizer.
        """
        state: dict[str, Any] = read_json(checkpoint / "state.json")
        for anchor, what in (
            ("reference", "the base or the adapter that the policy started from has changed"),
            ("contract", "the tokenizer or its template has changed"),
        ):
            if state[anchor] != self._anchors[anchor]:
                raise UserError(
                    f"{checkpoint}: {what} since it was written, so the run cannot go on; "
                    f"put the old one back, or remove {self.run.folder} to start again"
                )
        self.bad.count = int(state["bad_updates"])
        self.ended_early = state["ended_early"]
        if "value" in self.backbone.offsets:
            self.backbone.set_offset("value", float(state["value_offset"]))
        self.aim.restore(state)
        self.learner.restore(checkpoint)
        torch.set_rng_state(load((checkpoint / "rng.safetensors").read_bytes())["torch"])
        self.run.say(f"ppo: going on after step {self.done} of {self.section.steps}")
