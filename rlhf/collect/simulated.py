"""The sentiment lab: responses sampled from the base model, ranked by a gold judge with an annotator's noise.

The protocol of Ziegler 2019 and Gao 2022: because the truth is known, everything later (reward accuracy,
over-optimisation, what PPO gained) can be held against it. The judge labels and evaluates; it is never the
PPO reward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from rlhf.collect.judges import Judge, judge_name, judge_of, noisy_ranks, pair_agreement
from rlhf.data.comparisons import Comparison, Counts, Prompt, problem
from rlhf.data.stored import stored_columns
from rlhf.generation.sampling import sample, uniforms
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.base import best_device, load_base
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.progress import progress

_LABEL = 0x1ABE1  # sets the annotator's random numbers apart from all others of the seed


def sampled_comparisons(
    recipe: Recipe, run: StageRun, dialogue: Dialogue, prompts: Sequence[Prompt]
) -> tuple[list[Comparison], Counts]:
    """Sample K responses a prompt and rank them; a finished batch survives an interruption.

    Args:
        recipe: its ``collect`` section says how many, how warm, who judges and how noisily.
        run: the open stage; finished batches lie in its ``parts`` folder.
        dialogue: the token contract.
        prompts: gone through in order, again from the start where more comparisons are asked for.

    Returns:
        The usable comparisons, and the counts of those that were not (fewer than two distinct responses).
    """
    section = recipe.collect
    chosen = [prompts[i % len(prompts)] for i in range(section.prompts)]
    batches = range(0, len(chosen), section.prompts_per_batch)
    backbone = functools.cache(partial(_backbone, recipe))  # not loaded where all batches are there
    judge = gold_judge(recipe, run)
    counts = Counts()
    comparisons: list[Comparison] = []
    for number, start in enumerate(progress("comparisons", batches, leave=True)):
        batch = chosen[start : start + section.prompts_per_batch]
        responses = run.remember(
            f"{number:05d}", partial(_responses, recipe, backbone, dialogue, batch, first=start)
        )
        for comparison in _ranked(recipe, judge, responses, batch, first=start):
            counts.read += 1
            fault = problem(comparison)
            if fault:
                counts.drop(fault)
            else:
                comparisons.append(comparison)
    return comparisons, counts


def _backbone(recipe: Recipe) -> Backbone:
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["policy"])
    backbone.check_architecture()
    return backbone.to(best_device())


def _responses(
    recipe: Recipe,
    backbone: Callable[[], Backbone],
    dialogue: Dialogue,
    batch: Sequence[Prompt],
    *,
    first: int,
) -> list[list[str]]:
    section = recipe.collect
    k = section.responses
    prompts = [dialogue.encode_prompt(p) for p in batch for _ in range(k)]
    rows = range(first * k, first * k + len(prompts))
    sampled = sample(
        backbone(),
        REFERENCE,
        prompts,
        uniforms(recipe.seed, "collect", 0, rows, dialogue.max_response_tokens),
        eos_id=dialogue.end_ids,
        pad_id=dialogue.pad_id,
        temperature=section.temperature,
    )
    texts = [dialogue.decode(ids) for ids in sampled.response_ids_BR.tolist()]
    return [texts[i : i + k] for i in range(0, len(texts), k)]


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
