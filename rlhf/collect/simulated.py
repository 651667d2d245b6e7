"""The sentiment lab: sampled responses, ranked by a gold judge with an annotator's noise.

The protocol of Ziegler 2019 and Gao 2022: because the truth is known, everything later (reward accuracy,
over-optimization, what PPO gained) can be held against it. The judge labels and evaluates; it is never the
PPO reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rlhf.collect.judges import Judge, judge_name, judge_of, noisy_ranks, pair_agreement
from rlhf.collect.responses import sampled_responses
from rlhf.data.comparisons import Comparison, Counts, Prompt, problem
from rlhf.data.stored import stored_columns
from rlhf.recipe.load import Recipe
from rlhf.recipe.types import BASE
from rlhf.runs.artifacts import write_jsonl
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import Dialogue

_LABEL = 0x1ABE1  # sets the annotator's random numbers apart from all others of the seed


def sampled_comparisons(
    recipe: Recipe, run: StageRun, dialogue: Dialogue, prompts: Sequence[Prompt]
) -> tuple[list[Comparison], Counts]:
    """Sample K responses a prompt and rank them; a finished batch survives an interruption.

    Args:
        recipe: its ``collect`` section says how many, from which policies, how warm, who judges and how
            noisily.
        run: the open stage; finished batches lie in its ``parts`` folder. Where a policy writes, its
            ``sampled.jsonl`` says who wrote what.
        dialogue: the token contract.
        prompts: gone through in order, again from the start where more comparisons are asked for.

    Returns:
        The usable comparisons, and the counts of those that were not (fewer than two distinct responses).
    """
    section = recipe.collect
    judge = gold_judge(recipe, run)
    counts = Counts()
    comparisons: list[Comparison] = []
    rows: list[dict[str, Any]] = []
    for batch in sampled_responses(
        recipe,
        run,
        dialogue,
        [prompts[(section.skip + i) % len(prompts)] for i in range(section.prompts)],
        policies=section.policies,
        responses=section.responses,
        temperature=section.temperature,
        prompts_per_batch=section.prompts_per_batch,
        purpose="collect",
        first=section.skip,
    ):
        for comparison in _ranked(recipe, judge, batch.responses, batch.prompts, first=batch.first):
            counts.read += 1
            fault = problem(comparison)
            if fault:
                counts.drop(fault)
            else:
                comparisons.append(comparison)
        said = zip(batch.prompts, batch.responses, batch.writers, strict=True)
        rows += [{"prompt": [asdict(m) for m in p], "responses": r, "writers": w} for p, r, w in said]
    if section.policies != [BASE] and run.is_main:
        write_jsonl(run.folder / "sampled.jsonl", rows)
    return comparisons, counts


def gold_judge(recipe: Recipe, run: StageRun) -> Judge:
    """The judge of the lab, with the columns of the prompts that the stage has stored."""
    columns = stored_columns(run) if recipe.data.prompt_columns else None
    return judge_of(recipe.collect.judge, recipe, "collect.judge", columns)


def _ranked(
    recipe: Recipe, judge: Judge, responses: Sequence[Sequence[str]], batch: Sequence[Prompt], *, first: int
) -> Iterator[Comparison]:
    """Comparisons of one batch; texts that say nothing are left out before the ranking."""
    section = recipe.collect
    said = [tuple(text for text in texts if text.strip()) for texts in responses]
    scores = _judged(judge, batch, said)
    for row, (prompt, texts) in enumerate(zip(batch, said, strict=True)):
        rng = np.random.default_rng([recipe.seed % 2**63, _LABEL, first + row])
        ranks = tuple(noisy_ranks(scores[row], noise=section.noise, rng=rng))
        yield Comparison(prompt, texts, ranks, source=f"lab-{judge_name(section.judge)}")


def _judged(
    judge: Judge, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
) -> list[Sequence[float]]:
    """Scores of the responses to each prompt, all asked for in one call."""
    asked = [prompt for prompt, texts in zip(prompts, responses, strict=True) for _ in texts]
    scores = iter(judge(asked, [text for texts in responses for text in texts]))
    return [[next(scores) for _ in texts] for texts in responses]


def noise_ceiling(judge: Judge, comparisons: Sequence[Comparison]) -> tuple[list[float], list[int]]:
    """For each comparison, the pairs that the gold judge itself gets right, and all its pairs.

    Their ratio is what a perfect reward model would reach on these noisy labels.
    """
    scores = _judged(judge, [c.prompt for c in comparisons], [c.responses for c in comparisons])
    counts = [pair_agreement(gold, c.ranks) for gold, c in zip(scores, comparisons, strict=True)]
    return [agreeing for agreeing, _ in counts], [pairs for _, pairs in counts]
