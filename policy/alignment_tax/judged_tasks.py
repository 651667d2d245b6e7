"""Tasks in which a variant writes and a judge scores: what is asked, and who judges.

The variants write first, one model in memory at a time; the judge is loaded when all of them are gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from policy.alignment_tax.models import ModelVariant, model_hash, prompt_of
from policy.ppo.metrics import distinct_n
from reward.card.scorers import load_scorer
from reward.model.ensemble import combine, member_folders
from reward.model.model import TextRewardModel
from rlhf.collect.judges import JUDGES, Judge
from rlhf.data.comparisons import Prompt, prompt_key
from rlhf.data.stored import stored_prompts
from rlhf.errors import UserError
from rlhf.evals.model import LanguageModel
from rlhf.evals.outcome import Outcome
from rlhf.evals.tasks import hhh, toxicity
from rlhf.evals.tasks.toxicity import judged
from rlhf.models.base import best_device
from rlhf.recipe.load import Recipe
from rlhf.recipe.tax import Tax
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import PromptTooLongError, dialogue_of

Responses = list[list[str]]
"""Of each prompt, its samples."""


class ToxicityTask:
    """The task `toxicity`.

    Args:
        recipe: the whole recipe.
        section: its section `tax`.
        items: the prompts, drawn already.
    """

    name = toxicity.TASK

    def __init__(self, recipe: Recipe, section: Tax, items: Sequence[toxicity.Item]) -> None:
        self.recipe, self.section, self.items = recipe, section.toxicity, items

    def shown(self) -> list[str]:
        """The prompts, for the reader."""
        return [item.text for item in self.items]

    def asked(self) -> dict[str, Any]:
        """What decides what the variants write."""
        return {**self._sampling(), "items": [item.id for item in self.items]}

    def judged_by(self) -> dict[str, Any]:
        """What decides how it is scored."""
        toxic = self.section
        return {
            "judge": model_hash(toxic.judge),
            "higher_is_better": toxic.higher_is_better,
            "threshold": toxic.threshold,
        }

    def respond(self, variant: ModelVariant, lm: LanguageModel) -> Responses:
        """What a variant writes."""
        return toxicity.respond(lm, self.items, seed=self.recipe.seed, **self._sampling())

    def _sampling(self) -> dict[str, Any]:
        toxic = self.section
        return {
            "samples": toxic.samples_per_prompt,
            "max_new_tokens": toxic.max_new_tokens,
            "temperature": toxic.temperature,
            "top_p": toxic.top_p,
        }

    def judge(self) -> Judge:
        """Load the judge."""
        name = self.section.judge
        if name in JUDGES:
            return JUDGES[name]
        scorer = load_scorer(name, self.recipe, key="tax.toxicity.judge")
        return lambda prompts, responses: scorer.score(prompts, responses).tolist()

    def outcome(self, responses: Responses, judge: Judge) -> Outcome:
        """The figures of a variant's responses."""
        return toxicity.outcome(
            self.items,
            judged([item.messages for item in self.items], responses, judge),
            threshold=self.section.threshold,
            higher_is_better=self.section.higher_is_better,
        )


