"""From outcomes to ``tax.json``: every variant on every task, each against the reference on the same items.

A difference is variant less reference, item by item, so its interval is that of paired items. A gain is that
difference with the sign turned where lower is better: positive is better than the reference in every task.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from policy.alignment_tax.models import ModelVariant, tokenizer_hash, variant_hash
from rlhf.evals.outcome import Outcome, paired
from rlhf.recipe.load import Recipe
from rlhf.recipe.stored import modernized
from rlhf.recipe.tax import Tax
from rlhf.runs.stage import input_hashes
from rlhf.stats.tests import sign_test

Figures = dict[str, Any]
Outcomes = dict[str, dict[str, Outcome]]
"""By task, by variant."""
VERDICTS = ("better", "worse", "open")
"""Of a gain: significantly above 0, below 0, or neither."""
LEVEL = 0.05  # of the sign test
PER_TOKEN = ("nats_per_token", "perplexity of lm_loss")
"""What models with other tokens do not share."""
_GRADES = {0.0, 0.5, 1.0}  # wrong, tied, right
_SCORE = ("judge", "reward_model", "prompts", "samples_per_prompt", "temperature")
_SHOWN = ("torch", "transformers", "lm-eval")


def table_of(recipe: Recipe, section: Tax, variants: Sequence[ModelVariant], outcomes: Outcomes) -> Figures:
    """All entries of ``tax.json`` but cost, picture and the reward model's HHH row."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "reference": section.reference,
        "variants": [
            {
                "name": variant.name,
                "what": variant.what,
                "base": variant.base,
                "adapters": [list(adapter) for adapter in variant.adapters],
                "prompted": variant.prompted,
                "sha256": variant_hash(variant, recipe),
            }
            for variant in variants
        ],
        "tasks": [task_figures(by_variant, section.reference) for by_variant in outcomes.values()],
        "reward_model_hhh": None,
        "groups_shown": section.groups_shown,
        "evaluate": score_settings(recipe) if section.score else None,
        "notes": _notes(recipe, section, variants),
        "files": {name: input_hashes(task.files) for name, task in section.tasks.items()},
        "versions": {name: importlib.metadata.version(name) for name in _SHOWN if _installed(name)},
    }


def score_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of the section `evaluate` that the task `score` uses."""
    return {key: value for key, value in recipe.evaluate.model_dump(mode="json").items() if key in _SCORE}


def same_score_settings(noted: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a ``tax.json``, of an earlier version perhaps, was made with the settings that a recipe has."""
    former = modernized({"evaluate": noted})["evaluate"]
    return {key: former.get(key) for key in _SCORE} == score_settings(recipe)


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _notes(recipe: Recipe, section: Tax, variants: Sequence[ModelVariant]) -> list[str]:
    """What a reader must know of the variants."""
    notes = [
        "the intervals are over items: every arm is one training run, and how far another seed of the same "
        "training would be from it is not in them"
    ]
    reference = next(variant for variant in variants if variant.name == section.reference)
    foreign = [variant.name for variant in variants if tokenizer_hash(variant) != tokenizer_hash(reference)]
    if foreign:
        notes.append(
            f"{', '.join(foreign)}: another tokenizer than {reference.name}; figures per token "
            f"({', '.join(PER_TOKEN)}) are not comparable with it, those per byte, word and answer are"
        )
    if any(variant.prompted for variant in variants):
        notes.append(
            f"prompted arms read {recipe.hhh_prompt} before every item; the prompts of `score` follow it as "
            "a new turn"
        )
    return notes


# ---------------------------------------------------------------- figures of one task


def task_figures(outcomes: Mapping[str, Outcome], reference: str) -> Figures:
    """One task's part of the table.

    Args:
        outcomes: by variant, the reference among them, all of one task.
        reference: the variant that the others are compared with.

    Returns:
        The task's settings, ``variants`` with each variant's figures, ``differences`` with each other
        variant's, all of it fit for JSON.
    """
    base = outcomes[reference]
    return {
        "task": base.task,
        "metric": base.metric,
        "higher_is_better": base.higher_is_better,
        "chance": base.chance,
        "items": len(base.ids),
        "groups": {group: base.groups.count(group) for group in dict.fromkeys(base.groups) if group},
        "notes": list(dict.fromkeys(note for o in outcomes.values() for note in o.notes)),
        "variants": {variant: variant_figures(outcome) for variant, outcome in outcomes.items()},
        "differences": {
            variant: difference(base, outcome)
            for variant, outcome in outcomes.items()
            if variant != reference
        },
    }


