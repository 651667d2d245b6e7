"""The work of the `comparisons` stage: read or sample comparisons, check them, split them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rlhf.collect.simulated import gold_judge, noise_ceiling, sampled_comparisons
from rlhf.data.comparisons import (
    DUPLICATE,
    Comparison,
    Counts,
    Prompt,
    at_most,
    deduplicate,
    prompt_key,
    write_native,
)
from rlhf.data.prompts import read_prompts
from rlhf.data.rankings import as_rankings, decided
from rlhf.data.readers import read_comparisons
from rlhf.data.split import check_apart, check_rankings, split_comparisons
from rlhf.data.stored import COLUMNS, within_prompt_limit, write_columns, write_prompts
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import StageRun
from rlhf.stats.intervals import cluster_mean_interval
from rlhf.tokenization.contract import describe
from rlhf.tokenization.dialogue import Dialogue, load_dialogue

MOST_RESPONSES = 256  # of a comparison: losses and figures look at all pairs of its responses at once


def collect(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Do the stage's work; returns the figures for the manifest."""
    dialogue = load_dialogue(recipe)
    data = recipe.data
    counts: dict[str, Counts] = {}
    columns: dict[str, dict[str, Any]] = {}
    given = _given_prompts(recipe, dialogue, counts, columns)
    if columns:
        write_columns(run.folder / COLUMNS, columns)
    comparisons = _comparisons(recipe, run, dialogue, given, counts)
    for line in describe(dialogue, [(c.prompt, c.responses[0]) for c in comparisons]):
        print(line, flush=True)
    train, held_out, lines = _parts(recipe, dialogue, comparisons, counts)
    more: dict[str, Any] = {}
    if data.rankings:
        train, more["rankings"] = _rankings(recipe, train, lines, counts["comparisons"])
        lines += check_rankings(train, held_out, data.allow_overlap)
    else:
        train = _bounded(_decided(train, "comparisons", recipe, counts), "comparisons", recipe, counts)
    held_out = _bounded(held_out, "held_out_comparisons" if data.held_out_comparisons else "comparisons",
                        recipe, counts)  # fmt: skip
    prompts = given.get("prompts") or _distinct(train)
    apart, shared = _held_out_prompts(given.get("held_out_prompts"), train, held_out, prompts, counts)
    if shared:
        more["held_out_prompts_are_training_prompts"] = True
        lines.append(
            "warning: every held-out prompt is also a training prompt: what samples from held-out prompts "
            "(ppo, evaluate, tax) sees no new ones; data.held_out_prompts names others"
        )
    write_native(run.folder / "train.jsonl", train)
    write_native(run.folder / "held_out.jsonl", held_out)
    write_prompts(run.folder / "prompts.jsonl", prompts)
    write_prompts(run.folder / "held_out_prompts.jsonl", apart)
    for line in (*(f"{name}: {count}" for name, count in counts.items()), *lines):
        print(line, flush=True)
    results: dict[str, Any] = {
        "train": len(train),
        "held_out": len(held_out),
        "prompts": len(prompts),
        "held_out_prompts": len(apart),
        "responses": sum(len(c.responses) for c in (*train, *held_out)),
        "counts": {name: count.as_dict() for name, count in counts.items()},
        **more,
        **({"notes": lines} if lines else {}),
    }
    if data.sampled:
        ceiling = cluster_mean_interval(*noise_ceiling(gold_judge(recipe, run), held_out))
        results["noise_ceiling"] = ceiling.as_dict()
    print(
        f"comparisons: {len(train)} to train on, {len(held_out)} held out; "
        f"{len(prompts)} prompts for PPO, {len(apart)} held out",
        flush=True,
    )
    return results


def _given_prompts(
    recipe: Recipe, dialogue: Dialogue, counts: dict[str, Counts], columns: dict[str, dict[str, Any]]
) -> dict[str, list[Prompt]]:
    """The prompts that the recipe names, by their key, shuffled by the seed; ``columns`` gets theirs."""
    data = recipe.data
    given: dict[str, list[Prompt]] = {}
    for key in ("prompts", "held_out_prompts"):
        specs = getattr(data, key)
        if specs:
            found, counts[key] = read_prompts(
                specs, on_bad_rows=data.on_bad_rows, key=f"data.{key}", refuses=dialogue.refusal,
                columns=data.prompt_columns, kept=columns,
            )  # fmt: skip
            random.Random(f"{recipe.seed}:{key}").shuffle(found)
            given[key] = within_prompt_limit(found, lambda p: p, recipe, dialogue, counts[key])
            if not given[key]:
                raise UserError(f"data.{key}: nothing usable in {', '.join(specs)}: {counts[key]}")
    return given


def _comparisons(
    recipe: Recipe,
    run: StageRun,
    dialogue: Dialogue,
    given: dict[str, list[Prompt]],
    counts: dict[str, Counts],
) -> list[Comparison]:
    """What ``data.comparisons`` asks for, read or sampled, at most ``data.limit`` of them."""
    data = recipe.data
    if data.sampled:
        found, counts["comparisons"] = sampled_comparisons(recipe, run, dialogue, given["prompts"])
        found = deduplicate(found, counts["comparisons"])
    else:
        found = _read("comparisons", recipe, dialogue, counts)
    found = at_most(found, data.limit, recipe.seed, counts["comparisons"], "data.limit")
    _check_some("comparisons", found, recipe, counts)
    return found


