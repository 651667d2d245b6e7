"""Putting the parts of a PPO run together: the backbone with its adapters, and the score function."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from policy.rollout import Responses, ScoreFn
from reward.model import TextRewardModel, check_same_contract, read_card
from rlhf.artifacts import sha256_of
from rlhf.backbone import WEIGHTS, Backbone
from rlhf.base import load_base
from rlhf.dialogue import Dialogue
from rlhf.recipe import Recipe
from rlhf.stage import StageRun


def reward_folder(recipe: Recipe, run: StageRun) -> Path:
    """The reward model that PPO trains against: the recipe's, or the one of the same run."""
    named = recipe.ppo.reward_model
    return Path(named) if named else run.parent("reward") / "model"


def assemble(recipe: Recipe, run: StageRun, dialogue: Dialogue) -> Backbone:
    """One base with policy, value and, where it fits, reward adapter; prints where every part comes from.

    The value starts as a copy of the reward model, adapter and head (Stiennon 2020; Huang 2024, detail 8).
    A reward model on another base cannot be copied: the value then starts fresh, with a zero head.

    Raises:
        UserError: the reward model does not fit and the recipe does not allow re-tokenising.
    """
    folder = reward_folder(recipe, run)
    shares_base = not recipe.ppo.retokenise
    adapters = ("policy", "value", "reward") if shares_base else ("policy", "value")
    torch.manual_seed(recipe.seed)
    backbone = Backbone(
        load_base(recipe.model),
        recipe.lora,
        adapters=adapters,
        heads=adapters[1:],
        trainable=("policy", "value"),
    )
    backbone.zero_heads()
    origin = "fresh, zero head"
    if shares_base:
        card = read_card(folder)
        check_same_contract(card, recipe, dialogue, folder)
        for adapter in adapters[1:]:
            count = backbone.load_adapter(adapter, folder)
            backbone.set_offset(adapter, card.offset)
            origin = f"{count} tensors of {folder} ({sha256_of(folder / WEIGHTS)[:12]})"
    warning = backbone.check_architecture()
    if run.is_main:
        if warning:
            print(f"warning: {warning}", flush=True)
        print(f"policy:    {recipe.model.path}, fresh adapter (no change at the start)")
        print(f"reference: {recipe.model.path}, adapters off")
        print(f"value:     {origin}")
        print(f"reward:    {origin if shares_base else f'{folder}, on its own base, reads the text'}")
        cut = backbone.frozen_layers
        print(f"trunk:     {f'{cut} frozen layers, computed once a rollout' if cut else 'none'}", flush=True)
    return backbone


def score_function(recipe: Recipe, run: StageRun, model: Backbone) -> ScoreFn:
    """How PPO scores responses: the reward adapter of the same base, or a reward model that reads text."""
    if recipe.ppo.retokenise:
        other = TextRewardModel(reward_folder(recipe, run), model.device)
        return lambda said: other.score(said.prompts, said.texts)

    def score(said: Responses) -> Tensor:
        return model("reward", said.ids_BT, said.mask_BT, said.hidden_BTD)

    return score
