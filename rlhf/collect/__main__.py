"""The `comparisons` stage: read or sample comparisons, check them, split them by prompt.

``python -m rlhf.collect RECIPE [section.key=value ...]`` writes, under ``runs/<name>/comparisons/``:
``train.jsonl`` and ``held_out.jsonl`` (comparisons), ``prompts.jsonl`` and ``held_out_prompts.jsonl``
(what PPO and the evaluation start from). No prompt is on both sides.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf.data.comparisons import (
    Comparison,
    Counts,
    Message,
    Prompt,
    deduplicate,
    prompt_key,
    split_by_prompt,
    write_native,
)
from rlhf.data.prompts import read_prompts
from rlhf.data.readers import read_comparisons
from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import Recipe, from_command_line
from rlhf.runs.artifacts import write_atomically
from rlhf.runs.stage import StageRun, open_stage
from rlhf.stats.intervals import cluster_mean_interval

if TYPE_CHECKING:
    from rlhf.tokenization.dialogue import Dialogue


def collect(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Do the stage's work; returns the figures for the manifest."""
    from rlhf.tokenization.dialogue import load_dialogue

    dialogue = load_dialogue(recipe)
    data = recipe.data
    counts: dict[str, Counts] = {}
    given: dict[str, list[Prompt]] = {}
    for key in ("prompts", "held_out_prompts"):
        specs = getattr(data, key)
        if specs:
            found, counts[key] = read_prompts(specs, on_bad_rows=data.on_bad_rows, key=f"data.{key}")
            random.Random(f"{recipe.seed}:{key}").shuffle(found)
            given[key] = fitting(found, lambda p: p, recipe, dialogue, counts[key])
            if not given[key]:
                raise UserError(f"data.{key}: nothing usable in {', '.join(specs)}: {counts[key]}")
    if data.sampled:
        from rlhf.collect.simulated import sampled_comparisons

        comparisons, counts["comparisons"] = sampled_comparisons(recipe, run, dialogue, given["prompts"])
        comparisons = deduplicate(comparisons, counts["comparisons"])
    else:
        comparisons, counts["comparisons"] = read_comparisons(data.comparisons, on_bad_rows=data.on_bad_rows)
        comparisons = fitting(comparisons, lambda c: c.prompt, recipe, dialogue, counts["comparisons"])
    if data.limit and len(comparisons) > data.limit:
        counts["comparisons"].drop("beyond data.limit", len(comparisons) - data.limit)
        comparisons = random.Random(recipe.seed).sample(comparisons, data.limit)
    if not comparisons:
        raise UserError(
            f"data.comparisons: nothing usable in {', '.join(data.comparisons)}: {counts['comparisons']}"
        )
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
    _write_prompts(run, "prompts.jsonl", prompts)
    _write_prompts(run, "held_out_prompts.jsonl", apart)
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
        from rlhf.collect.simulated import noise_ceiling

        ceiling = cluster_mean_interval(*noise_ceiling(recipe.collect.judge, held_out))
        results["noise_ceiling"] = ceiling.as_dict()
    print(
        f"comparisons: {len(train)} to train on, {len(held_out)} held out; "
        f"{len(prompts)} prompts for PPO, {len(apart)} held out",
        flush=True,
    )
    return results


def fitting(
    items: Sequence[Any], prompt_of: Any, recipe: Recipe, dialogue: Dialogue, counts: Counts
) -> list[Any]:
    """Items whose prompt is within the limit; a longer one stops the run or is counted."""
    from rlhf.tokenization.dialogue import PromptTooLongError

    kept = []
    for item in items:
        try:
            dialogue.encode_prompt(prompt_of(item))
        except PromptTooLongError as error:
            if recipe.dialogue.on_long_prompts != "skip":
                start = prompt_of(item)[-1].content[:60]
                raise UserError(
                    f"{error} (it ends in the turn {start!r}...): raise the limit, or set "
                    "dialogue.on_long_prompts=skip or truncate"
                ) from None
            counts.drop("prompt longer than dialogue.max_prompt_tokens")
            continue
        kept.append(item)
    return kept


def _distinct(comparisons: Sequence[Comparison]) -> list[Prompt]:
    return list({prompt_key(c.prompt): c.prompt for c in comparisons}.values())


def _write_prompts(run: StageRun, name: str, prompts: Sequence[Prompt]) -> None:
    lines = [
        json.dumps({"messages": [{"role": m.role, "content": m.content} for m in p]}, ensure_ascii=False)
        for p in prompts
    ]
    write_atomically(run.folder / name, "".join(line + "\n" for line in lines))


def stored_prompts(run: StageRun, name: str) -> list[Prompt]:
    """Prompts that the comparisons stage of the same run has written, in their order."""
    text = (run.parent("comparisons") / name).read_text(encoding="utf-8")
    rows = [json.loads(line)["messages"] for line in text.splitlines()]
    return [tuple(Message(m["role"], m["content"]) for m in row) for row in rows]


def main() -> None:
    """The `comparisons` target."""
    recipe = from_command_line()
    data = recipe.data
    run = open_stage(
        recipe,
        "comparisons",
        section="collect",
        inputs=[*data.comparisons, *data.prompts, *data.held_out_prompts],
    )
    if run is not None:
        run.finish(collect(recipe, run))


if __name__ == "__main__":
    exit_on_user_error(main)
