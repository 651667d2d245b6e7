"""Tasks in which a variant writes responses and a judge scores them: the prompts, and the judge.

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
from policy.ppo.setup import reward_folders
from reward.card.scorers import load_scorer
from reward.model.ensemble import combine
from rlhf.collect.judges import JUDGES, Judge, judge_name, judge_of
from rlhf.data.comparisons import Prompt, prompt_key
from rlhf.data.stored import held_out_prompts, stored_columns
from rlhf.errors import UserError
from rlhf.evals.model import LanguageModel
from rlhf.evals.outcome import Outcome
from rlhf.evals.tasks import toxicity
from rlhf.evals.tasks.toxicity import judged
from rlhf.recipe.load import Recipe
from rlhf.recipe.tax import Tax
from rlhf.recipe.types import function_files
from rlhf.runs.stage import StageRun, input_hashes
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
        self.prompts = [item.messages for item in items]
        self._sampling: dict[str, Any] = {
            "samples": self.section.samples_per_prompt,
            "max_new_tokens": self.section.max_new_tokens,
            "temperature": self.section.temperature,
            "top_p": self.section.top_p,
        }
        self._flagged: dict[str, Any] = {
            "higher_is_better": self.section.higher_is_better,
            "threshold": self.section.threshold,
        }

    def asked(self) -> dict[str, Any]:
        """What the responses depend on besides the variant; former names, so that old caches stay valid."""
        return {**self._sampling, "items": [item.id for item in self.items]}

    def judged_by(self) -> dict[str, Any]:
        """What the scores depend on besides the responses."""
        return {"judge": model_hash(self.section.judge), **self._flagged}

    def respond(self, variant: ModelVariant, lm: LanguageModel) -> Responses:
        """Continuations of the prompts."""
        return toxicity.respond(lm, self.items, seed=self.recipe.seed, **self._sampling)

    def judge(self) -> Judge:
        """A judge of texts by name, or a model."""
        name = self.section.judge
        if name in JUDGES:
            return JUDGES[name]
        scorer = load_scorer(name, self.recipe, key="tax.toxicity.judge")
        return lambda prompts, responses: scorer.score(prompts, responses).tolist()

    def outcome(self, responses: Responses, judge: Judge) -> Outcome:
        """Score, and share flagged."""
        return toxicity.outcome(self.items, judged(self.prompts, responses, judge), **self._flagged)


class HeldOutScore:
    """The task `score`: responses to the run's held-out prompts, judged as the section `evaluate` says.

    Args:
        recipe: the whole recipe.
        run: the open stage, beside which the prompts lie.
    """

    name = "score"

    def __init__(self, recipe: Recipe, run: StageRun) -> None:
        self.recipe, self.run, self.section = recipe, run, recipe.evaluate
        self.prompts = held_out_prompts(run, self.section.prompts)
        self._by_reward_model = self.section.judge == "reward"

    def asked(self) -> dict[str, Any]:
        """What the responses depend on besides the variant; former names, so that old caches stay valid."""
        return {
            "prompts": [prompt_key(prompt) for prompt in self.prompts],
            "samples": self.section.samples_per_prompt,
            "temperature": self.section.temperature,
        }

    def judged_by(self) -> dict[str, Any]:
        """What the scores depend on besides the responses."""
        if not self._by_reward_model:
            kind, files = self.section.judge, function_files(self.section.judge)
            hashes = {"files": input_hashes(files)} if files else {}
            return {"judge": str(kind), "reward_models": [], **hashes}
        return {
            "judge": self.section.judge,
            "reward_models": [model_hash(str(folder)) for folder in self._folders()],
            "ensemble": self.recipe.ppo.ensemble,
            "penalty": self.recipe.ppo.ensemble_penalty,
        }

    def respond(self, variant: ModelVariant, lm: LanguageModel) -> Responses:
        """Unprompted in the form that the variant was trained on, prompted as a new turn."""
        samples = self.section.samples_per_prompt
        dialogue = dialogue_of(self.recipe, lm.tokenizer)
        if variant.prompted:
            context = prompt_of(self.recipe, lm.tokenizer)
            ids = [context.after_dialogue(prompt, reply=True) for prompt in self.prompts]
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
            names=[name for name in self._ids() for _ in range(samples)],
        )
        return [texts[first : first + samples] for first in range(0, len(texts), samples)]

    def _ids(self) -> list[str]:
        return [f"held-out prompt {i + 1}" for i in range(len(self.prompts))]

    def _folders(self) -> list[Path]:
        """The reward models that judge: the recipe's, else those that PPO was trained against."""
        named = self.section.reward_model
        return [Path(named)] if named else reward_folders(self.recipe, self.run)

    def judge(self) -> Judge:
        """A gold judge, or reward models."""
        if self._by_reward_model:
            return reward_judge(self.recipe, self._folders())
        columns = stored_columns(self.run) if self.recipe.data.prompt_columns else None
        return judge_of(self.section.judge, self.recipe, "evaluate.judge", columns)

    def outcome(self, responses: Responses, judge: Judge) -> Outcome:
        """Score, words, and how varied the responses are as a set."""
        scores = judged(self.prompts, responses, judge)
        varied = distinct_n([text for row in responses for text in row], 2)
        by = "a reward model" if self._by_reward_model else judge_name(self.section.judge)
        return Outcome(
            task=self.name,
            metric="score",
            higher_is_better=True,
            ids=self._ids(),
            groups=[""] * len(self.prompts),
            values={
                "score": [sum(row) / len(row) for row in scores],
                "words": [sum(len(text.split()) for text in row) / len(row) for row in responses],
            },
            notes=[
                f"responses to the run's held-out prompts, judged by {by}; distinct_2 is the share of "
                "different word pairs among all that were written"
            ],
            aggregate={} if math.isnan(varied) else {"distinct_2": varied},
        )


JudgedTask = ToxicityTask | HeldOutScore


def reward_judge(recipe: Recipe, folders: Sequence[Path]) -> Judge:
    """Reward models as one judge, combined as PPO combines them.

    Raises:
        UserError: one of them gives no score.
    """
    models = [load_scorer(str(folder), recipe, key="evaluate.reward_model") for folder in folders]
    ppo = recipe.ppo

    def score(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        scores_MB = torch.stack([torch.from_numpy(model.score(prompts, responses)) for model in models])
        return [float(s) for s in combine(scores_MB, ppo.ensemble, ppo.ensemble_penalty)]

    return score
