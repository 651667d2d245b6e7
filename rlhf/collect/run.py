"""The work of the `comparisons` stage: read or sample comparisons, check them, split them by prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rlhf.collect.simulated import noise_ceiling, sampled_comparisons
from rlhf.data.comparisons import (
    Comparison,
    Counts,
    Prompt,
    deduplicate,
    prompt_key,
    split_by_prompt,
    write_native,
)
from rlhf.data.prompts import read_prompts
from rlhf.data.readers import read_comparisons
from rlhf.data.stored import within_prompt_limit, write_prompts
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import StageRun
from rlhf.stats.intervals import cluster_mean_interval
from rlhf.tokenization.contract import describe
from rlhf.tokenization.dialogue import load_dialogue


def collect(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Do the stage's work; returns the figures for the manifest."""
    dialogue = load_dialogue(recipe)
    data = recipe.data
    counts: dict[str, Counts] = {}
    given: dict[str, list[Prompt]] = {}
    for key in ("prompts", "held_out_prompts"):
        specs = getattr(data, key)
        if specs:
            found, counts[key] = read_prompts(
                specs, on_bad_rows=data.on_bad_rows, key=f"data.{key}", refuses=dialogue.refusal
            )
            random.Random(f"{recipe.seed}:{key}").shuffle(found)
            given[key] = within_prompt_limit(found, lambda p: p, recipe, dialogue, counts[key])
            if not given[key]:
                raise UserError(f"data.{key}: nothing usable in {', '.join(specs)}: {counts[key]}")
    if data.sampled:
        comparisons, counts["comparisons"] = sampled_comparisons(recipe, run, dialogue, given["prompts"])
        comparisons = deduplicate(comparisons, counts["comparisons"])
    else:
        comparisons, counts["comparisons"] = read_comparisons(
            data.comparisons, on_bad_rows=data.on_bad_rows, refuses=dialogue.refusal
        )
        comparisons = within_prompt_limit(
            comparisons, lambda c: c.prompt, recipe, dialogue, counts["comparisons"]
        )
    if data.limit and len(comparisons) > data.limit:
        counts["comparisons"].drop("beyond data.limit", len(comparisons) - data.limit)
        comparisons = random.Random(recipe.seed).sample(comparisons, data.limit)
    if not comparisons:
        raise UserError(
            f"data.comparisons: nothing usable in {', '.join(data.comparisons)}: {counts['comparisons']}"
        )
    for line in describe(dialogue, [(c.prompt, c.responses[0]) for c in comparisons]):
        print(line, flush=True)
    train, held_out = split_by_prompt(comparisons, data.held_out, recipe.seed)
    prompts = given.get("prompts") or _distinct(train)
    train_keys = {prompt_key(p) for p in prompts} | {prompt_key(c.prompt) for c in train}
    held_out_prompts = given.get("held_out_prompts") or _distinct(held_out)
    apart = [p for p in held_out_prompts if prompt_key(p) not in train_keys]
    if len(apart) < len(held_out_prompts):
        counts.setdefault("held_out_prompts", Counts(read=len(held_out_prompts))).drop(
            "also among the training prompts", len(held_out_prompts) - len(apart)
        )
    if not apart:
        raise UserError("data.held_out_prompts: every one is also a training prompt; give other ones")
    write_native(run.folder / "train.jsonl", train)
    write_native(run.folder / "held_out.jsonl", held_out)
    write_prompts(run.folder / "prompts.jsonl", prompts)
    write_prompts(run.folder / "held_out_prompts.jsonl", apart)
    for name, count in counts.items():
        print(f"{name}: {count}", flush=True)
    results: dict[str, Any] = {
        "train": len(train),
        "held_out": len(held_out),
        "prompts": len(prompts),
        "held_out_prompts": len(apart),
        "responses": sum(len(c.responses) for c in comparisons),
        "counts": {name: count.as_dict() for name, count in counts.items()},
    }
    if data.sampled:
        ceiling = cluster_mean_interval(*noise_ceiling(recipe.collect.judge, held_out))
        results["noise_ceiling"] = ceiling.as_dict()
    print(
        f"comparisons: {len(train)} to train on, {len(held_out)} held out; "
        f"{len(prompts)} prompts for PPO, {len(apart)} held out",
        flush=True,
    )
    return results


def _distinct(comparisons: Sequence[Comparison]) -> list[Prompt]:
    return list({prompt_key(c.prompt): c.prompt for c in comparisons}.values())
