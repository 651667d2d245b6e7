"""What stands beside the model's accuracy, from its run: bag of words, probe, ceilings. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from reward.card.baselines import fit_bag_of_words
from reward.card.ceiling import annotator_agreement, duplicate_agreement, from_manifest
from rlhf.data.comparisons import Comparison, Counts, drawn, prompt_key
from rlhf.data.readers import stream_comparisons
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import MANIFEST, PROBE_SCORES, read_json, read_jsonl
from rlhf.runs.stage import RUNS, StageRun
from rlhf.stats.clustered import Floats, Indices

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


def probe_scores(recipe: Recipe, comparisons: Sequence[Comparison]) -> dict[str, Floats]:
    """The scores of all responses by the reward stage's probes, NaN where they are not known.

    ``last`` is the last layer at the last token, ``best`` the layer and pooling that cross-validation chose.
    They are there where the card is about this run's model on its own held-out comparisons.
    """
    file = RUNS / recipe.name / "reward" / PROBE_SCORES
    if recipe.card.model or recipe.card.comparisons or not file.is_file():
        return {}
    rows = list(read_jsonl(file))
    texts = [(prompt_key(c.prompt), r) for c in comparisons for r in c.responses]
    found = {}
    for name in ("last", "best"):
        known = {
            (row["prompt"], r): x
            for row in rows
            for r, x in zip(row["responses"], row.get(name, ()), strict=False)
        }
        if known:
            found[name] = np.array([known.get(text) for text in texts], dtype=np.float64)
    return found


def best_probe(recipe: Recipe) -> dict[str, Any]:
    """Layer and pooling of the reward stage's best probe."""
    best = _results(recipe, "reward").get("probe_best") or {}
    return {name: best.get(name) for name in ("layer", "pooling")}


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
    """Agreement of repeated judgments in the files that the comparisons came from, if those are there."""
    data = recipe.data
    own = [*([] if data.sampled else data.comparisons), *data.held_out_comparisons]
    files = recipe.card.comparisons or own
    files = [file for file in files if not str(file).startswith("hub:")]
    if not files:
        return None
    columns = recipe.card.columns if recipe.card.comparisons else data.columns
    rows = stream_comparisons(files, on_bad_rows="skip", counts=Counts(), columns=columns)
    try:
        return duplicate_agreement(islice(rows, MOST_READ))
    except UserError:  # a run outlives the files it was made from
        return None


def _results(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What a stage of the run has in its manifest."""
    path = RUNS / recipe.name / stage / MANIFEST
    return dict(read_json(path)["results"]) if path.is_file() else {}