def _rankings(
    recipe: Recipe, train: Sequence[Comparison], lines: list[str], counts: Counts
) -> tuple[list[Comparison], dict[str, Any]]:
    """The training part as rankings, and their counts; a line about them is added."""
    data = recipe.data
    found, made = as_rankings(train, data.rankings or 2, data.ranking_passes, recipe.seed)
    if not found:
        raise UserError(f"data.rankings: the votes of all {len(train)} comparisons cancel out; remove it")
    lines.append(str(made))
    if once := counts.dropped.get(DUPLICATE):
        lines.append(
            f"data.rankings: {once:,} repeated rows count once; data.repeats=votes counts each as a vote"
        )
    return found, made.as_dict()


def _read(name: str, recipe: Recipe, dialogue: Dialogue, counts: dict[str, Counts]) -> list[Comparison]:
    """The comparisons of ``data.<name>`` whose prompts fit; notes what became of the others."""
    data = recipe.data
    found, counts[name] = read_comparisons(
        getattr(data, name),
        on_bad_rows=data.on_bad_rows,
        key=f"data.{name}",
        refuses=dialogue.refusal,
        columns=data.columns,
        repeats=data.repeats,
    )
    return within_prompt_limit(found, lambda c: c.prompt, recipe, dialogue, counts[name])


def _decided(
    part: list[Comparison], name: str, recipe: Recipe, counts: dict[str, Counts]
) -> list[Comparison]:
    """The part with the votes on each pair as one comparison, where the recipe has votes."""
    if recipe.data.repeats == "once":
        return part
    found = decided(part, counts[name])
    _check_some(name, found, recipe, counts)
    return found


def _check_some(name: str, found: Sequence[Comparison], recipe: Recipe, counts: dict[str, Counts]) -> None:
    if not found:
        specs = ", ".join(getattr(recipe.data, name))
        raise UserError(f"data.{name}: nothing usable in {specs}: {counts[name]}")


def _parts(
    recipe: Recipe, dialogue: Dialogue, comparisons: list[Comparison], counts: dict[str, Counts]
) -> tuple[list[Comparison], list[Comparison], list[str]]:
    """(train, held out, lines to say): the recipe's split, or its own test files."""
    data = recipe.data
    if data.held_out_comparisons:
        held_out = _read("held_out_comparisons", recipe, dialogue, counts)
        held_out = _decided(held_out, "held_out_comparisons", recipe, counts)
        _check_some("held_out_comparisons", held_out, recipe, counts)
        return comparisons, held_out, check_apart(comparisons, held_out, data.allow_overlap)
    try:
        train, held_out, lines = split_comparisons(comparisons, data.split_by, data.held_out, recipe.seed)
    except UserError as error:
        if not counts["comparisons"].dropped:
            raise
        raise UserError(f"{error} ({counts['comparisons']})") from None
    return train, _decided(held_out, "comparisons", recipe, counts), lines


def _bounded(
    part: list[Comparison], name: str, recipe: Recipe, counts: dict[str, Counts]
) -> list[Comparison]:
    """Comparisons of at most :data:`MOST_RESPONSES` responses; others are refused, or counted under "skip".

    Raises:
        UserError: one is longer, or nothing is left.
    """
    long = [c for c in part if len(c.responses) > MOST_RESPONSES]
    if not long:
        return part
    if recipe.data.on_bad_rows == "stop":
        start = " ".join(long[0].prompt[-1].content.split())[:60]
        raise UserError(
            f"data.{name}: a comparison of {len(long[0].responses):,} responses (to {start!r}...), more than "
            f"{MOST_RESPONSES}: deal them into rankings to train on (data.rankings=9), give fewer, or set "
            "data.on_bad_rows=skip"
        )
    counts[name].drop(f"more than {MOST_RESPONSES} responses", len(long))
    left = [c for c in part if len(c.responses) <= MOST_RESPONSES]
    _check_some(name, left, recipe, counts)
    return left


def _held_out_prompts(
    given: list[Prompt] | None,
    train: Sequence[Comparison],
    held_out: Sequence[Comparison],
    prompts: Sequence[Prompt],
    counts: dict[str, Counts],
) -> tuple[list[Prompt], bool]:
    """Held-out prompts that are no training prompts, and whether there are none so that all of them stand.

    Comparisons that share their prompts still teach a reward model; prompts that the recipe gives are there
    to be new ones.

    Raises:
        UserError: every given one is also a training prompt.
    """
    train_keys = {prompt_key(p) for p in prompts} | {prompt_key(c.prompt) for c in train}
    found = given or _distinct(held_out)
    apart = [p for p in found if prompt_key(p) not in train_keys]
    if not apart and given:
        raise UserError("data.held_out_prompts: every one is also a training prompt; give other ones")
    if not apart:
        return found, True
    if len(apart) < len(found):
        counts.setdefault("held_out_prompts", Counts(read=len(found))).drop(
            "also among the training prompts", len(found) - len(apart)
        )
    return apart, False


def _distinct(comparisons: Sequence[Comparison]) -> list[Prompt]:
    return list({prompt_key(c.prompt): c.prompt for c in comparisons}.values())