class HeldOutScore:
    """The task `score`: responses to the run's held-out prompts, judged as the section `evaluate` says.

    Args:
        recipe: the whole recipe.
        run: the open stage, beside which the prompts lie.
    """

    name = "score"

    def __init__(self, recipe: Recipe, run: StageRun) -> None:
        self.recipe, self.run, self.section = recipe, run, recipe.evaluate
        found = stored_prompts(run, "held_out_prompts.jsonl")
        self.prompts: list[Prompt] = found[: self.section.prompts]
        if len(found) < self.section.prompts:
            print(f"tax: {len(found)} held-out prompts, fewer than the {self.section.prompts} asked for")

    def shown(self) -> list[str]:
        """The last turn of every prompt, for the reader."""
        return [prompt[-1].content for prompt in self.prompts]

    def asked(self) -> dict[str, Any]:
        """What decides what the variants write."""
        return {
            "prompts": [prompt_key(prompt) for prompt in self.prompts],
            "samples": self.section.samples_per_prompt,
            "temperature": self.section.temperature,
        }

    def judged_by(self) -> dict[str, Any]:
        """What decides how it is scored."""
        ppo = self.recipe.ppo
        by_text = self.section.judge != "reward"
        ensemble = {} if by_text else {"ensemble": ppo.ensemble, "penalty": ppo.ensemble_penalty}
        folders = [] if by_text else [model_hash(str(folder)) for folder in self._folders()]
        return {"judge": self.section.judge, "reward_models": folders, **ensemble}

    def respond(self, variant: ModelVariant, lm: LanguageModel) -> Responses:
        """What a variant writes: unprompted in the form that it was trained on, prompted as a new turn."""
        samples = self.section.samples_per_prompt
        dialogue = dialogue_of(self.recipe, lm.tokenizer)
        if variant.prompted:
            behind = prompt_of(self.recipe, lm.tokenizer)
            ids = [behind.after_dialogue(prompt, reply=True) for prompt in self.prompts]
        else:  # the language model puts BOS itself
            try:
                whole = [dialogue.encode_prompt(prompt) for prompt in self.prompts]
            except PromptTooLongError as error:  # which they are not in the recipe's own tokens
                raise UserError(f"{error} in the tokens of this variant; raise that limit") from None
            lead = len(lm.prefix_ids)
            ids = [row[lead:] if row[:lead] == lm.prefix_ids else row for row in whole]
        texts = lm.generate(
            [row for row in ids for _ in range(samples)],
            max_new_tokens=dialogue.max_response_tokens,
            temperature=self.section.temperature,
            seed=self.recipe.seed,
            names=[f"held-out prompt {i + 1}" for i in range(len(ids)) for _ in range(samples)],
        )
        return [texts[first : first + samples] for first in range(0, len(texts), samples)]

    def _folders(self) -> list[Path]:
        """The reward models that judge: the recipe's, else those that PPO was trained against."""
        if self.section.reward_model:
            return [Path(self.section.reward_model)]
        named = self.recipe.ppo.reward_model
        return [Path(folder) for folder in named] if named else member_folders(self.run.parent("reward"))

    def judge(self) -> Judge:
        """Load the judge."""
        if self.section.judge != "reward":
            return JUDGES[self.section.judge]
        return reward_judge(self.recipe, self._folders())

    def outcome(self, responses: Responses, judge: Judge) -> Outcome:
        """The figures of a variant's responses: score, words, and how varied they are as a set."""
        scores = judged(self.prompts, responses, judge)
        varied = distinct_n([text for said in responses for text in said], 2)
        by = "a reward model" if self.section.judge == "reward" else self.section.judge
        return Outcome(
            task=self.name,
            metric="score",
            higher_is_better=True,
            ids=[f"held-out prompt {i + 1}" for i in range(len(self.prompts))],
            groups=[""] * len(self.prompts),
            values={
                "score": [sum(row) / len(row) for row in scores],
                "words": [sum(len(t.split()) for t in said) / len(said) for said in responses],
            },
            notes=[
                f"responses to the run's held-out prompts, judged by {by}; distinct_2 is the share of "
                "different word pairs among all that were written"
            ],
            aggregate={} if math.isnan(varied) else {"distinct_2": varied},
        )


def reward_judge(recipe: Recipe, folders: Sequence[Path]) -> Judge:
    """Reward models of this project as one judge, combined as PPO combines them."""
    models = [TextRewardModel(folder, best_device()) for folder in folders]
    ppo = recipe.ppo

    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        scores_MB = torch.stack([model.score(prompts, responses).cpu() for model in models])
        return [float(s) for s in combine(scores_MB, ppo.ensemble, ppo.ensemble_penalty)]

    return score


def hhh_by_reward_model(recipe: Recipe, run: StageRun, items: Sequence[hhh.Item]) -> Outcome:
    """Which of the two answers of each HHH item the run's own reward model prefers.

    Raises:
        UserError: the run's reward model gives no score.
    """
    return hhh.hhh_by_scores(items, reward_judge(recipe, member_folders(run.parent("reward"))))
