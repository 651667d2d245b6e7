"""The PPO stage, in the order of its loop: collect, shape, estimate, update, check.

Sources by short name. Ziegler 2019: arXiv 1909.08593 and its official code. Stiennon 2020: arXiv 2009.01325.
InstructGPT: Ouyang 2022, arXiv 2203.02155. Huang 2024: "The N+ Implementation Details of RLHF with PPO",
arXiv 2403.17031. PPO-max: Zheng 2023, arXiv 2307.04964.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.errors import UserError
from rlhf.recipe.types import (
    OWN_REWARD,
    Folder,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Rate,
    RewardPart,
    Section,
    UnitInterval,
    function_files,
)

Algorithm = Literal["ppo", "rloo", "grpo", "dr_grpo", "reinforce"]


class Collecting(Section):
    """What a rollout is."""

    steps: Positive = 100
    """Rollouts, each followed by `epochs` passes."""
    start: Folder | None = None
    """Adapter that the policy starts from, and whose frozen copy is the reference: a folder, or `sft` or
    `distill`, that stage of this run; null = a fresh one, and the base is the reference."""
    batch_size: Positive = 64
    """Responses a rollout, over all processes."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt of a rollout; `rloo`, `grpo` and `dr_grpo` compare them with each other."""
    rollout_batch_size: Positive = 32
    """Responses generated together, a process."""
    temperature: Rate = 1.0
    """Sampling temperature; the log-probs of policy and reference are taken at the same temperature."""
    trunk_gigabytes: NonNegative = 4.0
    """Memory for the frozen trunk's hidden states of a rollout, a process; a larger rollout computes them
    anew in every pass."""


class Scoring(Section):
    """From a reward model's output to one score a response."""

    reward_model: list[Folder] = []
    """Folder of another reward model, or several, an ensemble; empty = all members of this run's reward
    stage."""
    rewards: list[RewardPart] = []
    """Instead of `reward_model`: rewards of any kind that are added up, each with its weight, as in
    [{model: reward}, {function: my_rewards.py:brevity, weight: 0.1}, {judge: vader}]."""
    test_reward_model: Folder | None = None
    """Folder of a reward model that scores every rollout too and is no part of the reward, so that it tells
    where that is exploited; null = the test model of this run's reward stage, where there is one."""
    ensemble: Literal["mean", "minimum", "pessimistic", "average"] = "mean"
    """Score of several reward models: their mean, their minimum, or mean - ensemble_penalty x standard
    deviation (Coste 2023, arXiv 2310.02743); `average`: the score of the mean of the weights of this run's
    members (`reward.members`), one forward pass for all (WARM, arXiv 2401.12187)."""
    ensemble_penalty: NonNegative = 1.0
    """Weight of the standard deviation in `pessimistic`."""
    retokenize: bool = False
    """Let a reward model with another base or tokenizer score the decoded text."""
    score_shape: Literal["none", "sigmoid", "log_sigmoid"] = "none"
    """`sigmoid`: the chance that the score r beats that of a response of the reference, sigmoid(r - r_ref),
    as the reward, which bounds it (PAR, arXiv 2502.18770); `log_sigmoid`: its logarithm (arXiv 2402.00742).
    Each rollout then samples the reference too."""
    reference_samples: Positive = 1
    """Responses of the reference to each prompt of a rollout that `score_shape` averages over."""
    score_normalization: Literal["none", "running"] = "none"
    """`running`: less the mean of all scores so far, divided by their standard deviation (PPO-max)."""
    score_clip: Rate | None = None
    """Largest size of a score, after normalization (PPO-max); null = none."""
    missing_eos: Literal["replace", "subtract", "ignore"] = "replace"
    """Response cut at the length limit: its score becomes -penalty (the EOS trick, Huang 2024), is lowered by
    the penalty, or is kept."""
    missing_eos_penalty: NonNegative = 1.0
    """The penalty, in units of the score."""
    length_penalty: NonNegative = 0.0
    """Taken off the score for every token beyond `length_target`."""
    length_target: Natural = 0
    """Tokens that cost nothing."""
    score_timeout_minutes: Rate = 30.0
    """A score function that has not answered after this long ends the run with an error."""


