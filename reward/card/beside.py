"""What stands beside the model's accuracy, from its run: bag of words, probe, ceilings. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from reward.card.baselines import fit_bag_of_words
from reward.card.ceiling import annotator_agreement, duplicate_agreement, from_manifest
from rlhf.data.comparisons import Comparison, Counts, drawn
from rlhf.data.readers import stream_comparisons
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import MANIFEST, read_json
from rlhf.runs.stage import RUNS, StageRun
from rlhf.stats.clustered import Indices
from rlhf.stats.intervals import Z95, Estimate

MOST_READ = 300_000  # comparisons looked through for pairs that were judged again


def bag_of_words(
    recipe: Recipe, run: StageRun, train_file: Path, comparisons: Sequence[Comparison]
) -> dict[str, Any] | None:
    """Scores of all responses by a bag of words of the training comparisons, and what it is; None without.

    Of this run's own model it is fitted on what the reward stage trained on (``reward.limit``).
    """
    if not train_file.is_file():
        return None

    def fit() -> dict[str, Any] | None:
        train = read_native(train_file, "stop", Counts())
        if not recipe.card.model:
            train = drawn(train, recipe.reward.limit, recipe.seed)
        bag = fit_bag_of_words(train, seed=recipe.seed)
        if bag is None:
            return None
        scores = bag.scores([r for c in comparisons for r in c.responses]).tolist()
        about = {"words": len(bag.vocabulary), "pairs": bag.pairs, "penalty": bag.penalty}
        return {"scores": scores, "about": {**about, "comparisons": len(train)}}

    found: dict[str, Any] | None = run.remember("bag-of-words", fit)
    return found


def probe_of(recipe: Recipe, accuracy: dict[str, Any]) -> dict[str, Any] | None:
    """The reward stage's probes, where the card is about its model on its own held-out comparisons.

    accuracy: of the model. ``last`` is the last layer at the last token, ``best`` the one that
    cross-validation chose, with ``layer`` and ``pooling``; ``adds_last`` and ``adds_best`` are the model's
    accuracy minus theirs, with the errors of both as if they were independent: the pairs of the probe are not
    kept, and as both are right on the same easy pairs the interval is too wide.
    """
    if recipe.card.model or recipe.card.comparisons:
        return None
    results = _results(recipe, "reward")
    found: dict[str, Any] = {}
    if last := from_manifest(results.get("probe_accuracy")):
        found |= {"last": last, "adds_last": unpaired(accuracy, last)}
    best = results.get("probe_best")
    if isinstance(best, dict) and (figure := from_manifest(best.get("accuracy"))):
        where = {name: best.get(name) for name in ("layer", "pooling")}
        found |= {"best": {**figure, **where}, "adds_best": unpaired(accuracy, figure)}
    return found or None


def unpaired(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """First minus second figure, the errors added as those of independent figures."""
    if first["mean"] is None or second["mean"] is None:
        return Estimate(math.nan, math.nan, math.nan, 0).as_dict()
    difference, n = first["mean"] - second["mean"], min(first["n"], second["n"])
    if first["ci95"] is None or second["ci95"] is None:
        return Estimate(difference, math.nan, math.nan, n).as_dict()
    errors = [(f["ci95"][1] - f["ci95"][0]) / (2 * Z95) for f in (first, second)]
    half = Z95 * float(np.hypot(*errors))
    return Estimate(difference, difference - half, difference + half, n).as_dict()


def ceiling_of(recipe: Recipe, comparisons: Sequence[Comparison], of_C: Indices) -> dict[str, Any]:
    """How well anybody could do, by three measures; None where the data do not say."""
    own = not recipe.card.comparisons
    noise = from_manifest(_results(recipe, "comparisons").get("noise_ceiling")) if own else None
    return {
        "annotators": annotator_agreement(comparisons, of_C),
        "duplicates": _duplicates(recipe),
        "noise": noise,
    }


def _duplicates(recipe: Recipe) -> dict[str, Any] | None:
    """Agreement of repeated judgements in the files that the comparisons came from, if those are there."""
    data = recipe.data
    own = [*([] if data.sampled else data.comparisons), *data.held_out_comparisons]
    files = recipe.card.comparisons or own
    files = [file for file in files if not str(file).startswith("hub:")]
    if not files:
        return None
    rows = stream_comparisons(files, on_bad_rows="skip", counts=Counts())
    try:
        return duplicate_agreement(islice(rows, MOST_READ))
    except UserError:  # a run outlives the files it was made from
        return None


def _results(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What a stage of the run has in its manifest."""
    path = RUNS / recipe.name / stage / MANIFEST
    return dict(read_json(path)["results"]) if path.is_file() else {}
