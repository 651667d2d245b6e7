"""The fields of a recipe: what each means, its unit, its default and where the default comes from.

A recipe is strict: an unknown key, a wrong type or a combination that cannot work is an error before torch
is imported. The sentence under a field is its documentation.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.recipe.distill import Distill
from rlhf.recipe.evaluate import Chat, Evaluate, Export, Inside
from rlhf.recipe.ppo import Ppo
from rlhf.recipe.reward import Card, Collect, Pmp, Rank, Reward, Rounds
from rlhf.recipe.sft import Dpo, Sft
from rlhf.recipe.shared import Data, Dialogue, Distributed, Lora, Model
from rlhf.recipe.tax import Tax
from rlhf.recipe.types import STARTS, Section


class Recipe(Section):
    """One experiment: the contract shared by all stages, then one section a stage."""

    name: str
    """The run's folder: runs/<name>."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """The one seed of all randomness."""
    model: Model
    lora: Lora = Lora()
    dialogue: Dialogue = Dialogue()
    data: Data
    hhh_prompt: str = "recipes/prompts/hhh.txt"
    """File of the prompt that asks for a helpful, honest and harmless assistant (Askell 2021): the prompted
    arm of `tax` runs under it, and `distill` distills it."""
    collect: Collect = Collect()
    rank: Rank = Rank()
    sft: Sft | None = None
    distill: Distill | None = None
    pmp: Pmp | None = None
    reward: Reward = Reward()
    card: Card = Card()
    ppo: Ppo = Ppo()
    dpo: Dpo | None = None
    evaluate: Evaluate = Evaluate()
    tax: Tax | None = None
    rounds: Rounds | None = None
    inside: Inside = Inside()
    export: Export = Export()
    chat: Chat = Chat()
    distributed: Distributed = Distributed()
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where the figures of every training step go beside `metrics.jsonl`, which is always written."""
    plan: Literal["warn", "refuse", "off"] = "refuse"
    """What `make rlhf` does first where the recipe does not fit into the memory that there is (`make plan`):
    say so (`warn`), or end where it would not fit with 15% less either (`refuse`)."""

    @field_validator("plan", mode="before")
    @classmethod
    def _plan(cls, value: object) -> object:
        return "off" if value is False else value  # as YAML reads off

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
        if self.data.sampled and (self.data.held_out_comparisons or self.data.rankings):
            raise ValueError(
                "data.comparisons=sampled makes rankings and a held-out part of its own: remove "
                "data.held_out_comparisons and data.rankings"
            )
        if self.model.compile and self.distributed.zero_stage == 3:
            raise ValueError(
                "model.compile needs whole weights: set distributed.zero_stage=2, or model.compile=false"
            )
        if self.evaluate.judge != "reward" and self.evaluate.reward_model:
            raise ValueError("evaluate.reward_model is only used with evaluate.judge=reward; remove one")
        models = self.reward.members if self.ppo.own_reward else len(self.ppo.named_models)
        if self.ppo.ensemble != "mean" and models < 2:
            raise ValueError(
                f"ppo.ensemble={self.ppo.ensemble} is of several reward models, and there "
                f"{'is one' if models else 'is none'}: set reward.members=2 or more, or remove it"
            )
        own_test = self.ppo.own_reward and self.reward.test_share
        if self.ppo.keep_best and not (own_test or self.ppo.test_reward_model):
            raise ValueError(
                "ppo.keep_best chooses by a test model: set reward.test_share=0.5, which trains one, or name "
                "one as ppo.test_reward_model"
            )
        if self.evaluate.policy == "dpo" and self.dpo is None:
            raise ValueError("evaluate.policy=dpo: this recipe has no dpo section; add one")
        if self.sft and self.sft.loss_on == "assistant" and self.dialogue.template == "plain":
            raise ValueError(
                "sft.loss_on=assistant needs to know whose turn a token is, which dialogue.template=plain "
                "does not say: use template chat, or loss_on=response or all"
            )
        whole = self.distill is not None and self.distill.method == "full"
        if whole and (self.model.dtype not in ("auto", "float32") or self.model.quantization != "none"):
            raise ValueError(
                "distill.method: full needs float32 weights that are not quantized, since small updates "
                "would be rounded away; set model.dtype=float32 model.quantization=none, or method=lora"
            )
        if self.pmp is not None and self.reward.head_init != "normal":
            raise ValueError(
                f"reward.head_init={self.reward.head_init}: the reward model starts from the head of the pmp "
                "stage of this recipe; remove one of them"
            )
        if self.pmp is not None and not self.reward.start and self.pmp.layers != self.reward.layers:
            raise ValueError(
                f"reward.layers={self.reward.layers}: the reward model starts from the pmp stage of this "
                f"recipe, which has pmp.layers={self.pmp.layers}; give both the same number"
            )
        return self

    @model_validator(mode="after")
    def _starts(self) -> Recipe:
        for name, stages in STARTS.items():
            section = getattr(self, name)
            start = None if section is None else getattr(section, "start", None)
            if start not in stages:
                continue
            if getattr(self, start) is None:
                raise ValueError(f"{name}.start={start}: this recipe has no {start} section; add one")
            if start == "distill" and getattr(self.distill, "method", "lora") == "full":
                raise ValueError(
                    f"{name}.start=distill: distill.method=full makes a whole model, not an adapter; write a "
                    f"recipe whose model.path is runs/{self.name}/distill/model, without this start"
                )
            if name == "reward" and self.pmp is not None:
                raise ValueError(
                    f"reward.start={start}: the reward model starts from the pmp stage of this recipe; write "
                    f"pmp.start={start} instead"
                )
        return self

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of each stage's longest sequence, by the keys that set it; a reward is read behind EOS."""
        dialogue = self.dialogue
        closing = 1 if dialogue.end_of_context is None else 2
        both = dialogue.max_prompt_tokens + dialogue.max_response_tokens + closing
        lengths = {"dialogue.max_prompt_tokens + dialogue.max_response_tokens": both}
        for section in (self.reward, self.pmp):
            if section is not None and section.max_response_tokens is not None:
                both = dialogue.max_prompt_tokens + section.max_response_tokens + closing
                lengths[f"dialogue.max_prompt_tokens + {section.length_key}"] = both
        if self.distill is not None:
            lengths["distill.max_tokens"] = self.distill.max_tokens
        if self.ppo.ptx_texts:
            lengths["ppo.ptx_max_tokens"] = self.ppo.ptx_max_tokens
        return lengths
