"""Putting the parts of a PPO run together: the backbone with its adapters, and the reward function.

Several reward models are an ensemble: adapters ``reward``, ``reward_1``, ``reward_2``, ... on the one base,
each with a head and an offset of its own. The PPO loop sees one reward function.

Shape suffixes: ``_M`` reward model, ``_B`` response row, ``_T`` token, ``_D`` hidden unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from policy.ppo.reward_shaping import Moments
from policy.ppo.rollout import Responses, RewardFn
from policy.rewards.mixture import RewardMixture, WeightedReward, text_reward
from reward.card import scorers
from reward.model.ensemble import TEST_MODEL, Combination, check_one_base, combine, own_folders, spread
from reward.model.model import (
    TextRewardModel,
    check_has_score,
    check_same_contract,
    config_file,
    load_config,
    shapes_of,
    too_short,
)
from rlhf.collect.functions import RewardFunction
from rlhf.collect.judges import judge_name, judge_of
from rlhf.data.stored import stored_columns
from rlhf.errors import UserError
from rlhf.models.backbone import REFERENCE, WEIGHTS_SHARDED, Backbone
from rlhf.models.base import best_device, load_base
from rlhf.models.masks import append_token
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Lora, Ppo
from rlhf.recipe.types import OWN_REWARD, RewardPart
from rlhf.runs.artifacts import WEIGHTS, sha256_of
from rlhf.runs.folder import StageFolder
from rlhf.runs.initial_adapter import start_folder
from rlhf.tokenization.dialogue import Dialogue

SPREAD = "ppo/score_spread"  # name of the disagreement in the log
TEST = "test"  # the adapter of the test model, which never rewards
_LOGGED = "reward/"  # what the names of the parts of a mix begin with in the log


def reward_folders(recipe: Recipe, run: StageFolder) -> list[Path]:
    """The reward models of ours that PPO trains against, in order: the recipe's, or all members of the run.

    Raises:
        UserError: the run's reward stage has not left a whole ensemble.
    """
    section = recipe.ppo
    own = own_folders(run.parent("reward"), section.ensemble) if section.own_reward else []
    if not section.rewards:
        return [Path(folder) for folder in section.reward_model] or own
    return [folder for reward in section.rewards for folder in _folders(reward, own)]


def _folders(reward: RewardPart, own: Sequence[Path]) -> Sequence[Path]:
    """The folders of one reward where it is a model of ours, none where it is anything else."""
    if reward.model is None:
        return []
    if reward.model == OWN_REWARD:
        return own
    folder = Path(reward.model)
    return [folder] if config_file(folder) else []


def audit_folder(recipe: Recipe, run: StageFolder) -> Path | None:
    """The test model that looks at the rollouts: the recipe's, or the one that the reward stage has left.

    Raises:
        UserError: the recipe counts on one that the reward stage has not left.
    """
    if recipe.ppo.test_reward_model:
        return Path(recipe.ppo.test_reward_model)
    folder = run.parent("reward") / TEST_MODEL
    if not recipe.ppo.own_reward:
        return None
    if recipe.ppo.keep_best and not folder.is_dir():
        raise UserError(
            f"ppo.keep_best: {folder} is not there, for the reward stage ran without reward.test_share; "
            f"remove {folder.parent} and run `make reward RECIPE=...`"
        )
    return folder if folder.is_dir() else None


def audit_adapters(recipe: Recipe, dialogue: Dialogue, folder: Path | None) -> dict[str, Path]:
    """The test model by its adapter where it can be one of the policy's base; else it reads the text."""
    if folder is None or recipe.ppo.retokenize or config_file(folder) is None:
        return {}
    try:
        check_same_contract(load_config(folder), recipe, dialogue, folder)
    except UserError:
        check_has_score(load_config(folder), folder)
        return {}
    return {TEST: folder}


def reward_adapters(number: int) -> tuple[str, ...]:
    """Names of the adapters of so many reward models on one base."""
    return tuple("reward" if index == 0 else f"reward_{index}" for index in range(number))