class KlControl(Section):
    """The price of leaving the reference, and the limits."""

    kl_coef: NonNegative = 0.05
    """β, weight of the KL penalty; the start value where it is adaptive (Stiennon 2020, Huang 2024)."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive`: β follows the KL of whole responses towards `kl_controller_target` (Ziegler 2019)."""
    kl_controller_target: Rate = 6.0
    """Wanted KL of a response, nats (Ziegler 2019)."""
    kl_controller_horizon: Rate = 10_000
    """Responses over which β moves by the relative error of the KL (Ziegler 2019)."""
    kl_in: Literal["reward", "loss"] = "reward"
    """The penalty is part of each token's reward (Stiennon 2020), or a term of the policy's loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL a token (Schulman 2020). In the loss k2 has the gradient that k1 has in the reward
    (less the KL that a token leads to later), k3 is biased, and k1 would have none (arXiv 2510.01555), so it
    is refused there."""
    target_kl: Rate | None = None
    """Leave the remaining epochs of a step when the mean KL (k3) a token to the rollout policy exceeds this,
    in nats; null = never."""
    max_kl: Rate | None = None
    """End the stage, with what it has, when the mean KL of a response to the reference exceeds this, in nats;
    null = never."""


class Estimating(Section):
    """From scores to advantages."""

    algorithm: Algorithm = "ppo"
    """`ppo`: generalized advantage estimation with a value; `rloo`: a response against the other samples of
    its prompt (Ahmadian 2024, arXiv 2402.14740); `grpo`: less the mean of its prompt's samples, divided by
    their deviation (Shao 2024, arXiv 2402.03300); `dr_grpo`: not divided (Liu 2025, arXiv 2503.20783);
    `reinforce`: the return. All but `ppo` have no value."""
    gamma: UnitInterval = 1.0
    """Discount."""
    lam: UnitInterval = 0.95
    """λ of generalized advantage estimation (Schulman 2016)."""
    lam_value: UnitInterval | None = None
    """λ of the returns that the value is trained towards (VC-PPO, arXiv 2503.01491: 1); null = lam."""
    lam_length: Rate | None = None
    """α: the policy's λ is 1 - 1/(α x tokens of the response), at least 0, in the place of lam (VAPO, arXiv
    2504.05118: 0.05, for responses of thousands of tokens); null = lam for all."""
    whiten_rewards: bool = False
    """Token rewards to variance 1 over the rollout, their mean kept (Ziegler 2019; off in Huang 2024)."""
    whiten_advantages: bool | None = None
    """Advantages to mean 0 and variance 1 over all actions of the rollout, on all processes; null = on for
    ppo and reinforce, off where a prompt's samples are compared, as in the papers."""


class Losing(Section):
    """What is minimized."""

    clip_range: Rate | None = 0.2
    """Ratio clip ε (Schulman 2017, eq. 7); null = none, as in plain REINFORCE."""
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """c: the loss of an action with negative advantage counts at most c times it (Ye 2020, arXiv 1912.09729,
    eq. 5, c = 3); null = none."""
    loss_level: Literal["token", "sequence"] = "token"
    """Mean over all actions of a minibatch, or over the responses of each response's mean."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus (0 in Ziegler 2019, Stiennon 2020, InstructGPT and Bai 2022)."""
    value: Literal["adapter", "shared"] = "adapter"
    """The value has an adapter of its own, started from the reward model, or is a head on the policy's."""
    value_clip_range: Rate | None = 0.2
    """Range around the old value; null = no clipping."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss (Ziegler 2019, Huang 2024)."""
    value_warmup: Natural = 0
    """First steps in which only the value learns (PPO-max), from the rewards themselves (λ 1, whatever
    `lam_value`); with `value_warmup_until` at most so many."""
    value_warmup_until: Annotated[float, Field(lt=1, allow_inf_nan=False)] | None = None
    """Explained variance of these returns at which the policy begins to learn before that (VC-PPO, arXiv
    2503.01491); null = never before."""
    value_warmup_missed: Literal["go_on", "stop"] = "go_on"
    """When the warm-up ends below `value_warmup_until`: say so and go on, or end with an error."""
    ptx_coef: NonNegative = 0.0
    """γ, weight of the language-model loss on `ptx_texts` (PPO-ptx, InstructGPT, eq. 2: 27.8 there)."""
    ptx_texts: list[str] = []
    """Files with plain texts: .txt, or rows with a `text` field."""
    ptx_batch_size: Positive = 8
    """Texts an optimizer step, over all processes."""
    ptx_max_tokens: Positive = 128
    """Longest piece of a text, in tokens."""


