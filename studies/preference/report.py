"""study.json and study.md of this study; and its plots by claim."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.markdown import table
from studies.engine import report
from studies.engine.results import Results
from studies.preference.measure import from_text

PLOTS = {
    1: ("versus.png", "Accuracy on ranked and binary pairs against the size of the model"),
    3: ("transfer.png", "Accuracy against the number of finetuning pairs (claims 3 and 4)"),
    11: ("calibration.png", "Observed against promised agreement"),
    12: ("sets.png", "Held-out loss over the one pass"),
}


def models(results: Results) -> list[dict[str, Any]]:
    """The parameters of every size."""
    names = {"matrices": "matrix_weights", "non_embedding": "non_embedding_parameters", "total": "parameters"}
    return [
        {"layers": layers} | {name: results.all("lm", layers=layers)[0][key] for name, key in names.items()}
        for layers in results.values("lm", "layers")
    ]


def short(result: dict[str, Any]) -> dict[str, Any]:
    """A unit's result without the credit of every single pair: their mean instead."""
    kept = dict(result)
    if "credits" in kept:
        kept["accuracy"] = {k: float(from_text(v).mean()) for k, v in kept.pop("credits").items()}
    if "credit" in kept:
        kept["accuracy"] = float(from_text(kept.pop("credit")).mean())
    if "held_out_losses" in kept:
        kept["held_out_loss"] = float(np.mean(kept.pop("held_out_losses")))
    return kept


def page(content: report.Content) -> str:
    """The study as one Markdown page."""
    counts = {
        "layers": "L",
        "matrices": "weights of the layers, 196,608 L^3",
        "non_embedding": "with biases and norms",
        "total": "with embeddings and head",
    }
    return report.page(
        content,
        PLOTS,
        title="Preference-modelling claims on a small ladder of models",
        intro="Transformers trained from scratch on sentences of a small grammar whose quality is known. "
        "They test the shape of the papers' claims, not their values: the largest model here is smaller than "
        "the smallest there.",
        seeds="another rule, other data, other weights",
        models=[
            "## Models and data",
            "GPT-2 blocks of width 128 L, L layers, heads of 64, without dropout; a scalar head reads the "
            "score at END.",
            table(
                (
                    "L",
                    "weights of the layers, 196,608 L^3",
                    "with biases and norms",
                    "with embeddings and head",
                ),
                [[f"{m[name]:,}" for name in counts] for m in content["models"]],
            ),
            "A sentence: START, one of 6 topics, 7 words (of 32) and 0 to 3 fillers (of 6) in random order, "
            "END. A random half of the words fits each topic; quality = how many of the 7 fit, P(q) = (q + "
            "1) / 36. Words differ in frequency, whether they fit or not. Both sides of a pair have one "
            f"topic. Every model of a size and seed starts from one language model of "
            f"{content['plan']['sentences']:,} sentences. Training and test sentences are disjoint by "
            "construction.",
        ],
        end="Sizes, learning rates and the grammar were chosen on a seed that is no part of the study; "
        "nothing was changed after its own seeds had been run.",
    )
