"""PPO and the evaluation of the policy."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from rlhf.schema.fields import NonNegative, Positive, Rate, Section, UnitInterval


class Ppo(Section):
    """PPO with LoRA. Huang 2024 = "The N+ Implementation Details of RLHF with PPO", arXiv 2403.17031."""

    steps: Positive = 100
    """Rollouts, each followed by `epochs` passes."""
    batch_size: Positive = 64
    """Responses a rollout, over all processes."""
    minibatches: Positive = 1
    """Optimiser steps an epoch; Huang 2024 uses 1."""
    micro_batch_size: Positive = 8
    """Responses in memory at once while training, a process; it does not change the result."""
    rollout_batch_size: Positive = 32
    """Responses generated together, a process."""
    epochs: Positive = 4
    """Passes over each rollout (K = 4: Stiennon 2020, Huang 2024; 1: InstructGPT)."""
    learning_rate: Rate = 3e-6
    """Policy adapter's AdamW peak (Huang 2024, for full fine-tuning; LoRA wants about 100 times more)."""
    value_learning_rate: Rate | None = None
    """Value adapter's and head's peak; null = learning_rate."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate over the steps: linear to 0 (Huang 2024) or constant."""
    adam_epsilon: Rate = 1e-5
    """Epsilon of AdamW (Huang 2024)."""
    max_grad_norm: Rate = 1.0
    """Global gradient-norm clip over policy and value."""
    kl_coef: NonNegative = 0.05
    """β, weight of the per-token KL penalty k1 in the reward (Stiennon 2020, Huang 2024)."""
    gamma: UnitInterval = 1.0
    """Discount."""
    lam: UnitInterval = 0.95
    """λ of generalised advantage estimation (Schulman 2016)."""
    clip: Rate = 0.2
    """Ratio clip ε (Schulman 2017, eq. 7)."""
    value_clip: Rate | None = 0.2
    """Range around the old value; null = no clipping."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss (Ziegler 2019, Huang 2024)."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and variance 1 over all actions of the rollout, on all processes."""
    missing_eos: Literal["replace", "subtract", "ignore"] = "replace"
    """Response cut at the length limit: its score becomes -penalty (the EOS trick, Huang 2024), is lowered by
    the penalty, or is kept."""
    missing_eos_penalty: NonNegative = 1.0
    """The penalty, in units of the normalised score."""
    temperature: Rate = 1.0
    """Sampling temperature; the log-probs of policy and reference are taken at the same temperature."""
    stop_kl: Rate | None = None
    """Leave the remaining epochs of a step when the mean KL (k3) a token to the rollout policy exceeds this,
    in nats; null = never."""
    reward_model: list[str] = []
    """Folder of another reward model, or several, an ensemble; empty = all members of this run's reward
    stage."""
    ensemble: Literal["mean", "minimum", "pessimistic"] = "mean"
    """Score of several reward models: their mean, their minimum, or mean - ensemble_penalty x standard
    deviation (Coste 2023, arXiv 2310.02743)."""
    ensemble_penalty: NonNegative = 1.0
    """Weight of the standard deviation in `pessimistic`."""
    retokenise: bool = False
    """Let a reward model with another base or tokenizer score the decoded text."""
    checkpoint_every: Positive = 5
    """PPO steps between checkpoints."""
    check_invariants: bool = True
    """Check KL(step 0) = 0, first ratio = 1, and the rest on every run; only a debugger turns this off."""
    max_log_prob_gap: Rate = 0.05
    """Largest accepted mean gap between the log-probs of sampling and of training, in nats a token."""
    max_bad_updates: Positive = 3
    """Updates with a loss or gradient that is not finite are skipped and counted; stop after this many."""

    @field_validator("reward_model", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value or []

    @model_validator(mode="after")
    def _sizes(self) -> Ppo:
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.minibatches} minibatches; "
                "choose a batch_size that is a multiple of minibatches"
            )
        return self


class Evaluate(Section):
    """Before against after on held-out prompts, paired."""

    judge: Literal["vader", "reward"] = "reward"
    """Who scores the responses: a gold judge, or a reward model."""
    reward_model: str | None = None
    """Folder of the reward model that judges; null = this run's own (then the score is the trained proxy)."""
    prompts: Positive = 128
    """Held-out prompts."""
    samples: Positive = 1
    """Responses a prompt."""
    temperature: Rate = 1.0
    """Sampling temperature of both sides."""
    batch_size: Positive = 32
    """Responses generated together."""
    pairs_shown: Positive = 10
    """Sample pairs in the summary."""
