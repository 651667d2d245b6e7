"""Several reward models as one score: how they are combined, how far they disagree, which ones there are.

Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv 2310.02743).

Shape suffixes: ``_M`` member, ``_N`` response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from reward.model.model import load_config
from rlhf.errors import UserError

Combination = Literal["mean", "minimum", "pessimistic", "average"]
MODEL = "model"  # member 0, below the reward stage's folder; the others are model-1, model-2, ...
AVERAGE = "average"  # beside them, the mean of their weights
TEST_MODEL = "test_model"  # beside them, trained on comparisons that they have not seen


def combine(scores_MN: Tensor, how: Combination, penalty: float) -> Tensor:
    """One score a response, [N].

    scores_MN: one row a member. ``mean`` (Coste 2023, eq. 3); ``minimum``, the worst case (eq. 4);
    ``pessimistic``: mean - penalty x standard deviation, as eq. 5, which subtracts the variance: the standard
    deviation is in the unit of the scores, so one penalty serves reward models of any spread. One member
    gives its own scores, untouched, and is all that ``average`` has. No member, or another ``how``, is a
    ValueError.
    """
    if scores_MN.ndim != 2 or not len(scores_MN):
        raise ValueError(f"scores of shape {tuple(scores_MN.shape)} are not one row a member")
    if how not in ("mean", "minimum", "pessimistic", "average"):
        raise ValueError(f"{how!r} is no way of combining scores")
    if len(scores_MN) == 1:
        return scores_MN[0]
    if how == "average":
        raise ValueError("average is of weights, not of scores")
    if how == "minimum":
        return scores_MN.amin(dim=0)
    mean_N = scores_MN.mean(dim=0)
    return mean_N if how == "mean" else mean_N - penalty * spread(scores_MN)


def spread(scores_MN: Tensor) -> Tensor:
    """How far the members disagree on each response, [N]: population standard deviation over members.

    In units of the score; 0 for a single member.
    """
    return scores_MN.std(dim=0, correction=0)


def member_folders(reward_stage: Path) -> list[Path]:
    """Folders of all members that the reward stage saved, in order: ``model``, ``model-1``, ``model-2``, ...

    Raises:
        UserError: the first is missing, or one in between.
    """
    numbers = {0} if (reward_stage / MODEL).is_dir() else set()
    for folder in reward_stage.glob(f"{MODEL}-*"):
        match = re.fullmatch(rf"{MODEL}-([1-9][0-9]*)", folder.name)
        if match and folder.is_dir():
            numbers.add(int(match[1]))
    names = [MODEL, *(f"{MODEL}-{number}" for number in range(1, max(numbers, default=0) + 1))]
    missing = [name for number, name in enumerate(names) if number not in numbers]
    if missing:
        others = f", though {len(numbers)} other members are" if numbers else ""
        raise UserError(
            f"{reward_stage / missing[0]} is not there{others}; remove {reward_stage} and run "
            "`make reward RECIPE=...`"
        )
    return [reward_stage / name for name in names]


def own_folders(reward_stage: Path, how: Combination) -> list[Path]:
    """Folders of the reward models that score for a run: all its members, or the average of several.

    Raises:
        UserError: as :func:`member_folders`, or the average is missing, as in runs of earlier versions.
    """
    members, average = member_folders(reward_stage), reward_stage / AVERAGE
    if how != "average" or len(members) == 1:
        return members
    if not average.is_dir():
        raise UserError(
            f"ppo.ensemble=average: {average} is not there; remove {reward_stage} and run "
            "`make reward RECIPE=...`"
        )
    return [average]


def check_one_base(folders: Sequence[Path]) -> None:
    """Reward models that share one base must have been made with the same one, and with the same tokens.

    Raises:
        UserError: two differ; the remedy is to let each score the text by itself.
    """
    first = load_config(folders[0])
    for folder in folders[1:]:
        config = load_config(folder)
        if config.base != first.base:
            what = f"their bases are {first.base} and {config.base}"
        elif config.contract != first.contract:
            what = "their tokenizers or templates differ"
        else:
            continue
        raise UserError(
            f"ppo.reward_model: {folders[0]} and {folder} cannot share one base ({what}); "
            "set ppo.retokenize=true to let each score the decoded text by itself"
        )