class Optimizing(Section):
    """How it is minimized."""

    minibatches: Positive = 1
    """Optimizer steps an epoch; Huang 2024 uses 1."""
    micro_batch_size: Positive = 8
    """Responses in memory at once while training, a process; it does not change the result."""
    epochs: Positive = 4
    """Passes over each rollout (K = 4: Stiennon 2020, Huang 2024; 1: InstructGPT)."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """`paged_adamw_8bit`: bitsandbytes' AdamW with 8-bit moments, paged out of a full GPU (CUDA only)."""
    learning_rate: Rate = 3e-6
    """Policy adapter's peak (Huang 2024, for full fine-tuning; LoRA wants 100 times more and up: in 50 steps
    of docs/laboratory.md 1.5e-4 gains nothing, 5e-4 half of what 1.5e-3 gains, 5e-3 no more for certain)."""
    value_learning_rate: Rate | None = None
    """Value adapter's and head's peak; null = learning_rate."""
    schedule: Literal["linear", "cosine", "cosine_with_min_lr", "constant"] = "linear"
    """Learning rate after the warm-up: linear to 0 (Huang 2024), cosine to 0 or to a tenth
    (`cosine_with_min_lr`: InstructGPT), or constant."""
    warmup_steps: Natural = 0
    """Steps in which the learning rate rises linearly from a tenth (InstructGPT: 10)."""
    adam_epsilon: Rate = 1e-5
    """Epsilon of AdamW (Huang 2024)."""
    max_grad_norm: Rate = 1.0
    """Global gradient-norm clip over all that learns."""
    ema_decay: Fraction | None = None
    """Decay a step of the policy's moving average, which then is what the stage saves (InstructGPT: 0.992);
    null = the last weights."""


class Checking(Section):
    """What guards a run."""

    checkpoint_every: Positive = 5
    """PPO steps between checkpoints."""
    max_log_prob_gap: Rate | None = None
    """Largest accepted mean gap between the log-probs of sampling and of training, in nats a token; null =
    four times what rounding makes of it before the first update, at least 0.05."""
    keep_best: bool = False
    """Save the policy with the best score of the test model, smoothed over five rollouts, as `policy`, and
    the last weights as `policy_last`."""
    max_nonfinite_updates: Positive = 3
    """Updates with a loss or gradient that is not finite are skipped and counted; stop after this many."""