def check_rewards(recipe: Recipe, dialogue: Dialogue, folders: Sequence[Path]) -> None:
    """Reward models that score as adapters must have a score, and fit each other and the policy's base.

    Raises:
        UserError: one of them does not; the remedy is to let them read the text.
    """
    if folders:
        check_one_base(folders)
    for folder in folders:
        check_same_contract(load_config(folder), recipe, dialogue, folder)


def load_scorer(backbone: Backbone, adapter: str, folder: Path) -> str:
    """Read a reward model into an adapter, its head and its offset; returns where they come from."""
    count = backbone.load_adapter(adapter, folder)
    backbone.set_offset(adapter, load_config(folder).offset)
    depth = backbone.depths.get(adapter)
    part = "" if depth is None else f", on the first {depth} layers"
    return f"{count} tensors of {folder} ({_hash_of(folder)}){part}"


def _hash_of(folder: Path) -> str:
    return sha256_of(folder / WEIGHTS)[:12]


def new_backbone(
    base: PreTrainedModel,
    lora: Lora,
    section: Ppo,
    *,
    rewards: Sequence[str] = (),
    tests: Sequence[str] = (),
    reference_copy: bool = False,
    depths: Mapping[str, int] | None = None,
    pooled: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
) -> Backbone:
    """A base with fresh adapters and zero heads, as a ``ppo`` section needs them.

    Args:
        base: a causal language model, frozen.
        lora: shape of every adapter.
        section: whether there is a value, and whether it has an adapter of its own.
        rewards: names of adapters with a scalar head, to be loaded with reward models.
        tests: further ones, whose scores are no reward.
        reference_copy: make an adapter ``reference``; else the reference is the base without adapters.
        depths, ranks, pooled: of the rewards, as in :class:`Backbone`; the value that starts as the first of
            them has its depth and rank.
    """
    depths, ranks = dict(depths or {}), dict(ranks or {})
    heads = ("value",) if section.has_value else ()
    own = heads if section.value == "adapter" else ()
    reference = (REFERENCE,) if reference_copy else ()
    for shape in (depths, ranks):
        if own and rewards and rewards[0] in shape:
            shape["value"] = shape[rewards[0]]
    backbone = Backbone(
        base,
        lora,
        adapters=("policy", *own, *rewards, *reference, *tests),
        heads=(*heads, *rewards, *tests),
        trainable=("policy", *heads),
        shared={"value": "policy"} if heads and not own else None,
        depths=depths,
        pooled=pooled,
        ranks=ranks,
    )
    backbone.zero_heads()
    return backbone


def assemble(recipe: Recipe, run: StageFolder, dialogue: Dialogue, *, sharded: bool = False) -> Backbone:
    """One base with policy, value and, where they fit, reward adapters; prints where every part comes from.

    A policy that starts from an adapter has a frozen copy of it as its reference; else that is the base. The
    value starts as a copy of the (first) reward model, adapter and head (Stiennon 2020; Huang 2024, detail
    8). A reward model on another base cannot be copied, nor a head on the policy's adapter: those start with
    a zero head.

    Raises:
        UserError: a reward model gives no score, or does not fit and the recipe does not allow re-tokenizing.
    """
    folders = reward_folders(recipe, run)
    _check_scores(recipe, run, folders)
    names = reward_adapters(len(folders))
    section, start = recipe.ppo, start_folder(recipe, run, "ppo")
    rewards = () if section.retokenize else names
    test = audit_folder(recipe, run)
    tests = audit_adapters(recipe, dialogue, test)
    as_adapters = dict(zip(rewards, folders, strict=False)) | tests
    own_value = section.has_value and section.value == "adapter"
    torch.manual_seed(recipe.seed)
    backbone = new_backbone(
        load_base(recipe.model),
        recipe.lora,
        section,
        rewards=rewards,
        tests=[*tests],
        reference_copy=start is not None,
        **shapes_of([*as_adapters], [*as_adapters.values()]),
    )
    origins = {"policy": f"{recipe.model.path}, fresh adapter (no change at the start)"}
    origins["reference"] = f"{recipe.model.path}, adapters off"
    if start:
        count = backbone.load_adapter("policy", start)
        backbone.copy_adapter("policy", REFERENCE)
        origins["policy"] = f"{count} tensors of {start} ({_hash_of(start)})"
        origins["reference"] = "a frozen copy of the policy's start"
    if section.has_value:
        origins["value"] = "fresh, zero head" if own_value else "zero head on the policy's adapter"
    if rewards:
        check_rewards(recipe, dialogue, folders)
        copies = [("value", folders[0])] if own_value else []
        for adapter, folder in [*copies, *zip(rewards, folders, strict=True)]:
            origins[adapter] = load_scorer(backbone, adapter, folder)
    else:
        origins |= {n: f"{f}, on its own base, reads the text" for n, f in zip(names, folders, strict=True)}
    origins |= _audit_origin(backbone, test, tests)
    for reward in section.rewards:
        place = reward.model or judge_name(reward.scored_by or "")
        origins[f"{_LOGGED}{reward.label}"] = f"{reward.weight:g} x {place}"
    warning = backbone.check_architecture()
    if sharded:
        backbone.drop_trunk(WEIGHTS_SHARDED)
    if run.is_main:
        if warning:
            print(f"warning: {warning}", flush=True)
        if len(folders) > 1 and not section.rewards:
            origins["score"] = f"{_in_words(recipe)} of the {len(folders)} reward models"
        cut = backbone.frozen_layers
        trunk = f"{cut} frozen layers, computed once a rollout" if cut else f"none: {backbone.no_trunk}"
        for part, origin in {**origins, "trunk": trunk}.items():
            print(f"{part + ':':<10} {origin}", flush=True)
    return backbone


