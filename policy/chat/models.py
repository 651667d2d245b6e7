"""The models of `make chat`: adapters on one base in memory, and the run's reward model among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from policy.chat.session import Answer
from policy.chat.terminal import Interrupts, Pieces
from policy.ppo.rollout import Responses, RewardFn, close
from policy.ppo.setup import (
    EnsembleScore,
    check_rewards,
    load_scorer,
    model_scores,
    reward_adapters,
    reward_folders,
    shapes_of,
)
from rlhf.data.comparisons import Prompt
from rlhf.errors import UserError
from rlhf.generation import sampling
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.base import best_device, load_base
from rlhf.models.masks import ended
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import MANIFEST
from rlhf.runs.folder import StageFolder
from rlhf.runs.stage import RUNS
from rlhf.tokenization.dialogue import PromptTooLongError, load_dialogue
from rlhf.tokenization.prompt_prefix import parse, read_text, window_of

_NO_WINDOW = 1 << 20  # tokens, of a model that does not say how many it reads


class RunModels:
    """The models of a run that answer, one after the other (:class:`policy.chat.session.Models`).

    Args:
        recipe: the whole recipe.
        places: folders of the adapters by the models' names, in order; None for the base alone.
        interrupts: Ctrl-C, which stops an answer.

    Raises:
        UserError: an adapter or the run's reward model does not fit the base, or the base leaves no room for
            an answer.
    """

    def __init__(self, recipe: Recipe, places: Mapping[str, Path | None], interrupts: Interrupts) -> None:
        self.recipe, self._interrupts = recipe, interrupts
        self.names: Sequence[str] = list(places)
        section = recipe.chat
        self.dialogue = load_dialogue(recipe, section.max_tokens)
        self.dialogue.truncate_prompts = False
        run = StageFolder("chat", RUNS / recipe.name / "chat")
        folders, why = _rewards(recipe, run)
        beside = recipe.ppo.retokenize
        rewards = () if beside else reward_adapters(len(folders))
        self._roles = [f"model_{n}" if place else REFERENCE for n, place in enumerate(places.values())]
        self.backbone = Backbone(
            load_base(recipe.model),
            recipe.lora,
            adapters=[*(role for role in self._roles if role != REFERENCE), *rewards] or [REFERENCE],
            heads=rewards,
            **(shapes_of(rewards, folders) if rewards else {}),
        )
        for role, (name, place) in zip(self._roles, places.items(), strict=True):
            if place is not None:
                print(f"{name}: {self.backbone.load_adapter(role, place)} tensors of {place}", flush=True)
        if not beside:
            check_rewards(recipe, self.dialogue, folders)
        for role, folder in zip(rewards, folders, strict=True):
            print(f"score: {load_scorer(self.backbone, role, folder)}", flush=True)
        self.backbone.check_architecture()
        self.backbone.to(best_device())
        self._score: RewardFn | None = None
        if folders:
            members = model_scores(recipe, folders, self.backbone, self.dialogue)
            self._score = EnsembleScore(members, recipe.ppo.ensemble, recipe.ppo.ensemble_penalty)
        else:
            print(f"no scores: {why}", flush=True)
        window = window_of(self.backbone.base.config) or _NO_WINDOW
        self._trained_on, most = self.dialogue.max_prompt_tokens, self.dialogue.max_response_tokens
        self.dialogue.max_prompt_tokens = window - most - len(self.dialogue.closing)
        if self.dialogue.max_prompt_tokens < 1:
            raise UserError(
                f"chat.max_tokens: {most} leave nothing of the {window} tokens "
                f"that {recipe.model.path} reads; lower it"
            )

    def fault(self, prompt: Prompt, *, saved: bool = False) -> str | None:
        """Why the models cannot read a prompt, or a stage would refuse a saved comparison of it; or None."""
        if refusal := self.dialogue.refusal(prompt):
            return refusal
        try:
            number = len(self.dialogue.encode_prompt(prompt))
        except PromptTooLongError as error:
            most = f"the model reads {self.dialogue.max_prompt_tokens} before an answer"
            return f"{str(error).partition(',')[0]}, and {most}: /undo or /new"
        if saved and number > self._trained_on:
            return (
                f"the prompt has {number} tokens, and this recipe trains on {self._trained_on} "
                "(dialogue.max_prompt_tokens): /new begins a shorter one"
            )
        return None

    def prompt(self, name: str) -> Prompt:
        """The turns of a prompt file.

        name: the file, or ``hhh`` for the recipe's ``hhh_prompt``.

        Raises:
            UserError: it is not there, or of another structure.
        """
        file = Path(self.recipe.hhh_prompt if name == "hhh" else name).expanduser()
        return parse(read_text(file), str(file)).turns

    @torch.no_grad()
    def answer(
        self, model: int, prompt: Prompt, *, seed: int, turn: int, sample: int, say: Callable[[str], None]
    ) -> Answer:
        """One answer, token by token; its random numbers depend on seed, turn and sample alone."""
        dialogue, pieces, interrupts = self.dialogue, Pieces(say), self._interrupts

        def on_token(ids_BR: Tensor) -> bool:
            pieces.grow(dialogue.decode(ids_BR[0].tolist()))
            return not interrupts.asked

        sampled = sampling.sample(
            self.backbone,
            self._roles[model],
            [dialogue.encode_prompt(prompt)],
            sampling.uniforms(seed, "chat", turn, [sample], dialogue.max_response_tokens),
            eos_id=dialogue.end_ids,
            pad_id=dialogue.pad_id,
            temperature=self.recipe.chat.temperature,
            on_token=on_token,
        )
        number = int(sampled.lengths_B[0])
        ids = sampled.response_ids_BR[0, :number].tolist()
        text = dialogue.decode(ids)
        pieces.grow(text, whole=True)
        whole = bool(ended(sampled.response_ids_BR[:, :number], dialogue.end_ids)[0])
        end = "" if whole else "stopped" if interrupts.asked else "limit"
        interrupts.asked = False  # the next one may answer
        score = None
        if self._score is not None and end != "stopped":
            start = sampled.prompt_ids_BP.shape[1]
            ids_BT, mask_BT, _ = close(sampled, start, eos_id=dialogue.end_ids, pad_id=dialogue.pad_id)
            score = float(self._score(Responses([prompt], [text], ids_BT, mask_BT, None, start)))
        return Answer(text, score, number, end)


def _rewards(recipe: Recipe, run: StageFolder) -> tuple[list[Path], str]:
    """The reward models of ours that PPO trains against; why there is none."""
    own = run.parent("reward")
    if recipe.ppo.own_reward and not (own / MANIFEST).exists():
        return [], f"{own} is not complete (`make reward RECIPE=...`)"
    return reward_folders(recipe, run), "ppo.rewards has no reward model of this project"
