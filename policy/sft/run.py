"""The work of the SFT stage: read, encode, train, save, measure on held-out demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.sft.data import encode
from policy.sft.loss import check_packing, losses
from policy.sft.trainer import new_trainer
from rlhf.data.comparisons import Counts, drawn
from rlhf.data.demonstrations import Demonstration, best_of, read_demonstrations
from rlhf.data.readers.native import read_native
from rlhf.data.split import split_by_prompt
from rlhf.data.stored import within_prompt_limit
from rlhf.errors import UserError
from rlhf.markdown import plain
from rlhf.models.backbone import Backbone
from rlhf.models.base import vocabulary_head
from rlhf.models.packing import with_hidden_states
from rlhf.recipe.load import Recipe
from rlhf.recipe.schema import Sft
from rlhf.runs.initial_adapter import start_folder
from rlhf.runs.processes import check_rows, processes
from rlhf.runs.stage import StageRun
from rlhf.stats.intervals import Estimate, cluster_mean_interval
from rlhf.tokenization.contract import describe
from rlhf.tokenization.dialogue import Dialogue, load_dialogue
from rlhf.training.hf_trainer import adapted_base, save_policy


def fit(recipe: Recipe, section: Sft, run: StageRun) -> dict[str, Any]:
    """Fine-tune the policy's adapter of a recipe; returns the figures for the manifest."""
    dialogue = load_dialogue(recipe)
    parts, counts = demonstrations(recipe, section, run, dialogue)
    train, held_out = (encode(part, dialogue, section.loss_on) for part in parts)
    run.say(f"sft: {len(train)} demonstrations to learn, {len(held_out)} held out")
    check_rows("sft", len(train))
    backbone = new_backbone(recipe, start_folder(recipe, run, "sft"), run.say)
    head = vocabulary_head(recipe, backbone.base)
    model: Any = backbone.model
    packing = section.packing
    if packing and (warning := check_packing(model, [*train, *held_out], dialogue.pad_id)):
        packing = False
        run.say(f"warning: {warning}")
    measured = model, head, held_out, dialogue.pad_id
    before_B = torch.tensor(
        run.remember("before", lambda: [*map(float, losses(*measured, packing=packing)[0])])
    )
    new_trainer(
        recipe, section, dialogue, backbone, train,
        packing=packing, folder=run.folder, on_checkpoint=run.note_clock,
    ).fit()  # fmt: skip
    model.eval()
    after_B, tokens_B = losses(*measured, packing=packing)
    figures = judged(before_B, after_B, tokens_B)
    save_policy(backbone, dialogue, run)
    run.say(summary(figures))
    return figures | {
        "train": len(train),
        "held_out": len(held_out),
        "learned_tokens": section.epochs * sum(sum(row.counts[1:]) for row in train),
        "packed": packing,
        "processes": processes(),
        "counts": counts.as_dict(),
    }


def demonstrations(
    recipe: Recipe, section: Sft, run: StageRun, dialogue: Dialogue
) -> tuple[tuple[list[Demonstration], list[Demonstration]], Counts]:
    """What to learn, and what to measure on; no prompt is on both sides, but for ``data.split_by``.

    Raises:
        UserError: a bad row (file and line), a prompt beyond the limit, or nothing usable.
    """
    counts = Counts()
    if section.chosen:
        folder = run.parent("comparisons")
        train, held_out = (
            [best for c in read_native(folder / f"{part}.jsonl", "stop", counts) for best in best_of(c)]
            for part in ("train", "held_out")
        )
    else:
        found, counts = read_demonstrations(
            section.data, on_bad_rows=recipe.data.on_bad_rows, refuses=dialogue.refusal
        )
        found = within_prompt_limit(found, lambda shown: shown.prompt, recipe, dialogue, counts)
        if not found:
            raise UserError(f"sft.data: nothing usable in {', '.join(section.data)}: {counts}")
        run.say(f"sft: {counts}")
        for line in describe(dialogue, [(shown.prompt, shown.response) for shown in found]):
            run.say(line)
        train, held_out = split_by_prompt(found, recipe.data.held_out, recipe.seed)
    number = min(section.eval_samples, len(held_out))
    return (drawn(train, section.limit, recipe.seed), drawn(held_out, number, recipe.seed)), counts


def new_backbone(recipe: Recipe, start: Path | None = None, say: Callable[[str], None] = print) -> Backbone:
    """The base, which gives its hidden states, with its adapter (:func:`adapted_base`)."""
    backbone = adapted_base(recipe, "sft", start, say)
    with_hidden_states(backbone.base)
    return backbone


def judged(before_B: Tensor, after_B: Tensor, tokens_B: Tensor) -> dict[str, Any]:
    """Held-out loss before and after and its change, nats a learned token, and the perplexities.

    The demonstration is the unit of every interval.

    before_B, after_B: summed negative log-probability of each demonstration. tokens_B: its learned tokens.

    Raises:
        UserError: a loss is not finite, after a training that went wrong.
    """
    if not bool(torch.isfinite(after_B).all()):
        raise UserError(
            "sft: the held-out loss is not finite: the training failed; lower sft.learning_rate, or look at "
            "metrics.jsonl"
        )
    tokens = tokens_B.numpy()
    before, after, change = (
        cluster_mean_interval(x.double().numpy(), tokens) for x in (before_B, after_B, after_B - before_B)
    )
    return {
        "held_out_loss_before": before.as_dict(),
        "held_out_loss": after.as_dict(),
        "held_out_change": change.as_dict(),
        "perplexity_before": _exp(before).as_dict(),
        "perplexity": _exp(after).as_dict(),
        "held_out_tokens": int(tokens.sum()),
    }


def _exp(loss: Estimate) -> Estimate:
    """Perplexity of a loss, the interval's ends alike."""
    mean, low, high = (
        math.exp(min(x, 700.0) if math.isfinite(x) else x) for x in (loss.mean, loss.low, loss.high)
    )
    return Estimate(mean, low, high, loss.n)


def summary(figures: dict[str, Any]) -> str:
    """The figures of :func:`judged` in one line."""
    before, after, change = (
        plain(figures[name], ".3f") for name in ("held_out_loss_before", "held_out_loss", "held_out_change")
    )
    perplexities = " -> ".join(f"{figures[f'perplexity{when}']['mean']:.2f}" for when in ("_before", ""))
    return (
        f"sft: held-out loss {before} -> {after} nats a token, change {change}; perplexity {perplexities}; "
        f"{figures['held_out_loss']['n']} demonstrations, {figures['held_out_tokens']} tokens"
    )