class Ppo(Checking, Optimizing, Losing, Estimating, KlControl, Scoring, Collecting):
    """PPO with LoRA, and REINFORCE-style estimators in the same loop."""

    @property
    def has_value(self) -> bool:
        """Whether a value is learned."""
        return self.algorithm == "ppo"

    @property
    def whitens_advantages(self) -> bool:
        """``whiten_advantages``, with the algorithm's default filled in."""
        return not self.compares_samples if self.whiten_advantages is None else self.whiten_advantages

    @property
    def compares_samples(self) -> bool:
        """Whether a response's advantage is what sets it apart from the other samples of its prompt."""
        return self.algorithm in ("rloo", "grpo", "dr_grpo")

    @property
    def own_reward(self) -> bool:
        """Whether the reward models of this run's reward stage score."""
        return any(r.model == OWN_REWARD for r in self.rewards) if self.rewards else not self.reward_model

    @property
    def named_models(self) -> list[str]:
        """Folders and hub ids of the reward models that the section names."""
        models = [r.model for r in self.rewards if r.model not in (None, OWN_REWARD)]
        return [m for m in models if m] if self.rewards else self.reward_model

    @property
    def function_files(self) -> list[str]:
        """Files of the reward functions, each once."""
        return function_files(*(reward.scored_by for reward in self.rewards))

    @field_validator("reward_model", "ptx_texts", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value or []

    @model_validator(mode="after")
    def _sizes(self) -> Ppo:
        for name in ("minibatches", "samples_per_prompt"):
            if self.batch_size % getattr(self, name):
                raise ValueError(
                    f"batch_size {self.batch_size} does not divide into {getattr(self, name)} {name}; "
                    f"choose a batch_size that is a multiple of {name}"
                )
        return self

    @model_validator(mode="after")
    def _rewards(self) -> Ppo:
        names = [reward.label for reward in self.rewards]
        if self.rewards and self.reward_model:
            raise ValueError("rewards and reward_model: name the reward model in rewards, as {model: FOLDER}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rewards: two are called {twice[0]}; give one a name of its own")
        if self.ensemble == "average" and not self.own_reward:
            raise ValueError(
                "ensemble average is the mean of this run's own members (reward.members): remove "
                "reward_model, or choose another ensemble"
            )
        if self.test_reward_model in self.named_models and self.test_reward_model is not None:
            raise ValueError("test_reward_model is a reward that is trained on: name another one")
        if self.keep_best and self.ema_decay is not None:
            raise ValueError("keep_best and ema_decay both say which policy is saved: remove one")
        if self.rewards and not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: every weight is 0, so nothing is learned; give one a weight")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Ppo:
        if self.compares_samples and self.samples_per_prompt < 2:
            raise ValueError(
                f"algorithm {self.algorithm} compares the samples of a prompt: set samples_per_prompt to 2 "
                "or more"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator k1 in the loss has no gradient on average: use k2 (or k3) there")
        if self.kl_controller == "adaptive" and not self.kl_coef:
            raise ValueError("kl_controller adaptive multiplies kl_coef: start it above 0")
        if self.score_shape != "none" and self.score_normalization != "none":
            raise ValueError("score_shape and score_normalization both set the scores' scale: choose one")
        if self.score_shape == "none" and self.reference_samples != 1:
            raise ValueError("reference_samples are only used with score_shape: choose one, or remove them")
        if not self.has_value and (self.value_warmup or self.value == "shared"):
            raise ValueError(f"algorithm {self.algorithm} has no value: remove value and value_warmup")
        if not self.has_value and (self.lam_value is not None or self.lam_length is not None):
            raise ValueError(f"algorithm {self.algorithm} has no lambda: remove lam_value and lam_length")
        if self.value_warmup_until is not None and not self.value_warmup:
            raise ValueError("value_warmup_until ends a value_warmup before its time: set value_warmup too")
        if self.value_warmup_until is None and self.value_warmup_missed == "stop":
            raise ValueError("value_warmup_missed=stop needs a goal: set value_warmup_until")
        if self.value_warmup >= self.steps:
            raise ValueError(f"value_warmup {self.value_warmup} leaves the policy none of {self.steps} steps")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves nothing of {self.steps} steps")
        if bool(self.ptx_coef) != bool(self.ptx_texts):
            raise ValueError("ptx_coef and ptx_texts belong together: give both or neither")
        return self


def check_optimizer(kind: str, *, zero_stage: int, gpu: bool) -> None:
    """Whether a kind of AdamW goes with the machine and the processes, by PPO itself and before a run.

    zero_stage: 0 with one process.

    Raises:
        UserError: it does not.
    """
    if kind == "adamw":
        return
    if zero_stage > 0:
        raise UserError(f"ppo.optimizer: {kind} does not go with ZeRO {zero_stage}; use zero_stage 0")
    if not gpu:
        raise UserError(f"ppo.optimizer: {kind} needs a CUDA GPU, and there is none; use adamw")