def variant_figures(outcome: Outcome) -> Figures:
    """One variant on one task: its headline with interval, all metrics, groups and aggregates."""
    return {
        **outcome.mean().as_dict(),
        "metrics": {metric: outcome.mean(metric).as_dict() for metric in outcome.values},
        "groups": {group: estimate.as_dict() for group, estimate in outcome.by_group().items()},
        "aggregate": dict(outcome.aggregate),
    }


def difference(reference: Outcome, other: Outcome) -> Figures:
    """A variant against the reference, on the items that both have.

    Returns:
        ``diff`` and ``ci95`` in units of the metric, variant less reference; ``gain`` and ``gain_ci95``,
        positive = better; ``verdict``, one of :data:`VERDICTS`; ``wins``, ``ties`` and ``losses``, item by
        item, and ``p_sign``, the sign test of wins against losses; ``unpaired``, items of one of the two
        only; the differences of the other metrics (without a direction) and of the groups.
    """
    theirs = set(other.ids)
    ids = [i for i in reference.ids if i in theirs]
    before, after = on_items(reference, ids), on_items(other, ids)
    members: dict[str, list[str]] = {}
    for name, group in zip(before.ids, before.groups, strict=True):
        members.setdefault(group, []).append(name)
    return {
        **_gain(before, after),
        "unpaired": len(set(reference.ids) ^ theirs),
        "metrics": {
            metric: {key: paired(before, after, metric)[key] for key in ("diff", "ci95", "n")}
            for metric in before.values
            if metric != before.metric and metric in after.values
        },
        "groups": {
            group: _gain(on_items(before, some), on_items(after, some))
            for group, some in (members if any(members) else {}).items()
        },
    }


def on_items(outcome: Outcome, ids: list[str]) -> Outcome:
    """An outcome cut down to some of its items, in the order given."""
    place = {name: index for index, name in enumerate(outcome.ids)}
    at = [place[name] for name in ids]
    return dataclasses.replace(
        outcome,
        ids=ids,
        groups=[outcome.groups[i] for i in at],
        values={metric: [values[i] for i in at] for metric, values in outcome.values.items()},
    )


def _gain(before: Outcome, after: Outcome) -> Figures:
    change = paired(before, after)
    sign = 1.0 if before.higher_is_better else -1.0
    gain = None if change["diff"] is None else sign * change["diff"]
    ends = None if change["ci95"] is None else sorted(sign * end for end in change["ci95"])
    p_sign = sign_test(change["wins"], change["losses"])
    graded = {*before.values[before.metric], *after.values[before.metric]} <= _GRADES
    return {
        **{key: change[key] for key in ("diff", "ci95", "n", "wins", "ties", "losses")},
        "gain": gain,
        "gain_ci95": ends,
        "p_sign": p_sign,
        "verdict": verdict(ends, p_sign if graded else None),
    }


def verdict(gain_ci95: Sequence[float] | None, p_sign: float | None = None) -> str:
    """Whether a gain is better or worse than none, or open.

    It is open without an interval, with one that touches 0 or has no width (items that all changed by the
    same amount do not show how far they vary), and with p_sign at :data:`LEVEL` or above.

    Args:
        gain_ci95: the ends of its interval.
        p_sign: of the sign test, where items are right or wrong: few of them change then, for which the
            normal interval is too narrow.
    """
    if gain_ci95 is None or gain_ci95[0] <= 0 <= gain_ci95[1] or gain_ci95[0] == gain_ci95[1]:
        return "open"
    if p_sign is not None and p_sign >= LEVEL:
        return "open"
    return "better" if gain_ci95[0] > 0 else "worse"


def verdicts(tasks: Sequence[Figures], variant: str) -> dict[str, list[str]]:
    """The tasks on which a variant is better or worse than the reference, or neither."""
    found: dict[str, list[str]] = {name: [] for name in VERDICTS}
    for task in tasks:
        if variant in task["differences"]:
            found[task["differences"][variant]["verdict"]].append(task["task"])
    return found


def item_rows(outcomes: Mapping[str, Outcome]) -> list[Figures]:
    """One entry an item: task, id, group, and every metric's value by variant."""
    rows: dict[str, Figures] = {}
    for variant, outcome in outcomes.items():
        for index, name in enumerate(outcome.ids):
            entry = {"task": outcome.task, "id": name, "group": outcome.groups[index], "values": {}}
            row = rows.setdefault(name, entry)
            for metric, values in outcome.values.items():
                row["values"].setdefault(metric, {})[variant] = values[index]
    return list(rows.values())