def _audit_origin(backbone: Backbone, test: Path | None, tests: Mapping[str, Path]) -> dict[str, str]:
    """Where the test model comes from, which is loaded here where it is an adapter."""
    if test is None:
        return {}
    own = load_scorer(backbone, TEST, test) if tests else f"{test}, on its own base, reads the text"
    return {"test model": f"{own}; no part of the reward"}


def _check_scores(recipe: Recipe, run: StageFolder, folders: Sequence[Path]) -> None:
    """Reward models give a score, and it is told which have read shorter responses than PPO samples."""
    for folder in folders:
        config = load_config(folder)
        check_has_score(config, folder)
        if run.is_main and config.max_response_tokens < (sampled := recipe.dialogue.max_response_tokens):
            where = f"{folder}: max_response_tokens"
            print(f"warning: {too_short(where, config.max_response_tokens, sampled)}", flush=True)


def _in_words(recipe: Recipe) -> str:
    how = recipe.ppo.ensemble
    return f"mean - {recipe.ppo.ensemble_penalty:g} x standard deviation" if how == "pessimistic" else how


class EnsembleScore:
    """The reward function of PPO: one or several reward models, combined; it notes how far they disagree.

    Args:
        members: the reward function of each reward model.
        how: as in :func:`reward.model.ensemble.combine`.
        penalty: of the same.
    """

    def __init__(self, members: Sequence[RewardFn], how: Combination, penalty: float) -> None:
        self.members, self.how, self.penalty = members, how, penalty
        self._spread, self._scored = 0.0, 0

    def __call__(self, responses: Responses) -> Tensor:
        """Scores, [B]; higher is better."""
        scores_MB = torch.stack([member(responses) for member in self.members])
        if responses.logged:
            self._spread += float(spread(scores_MB).sum())
            self._scored += scores_MB.shape[1]
        return combine(scores_MB, self.how, self.penalty)

    def figures(self, all_sum: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Mean disagreement on the responses scored since the last call, over all processes; then start anew.

        Every process must call it. Empty for a single reward model, which has nobody to disagree with, and
        where nothing was scored.

        all_sum: the sum of a tensor over all processes. device: where they sum.
        """
        if len(self.members) == 1:
            return {}
        total, number = all_sum(torch.tensor([self._spread, float(self._scored)], device=device)).tolist()
        self._spread, self._scored = 0.0, 0
        return {SPREAD: total / number} if number else {}


def score_function(
    recipe: Recipe,
    run: StageFolder,
    model: Backbone,
    dialogue: Dialogue,
    *,
    all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    moments: Mapping[str, Moments] | None = None,
) -> EnsembleScore | RewardMixture:
    """How PPO scores responses: reward adapters of the same base, reward models that read text, or the mix of
    the recipe's ``rewards``.

    all_sum: the sum of a tensor over all processes. moments: as in :class:`RewardMixture`.
    """
    section = recipe.ppo
    members = model_scores(recipe, reward_folders(recipe, run), model, dialogue)
    if not section.rewards:
        return EnsembleScore(members, section.ensemble, section.ensemble_penalty)
    return RewardMixture(
        _parts(recipe, run, members),
        micro_batch_size=section.micro_batch_size,
        steps=section.steps,
        all_sum=all_sum,
        moments=moments,
    )


def model_scores(
    recipe: Recipe, folders: Sequence[Path], model: Backbone, dialogue: Dialogue
) -> list[RewardFn]:
    """Scores by each of these reward models: as an adapter of the base, or beside it, reading text."""
    if recipe.ppo.retokenize:
        return [reads_text(folder, recipe) for folder in folders]
    return [_adapter(model, name, dialogue.end_of_context_id) for name in reward_adapters(len(folders))]


def _parts(recipe: Recipe, run: StageFolder, members: Sequence[RewardFn]) -> list[WeightedReward]:
    """The recipe's ``rewards``; ``members`` are our reward models among them, in order."""
    section, left = recipe.ppo, iter(members)
    own = own_folders(run.parent("reward"), section.ensemble) if section.own_reward else []
    columns = stored_columns(run) if recipe.data.prompt_columns else None
    parts = []
    for number, reward in enumerate(section.rewards):
        key = f"ppo.rewards[{number}]"
        part = WeightedReward(reward.label, reward.weight, reward.normalize)
        if reward.scored_by is not None:
            judge = judge_of(reward.scored_by, recipe, key, columns, in_ppo=True)
            part = part._replace(score=text_reward(judge), together=True)
            if isinstance(judge, RewardFunction):
                part = part._replace(function=judge)
        elif ours := _folders(reward, own):
            score = EnsembleScore([next(left) for _ in ours], section.ensemble, section.ensemble_penalty)
            part = part._replace(score=score, figures=score.figures)
        else:
            part = part._replace(score=_classifier(str(reward.model), recipe, f"{key}.model"))
        parts.append(part)
    return parts


def audit_function(recipe: Recipe, folder: Path, model: Backbone, dialogue: Dialogue) -> RewardFn:
    """How the test model in a folder scores responses."""
    if TEST in model.heads:
        return _adapter(model, TEST, dialogue.end_of_context_id)
    return reads_text(folder, recipe, "ppo.test_reward_model")


def _classifier(place: str, recipe: Recipe, key: str) -> RewardFn:
    """Scores by anybody's sequence classifier with one label, which reads prompt and response as text."""
    scorer = scorers.load_scorer(place, recipe, key=key)
    return lambda responses: torch.from_numpy(scorer.score(responses.prompts, responses.texts))


def reads_text(folder: Path, recipe: Recipe, key: str = "evaluate.reward_model") -> RewardFn:
    """Scores by a reward model with a base of its own, ours or anybody's, which reads prompt and response."""
    if config_file(folder) is None:
        return _classifier(str(folder), recipe, key)
    model = TextRewardModel(folder, best_device(), trust_remote_code=recipe.model.trust_remote_code)
    return lambda responses: model.score(responses.prompts, responses.texts)


def _adapter(model: Backbone, name: str, last_token: int | None) -> RewardFn:
    """Scores by one adapter, read on ``last_token`` behind EOS, or on EOS itself where that is None."""

    def score(responses: Responses) -> Tensor:
        ids_BT, mask_BT, hidden_BTD = responses.ids_BT, responses.mask_BT, responses.hidden_BTD
        if last_token is not None:  # the cached trunk has not seen that token
            ids_BT, mask_BT = append_token(ids_BT, mask_BT, last_token)
            hidden_BTD = None
        own_BT = mask_BT.clone()
        own_BT[:, : responses.start] = False
        with model.folded(name):
            return model(name, ids_BT, mask_BT, hidden_BTD, own_BT=own_BT)

    return score
