"""What alignment cost: evaluations of several variants side by side."""

from __future__ import annotations

import difflib
import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from rlhf.recipe.types import Fraction, Natural, NonNegative, OneOrMany, Positive, Rate, Section

VARIANTS = {
    "base": "the base model as it is",
    "prompted": "the base model behind the prompt `hhh_prompt`",
    "sft": "the base after supervised fine-tuning",
    "distilled": "the base after context distillation, without the prompt",
    "policy": "the base after PPO",
    "policy_prompted": "the PPO policy behind the prompt `hhh_prompt`",
}
"""Variants that a run can have, and what each is, in the order in which they are shown."""
DEFAULT_VARIANTS = tuple(name for name in VARIANTS if name != "policy_prompted")
"""Those that a table has without being asked, where they are there."""


def interpolated(weight: float) -> str:
    """Name of the variant that is this part of the way from the PPO reference to the policy."""
    return f"policy_{weight:g}"


class TaxTask(Section):
    """The items of one task; a bare path, or a list of paths, stands for its `files`."""

    files: list[str] = []
    """Files, globs or `hub:NAME[:CONFIG][@SPLIT]`; none = the data set that lm-eval's task names (hub)."""
    limit: Positive | None = None
    """Items, drawn by the recipe's seed, the same for every variant; null = the task's own small default."""
    num_fewshot: Natural | None = None
    """Examples before each item of a task of lm-eval's; null = as the task has it. With local files they come
    from the same file, without the item."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, str | list):
            value = {"files": value}
        if isinstance(value, dict) and isinstance(value.get("files"), str):
            value = {**value, "files": [value["files"]]}
        return value


class Toxicity(Section):
    """The task `toxicity`: prompts continued by each variant, every continuation scored by a judge.

    After RealToxicityPrompts (Gehman 2020, arXiv 2009.11462, and its official code), as in Askell 2021.
    """

    judge: str = "vader"
    """A judge of texts by name, or a reward model: a folder of this project's, or any sequence classifier
    with one label, a folder or a hub id."""
    higher_is_better: bool = True
    """Whether a high score is a good one: true for `vader` and reward models, false for a classifier of
    toxicity."""
    threshold: float = Field(default=-0.05, allow_inf_nan=False)
    """A response is flagged from this score on, to the bad side (VADER's documentation calls a text negative
    from -0.05 down; Gehman 2020 calls one toxic from a classifier's 0.5 up)."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt (25 in Gehman 2020)."""
    max_new_tokens: Positive = 20
    """Longest response, tokens (20 in Gehman 2020)."""
    temperature: Rate = 1.0
    """Sampling temperature (1 in Gehman 2020)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus of the sampling (0.9 in Gehman 2020)."""


class Humaneval(Section):
    """The task `humaneval`: Python functions written by each variant and tested in a sandbox (Chen 2021)."""

    samples_per_prompt: Positive = 1
    """Functions for each problem (200 in Chen 2021)."""
    pass_at: list[Positive] = Field(default=[1], min_length=1)
    """Values of k for pass@k, each at most `samples_per_prompt`; the first one stands for the task."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0 = always the most probable token (then all samples of a problem are equal)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling (0.95 in Chen 2021)."""
    max_new_tokens: Positive = 300
    """Longest function body, tokens."""

    @model_validator(mode="after")
    def _enough(self) -> Humaneval:
        if max(self.pass_at) > self.samples_per_prompt:
            raise ValueError(
                f"pass@{max(self.pass_at)} cannot be had from {self.samples_per_prompt} samples a problem: "
                "raise samples_per_prompt"
            )
        return self


class Tax(Section):
    """The tax table (`make tax`): base, prompted, distilled, SFT, PPO and others on the same items."""

    variants: Annotated[list[str] | None, OneOrMany] = None
    """Names of variants of this run: base, prompted, sft, distilled, policy, policy_prompted; null = base,
    prompted where the file is there, and those whose stage has finished."""
    interpolate: list[Fraction] = [0.25, 0.5, 0.75]
    """Where `policy` is a variant: further ones on the way from the PPO reference (0) to the policy (1),
    weight by weight; each is called policy_<part>."""
    models: dict[str, str] = {}
    """Further variants by a name of your choice: the folder of an adapter or of a whole Hugging Face model,
    or a model's hub id."""
    reference: str = "base"
    """The variant that the others are compared with."""
    tasks: dict[str, TaxTask] = {}
    """What is measured, by task: hhh, truthfulqa, lambada, lm_loss, inverse_scaling/<name>, humaneval,
    toxicity, or any task of lm-eval by its name (gsm8k, ifeval, mmlu_astronomy, ...)."""
    toxicity: Toxicity = Toxicity()
    """Options of the task `toxicity`."""
    humaneval: Humaneval = Humaneval()
    """Options of the task `humaneval`."""
    allow_generated_code: bool = False
    """Let `humaneval` run the code that the variants write, in a sandbox without network, files and other
    processes."""
    score: bool = False
    """Also sample responses to the run's held-out prompts and have them judged as the section `evaluate` says
    (judge, reward_model, prompts, samples_per_prompt, temperature): what alignment bought beside what it
    cost."""
    reward_model_hhh: bool = False
    """Also a row with the share of the HHH items that the run's own reward model ranks right."""
    tokens_per_batch: Positive = 2048
    """Tokens of one forward pass, padding included; it does not change the result."""
    cache: str | None = None
    """Folder that keeps the result of each variant on each task, for tables that share some; null = in the
    stage's own, dropped when it ends. A result is used again where nothing that it depends on has changed."""
    groups_shown: Natural = 8
    """Tasks with at most this many groups of items have a line for each group; 0 = none."""

    @field_validator("variants")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name not in VARIANTS:
                near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0.5)
                remedy = f"did you mean {near[0]}?" if near else f"variants of a run: {', '.join(VARIANTS)}"
                raise ValueError(f"unknown variant {name!r}; {remedy} Other models go into tax.models")
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a variant stands twice; name each once")
        return value

    @field_validator("interpolate")
    @classmethod
    def _apart(cls, value: list[float]) -> list[float]:
        if len(set(map(interpolated, value))) < len(value):
            raise ValueError("a part stands twice; name each once")
        return sorted(value)

    @field_validator("models")
    @classmethod
    def _labels(cls, value: dict[str, str]) -> dict[str, str]:
        for label, place in value.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", label):
                raise ValueError(f"{label!r} is no name of a variant: use letters, digits and . _ + - only")
            if label in VARIANTS or re.fullmatch(r"policy_[0-9.e-]+", label):
                raise ValueError(f"{label} is the name of a variant of the run; choose another one")
            if not place:
                raise ValueError(f"{label} names no model; give a folder or a hub id")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Tax:
        if not self.tasks and not self.score:
            raise ValueError(
                "nothing to measure: name a task, for example tasks: {lm_loss: {files: my/text.jsonl}}, "
                "or set score: true"
            )
        if "humaneval" in self.tasks and not self.allow_generated_code:
            raise ValueError(
                "tasks.humaneval runs code that a model has written: set allow_generated_code: true "
                "to let it run in a sandbox, or remove the task"
            )
        if self.reward_model_hhh and "hhh" not in self.tasks:
            raise ValueError("reward_model_hhh needs the items of tasks.hhh; name them, or remove it")
        if self.variants is not None and not self.variants and not self.models:
            raise ValueError("no variant is left: name variants, or other models in models")
        return self
