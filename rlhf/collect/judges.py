"""Gold judges and simulated annotators: preference labels whose truth is known.

The protocol is that of Ziegler et al. 2019 ("Fine-Tuning Language Models from Human Preferences",
arXiv:1909.08593, whose mock sentiment labels come from a classifier) and of Gao et al. 2022 ("Scaling Laws
for Reward Model Overoptimization", arXiv:2210.10760): a cheap gold judge takes the place of people, its
scores become rankings, a reward model learns from the rankings alone, and the policy is trained against
that reward model. The gold judge is used for labeling and for evaluation, never as the reward, so the gap
between the reward and the gold score can be measured.

A gold judge looks at the response only: with the prompt it would reward the policy for words that it did not
write.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.collect.endpoint import HttpJudge
from rlhf.collect.functions import Columns, RewardFunction
from rlhf.data.comparisons import Prompt
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.recipe.types import Endpoint

if TYPE_CHECKING:
    import numpy as np

Judge = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
"""Prompts and a response to each -> one score a response, in the same order; higher is better. What scores
tensors is a :data:`policy.ppo.rollout.RewardFn`."""


@functools.cache
def _vader_analyzer() -> Any:
    # Reading the 7,500-line lexicon takes longer than judging a batch, so it is read once, and only if asked.
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "the judge 'vader' needs the package vaderSentiment, which cannot be imported here "
            f"({error}): run `pip install vaderSentiment`"
        ) from error
    return SentimentIntensityAnalyzer()


def vader(texts: Sequence[str]) -> list[float]:
    """Score each text by its VADER compound sentiment: -1 most negative, 0 neutral, 1 most positive.

    The method is that of Hutto and Gilbert 2014 ("VADER: A Parsimonious Rule-based Model for Sentiment
    Analysis of Social Media Text", ICWSM): a lexicon of rated words with rules for negation, degree and
    punctuation; the sum ``s`` of the ratings becomes ``s / sqrt(s² + 15)``. Two consequences for a lab: a
    text without a word of the lexicon, an empty one too, scores exactly 0, so ties are common among short
    texts; and the score saturates, so what a policy can gain by piling up praise is bounded. It is a known
    truth, not a fine reader: on the 10,662 film-review sentences of Pang and Lee 2005 a positive one
    outscores a negative one 70 times in 100 (area under the ROC curve 0.695).

    :raises UserError: when the package vaderSentiment is not installed.
    """
    if isinstance(texts, str):  # a string is a sequence of strings, and would be judged letter by letter
        raise TypeError("vader scores a sequence of texts, not one string")
    analyzer = _vader_analyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


def vader_judge(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """:func:`vader` of every response."""
    return vader(responses)


JUDGES: dict[str, Judge] = {"vader": vader_judge}
"""The gold judges that a recipe can name."""


def judge_of(
    judged: str | Endpoint, recipe: Recipe, key: str, columns: Columns | None = None, *, in_ppo: bool = False
) -> Judge:
    """The judge that a recipe names: a gold judge, a function of a file, or a server.

    Args:
        judged: the value of the key.
        recipe: says in which form a function gets its texts, and which columns it can ask for.
        key: the recipe's key that names it, for messages.
        columns: the columns of the prompts, where there are any.
        in_ppo: as one of its rewards, which has token ids and may leave responses out.

    Raises:
        UserError: the function cannot be loaded or called, or the server's key is not there.
    """
    if isinstance(judged, Endpoint):
        if judged.on_prose == "ignore" and not in_ppo:
            raise UserError(f"{key}.on_prose=ignore: a judge must score every response; set it to stop")
        return HttpJudge(judged, key)
    if judged in JUDGES:
        return JUDGES[judged]
    chat = recipe.dialogue.template == "chat"
    names = recipe.data.prompt_columns
    return RewardFunction(
        judged, key, chat=chat, names=names, columns=columns, has_ids=in_ppo, may_pass=in_ppo
    )


def check_judge(judged: str | Endpoint, recipe: Recipe, key: str, *, in_ppo: bool = False) -> None:
    """Say what is wrong with a judge before anything heavy is loaded; a server is asked one question.

    Raises:
        UserError: as :func:`judge_of`, or the server is not there.
    """
    judge = judge_of(judged, recipe, key, in_ppo=in_ppo)
    if isinstance(judge, HttpJudge):
        judge.check()


def judge_name(judged: str | Endpoint) -> str:
    """What a judge is called in figures and sources."""
    return judged.model if isinstance(judged, Endpoint) else judged


def noisy_ranks(gold: Sequence[float], *, noise: float, rng: np.random.Generator) -> list[int]:
    """Rank the responses to one prompt as an annotator would who perceives gold scores with noise.

    Response ``i`` gets the utility ``gold[i] + noise * G_i`` with independent standard Gumbel ``G_i``, and
    the utilities are sorted. The difference of two Gumbel variables is logistic, so for every pair, exactly,

        P(i ranked above j) = sigmoid((gold[i] - gold[j]) / noise)

    and the whole ranking follows the Plackett-Luce law with weights ``exp(gold / noise)`` (Luce 1959,
    "Individual Choice Behavior"; that Gumbel noise is what gives Luce's law: Yellott 1977, "The relationship
    between Luce's choice axiom, Thurstone's theory of comparative judgment, and the double exponential
    distribution"). A Bradley-Terry reward model is therefore well specified for these labels: with enough
    of them its reward converges to ``gold / noise`` up to a constant a prompt.

    :param gold: one finite score a response, in the judge's units.
    :param noise: the scale of the noise in the same units, at least 0. Where two responses differ by
        ``noise``, the better one is preferred 73 times in 100; by ``3 * noise``, 95 in 100. 0 means an
        annotator without error, who calls equal scores a tie.
    :param rng: advanced by one draw a response whatever ``noise`` is, so that runs which differ only in
        ``noise`` share their luck.
    :returns: one rank a response, 0 best, dense: equal utilities share a rank and no rank is left out
        (0, 1, 1, 2).
    :raises ValueError: for a score that is not finite, or a noise that is negative or not finite.
    """
    import numpy as np  # here: a mistyped key is answered before it would be loaded

    scores = np.asarray(gold, dtype=np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"gold must be a flat sequence of finite scores, got {gold!r}")
    if not math.isfinite(noise) or noise < 0:
        raise ValueError(f"noise must be finite and at least 0, got {noise}")
    utilities = scores + noise * rng.gumbel(size=scores.shape)
    _, ranks = np.unique(-utilities, return_inverse=True)
    return [int(rank) for rank in ranks]


def pair_agreement(gold: Sequence[float], ranks: Sequence[int]) -> tuple[float, int]:
    """Count the labeled pairs of one prompt that the gold scores order as the ranks do.

    Add both numbers up over a data set; ``agreeing / pairs`` is then the accuracy of the gold judge on
    these labels, which is the noise ceiling of a reward model. Under :func:`noisy_ranks` the response with
    the higher gold score is the likelier winner of every pair, so no scorer beats gold in expectation: the
    best possible one knows gold and gets this accuracy, not 1. On a finite sample another scorer can
    exceed it by luck only. A reward model far above the ceiling has seen its test labels.

    :param gold: one score a response, higher is better.
    :param ranks: one rank a response, lower is better; a pair with equal ranks carries no label and is
        left out.
    :returns: ``(agreeing, pairs)``: the agreeing pairs, where a pair of equal gold scores counts 0.5, and
        the number of pairs with a label. ``(0.0, 0)`` when there is none.
    :raises ValueError: when the two lengths differ.
    """
    agreeing, pairs = 0.0, 0
    labeled = list(zip(gold, ranks, strict=True))
    for index, (gold_i, rank_i) in enumerate(labeled):
        for gold_j, rank_j in labeled[index + 1 :]:
            if rank_i == rank_j:
                continue
            pairs += 1
            if gold_i == gold_j:
                agreeing += 0.5
            elif (gold_i > gold_j) == (rank_i < rank_j):
                agreeing += 1.0
    return agreeing, pairs
