"""The evaluation of the policy by figures and by talking to it, and what leaves a run."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf.recipe.types import (
    BASE,
    Files,
    Folder,
    JudgedOrReward,
    Natural,
    NonNegative,
    Policies,
    Positive,
    Rate,
    Section,
)


class Evaluate(Section):
    """Before against after on held-out prompts, paired."""

    policy: Folder = "ppo"
    """What is compared with its start: `ppo` or `dpo`, that stage of this run, or the folder of a saved
    adapter, whose reference is `ppo.start` (or the base). The folder of `dpo`'s figures is `evaluate_dpo`."""
    judge: JudgedOrReward = "reward"
    """Who scores the responses: the gold judge `vader`, a function FILE.py:NAME, a server {url, model,
    prompt, ...}, or `reward`, a reward model."""
    reward_model: Folder | None = None
    """Folder of the reward model that judges, of ours or any sequence classifier with one label; null = this
    run's own (then the score is the trained proxy)."""
    prompts: Positive = 128
    """Held-out prompts."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt."""
    temperature: Rate = 1.0
    """Sampling temperature of both sides."""
    batch_size: Positive = 32
    """Responses generated together."""
    pairs_shown: Positive = 10
    """Sample pairs in the summary."""
    best_of: Natural = 0
    """Best of n beside the policy: samples a prompt from the reference, 2 or more; 0 = off. Figures are given
    for n = 1, 2, 4, ... up to it."""
    best_of_prompts: Positive | None = None
    """Held-out prompts for best of n, the first ones; null = all `prompts`."""

    @property
    def stage(self) -> str:
        """Name of the section that the policy was trained by, which says what it started from."""
        return "dpo" if self.policy == "dpo" else "ppo"

    @property
    def folder(self) -> str:
        """Name of the stage's folder; both policies of a run can be evaluated."""
        return "evaluate_dpo" if self.policy == "dpo" else "evaluate"

    @model_validator(mode="after")
    def _best_of(self) -> Evaluate:
        if self.best_of == 1:
            raise ValueError("best_of 1 has nothing to choose from: set it to 2 or more, or to 0 (off)")
        if self.best_of_prompts and not self.best_of:
            raise ValueError(
                "best_of_prompts is only used with best_of: set best_of to 2 or more, or remove it"
            )
        if self.best_of_prompts and self.best_of_prompts > self.prompts:
            raise ValueError(
                f"best_of_prompts {self.best_of_prompts} is more than the {self.prompts} prompts that the "
                "policy is compared on: lower it, or raise prompts"
            )
        return self


class Inside(Section):
    """What `make inside` finds out: which parts carry what PPO changed, and what the reward model reads."""

    prompts: Positive = 32
    """Held-out prompts, with a response of each model to each; so many minimal pairs of each kind, too."""
    estimate: Literal["relp", "atp"] = "relp"
    """How the effects of all heads and neurons are estimated at once: `relp` (Jafari 2025), or `atp`,
    attribution patching."""
    top: Positive = 20
    """Components whose effect is also measured exactly, by a run each."""
    random_sets: Positive = 3
    """Sets of random components, of each size, that are patched beside the first ones."""
    edges: Literal["eap_ig", "relp", "none"] = "eap_ig"
    """How the edges of the reward model's circuit are ranked: `eap_ig`, edge attribution with integrated
    gradients (Hanna 2024), or `relp` (Jafari 2025); `none` = no circuit is looked for."""
    pairs: Files = []
    """Files of your own pairs for the reward model: comparisons of two responses with equally many tokens."""
    neurons: Natural = 10
    """Neurons whose activation PPO changed most, of which top tokens and direct effects on the vocabulary are
    shown, at most half of all; 0 = neither these nor the lens of the mean difference of states."""
    texts: Files = []
    """Files with plain texts that have nothing to do with the training, for top tokens and the lens: .txt, or
    rows with a `text` field; [] = those of `ppo.ptx_texts`, else the held-out prompts."""
    soft_prompts: Natural = 3
    """Soft prompts that are trained to make the model before PPO respond like the policy, so that the loss
    between and beyond them can be seen; 0 = none, else 3 or more."""
    others: Policies | None = None
    """Folders of policies of other runs on the same base: the lens of each and, of two or more, what lies
    between them and this run's; null = none."""
    micro_batch_size: Positive = 8
    """Rows of one forward pass."""

    @field_validator("others")
    @classmethod
    def _trained(cls, value: list[str] | None) -> list[str] | None:
        if BASE in (value or ()):
            raise ValueError(f"`{BASE}` is no policy of another run; name folders of saved adapters")
        return value

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.soft_prompts in (1, 2):
            raise ValueError(
                f"soft_prompts {self.soft_prompts}: an interval over pairs needs three; give 3, or 0"
            )
        if self.others is not None and len(self.others) < 2 and not self.neurons:
            raise ValueError(
                "others: an interval over pairs needs three policies; name two or more beside this run's, or "
                "set neurons above 0 for the lens of one"
            )
        return self


class Chat(Section):
    """What `make chat` lets you talk to: two or more models on one base, beside each other."""

    models: list[Folder] | None = Field(default=None, min_length=1, max_length=9)
    """`base`, `ppo`, `dpo`, `distill` or `sft` of this run, or folders of saved adapters; null = the base and
    the first of these stages that has finished."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 = always the most probable token."""
    max_tokens: Positive | None = None
    """Longest answer, in tokens; null = `dialogue.max_response_tokens`."""
    seed: Natural = 0
    """Of the answers: all models get the same random numbers; `/seed` changes it."""

    @field_validator("models")
    @classmethod
    def _once(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a model stands twice; name each once")
        return value


class Export(Section):
    """What `make export` makes of a finished run: models that need nothing of this project."""

    models: list[Literal["policy", "reward"]] | None = Field(default=None, min_length=1)
    """Which; null = those whose stage has finished."""
    policy: Literal["ppo", "dpo", "distill", "sft"] | None = None
    """The stage whose policy it is; null = the first of these that has finished."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the written weights. Adapters are merged in float32, where nothing is lost; a half type rounds
    small updates away."""
    folder: Folder | None = None
    """Where `policy` and `reward` are made; null = runs/<name>/export. Nothing there is written over."""
    repo: str | None = None
    """Model repository on the hub to push to, OWNER/NAME: the policy goes to OWNER/NAME-policy, the reward
    model to OWNER/NAME-reward; null = nothing leaves the machine."""
    private: bool = True
    """Whether a repository that the push makes is private."""
    license: str | None = None
    """Identifier of the license in the model card, such as apache-2.0; null = the one that the base's own
    card names, else `other`."""

    @field_validator("repo")
    @classmethod
    def _repo(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII):
            raise ValueError("a repository on the hub is OWNER/NAME")
        return value
