"""The learning curve of the linear probe: does more of these comparisons help, and by how much?

A reward model would have to be trained once for every number; the probe on the frozen base's states costs one
pass over the texts. ``_R`` response, ``_N`` pair, ``_D`` hidden unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from reward.card.baselines import best_penalty, fit_pairs
from reward.card.calibration import labelled_pairs, right
from reward.card.clusters import clusters
from reward.model.batch import Example, encode
from reward.model.forward import last_states, read_examples
from reward.model.model import new_reward_model
from rlhf.data.comparisons import Comparison, Counts, drawn
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.stage import RUNS, StageRun
from rlhf.stats import clustered
from rlhf.stats.clustered import Floats
from rlhf.tokenization.dialogue import load_dialogue


def check_curve(recipe: Recipe) -> None:
    """What can be said against ``card.curve`` before anything is loaded.

    Raises:
        UserError: there are no training comparisons of this run, or fewer than asked for.
    """
    file = RUNS / recipe.name / "comparisons" / "train.jsonl"
    if not file.is_file():
        raise UserError(
            f"card.curve: {file} is not there; run make comparisons for this recipe, or remove card.curve"
        )
    with file.open("rb") as lines:
        found = sum(1 for line in lines if line.strip())
    if max(recipe.card.curve) > found:
        raise UserError(
            f"card.curve: {max(recipe.card.curve)} of {found} training comparisons; ask for {found} at most"
        )


def learning_curve(recipe: Recipe, run: StageRun, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Points of the curve and the line through them; what is done survives an interruption."""
    check_curve(recipe)
    found: dict[str, Any] = run.remember("curve", lambda: _curve(recipe, comparisons))
    return found


def _curve(recipe: Recipe, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    train = read_native(RUNS / recipe.name / "comparisons" / "train.jsonl", "stop", Counts())
    train = drawn(train, max(recipe.card.curve), recipe.seed)  # fewer are a beginning of more
    dialogue = load_dialogue(recipe, recipe.reward.max_response_tokens)
    model = new_reward_model(recipe, dialogue)  # its adapter changes nothing yet

    def states(some: Sequence[Comparison]) -> tuple[list[Comparison], list[Example], Floats]:
        whole = [(c, e) for c in some for e in encode([c], dialogue)]
        kept, examples = [c for c, _ in whole], [e for _, e in whole]
        if not examples:
            raise UserError(
                "card.curve: the cut leaves no responses that differ; raise the limits of dialogue"
            )
        x_RD = read_examples(model, examples, dialogue.pad_id, last_states, share=False, name="curve")
        return kept, examples, x_RD.double().numpy()

    kept, train_examples, x_RD = states(train)
    held_out, examples, y_RD = states(comparisons)
    scale_D = np.maximum(x_RD.std(axis=0), 1e-6)
    x_ND, train_of_N = _differences(train_examples, x_RD / scale_D)
    y_ND, of_N = _differences(examples, y_RD / scale_D)
    cluster_C, cluster_N = clusters(kept).of_C, clusters(held_out).of_C[of_N]
    points = []
    for number in sorted(set(recipe.card.curve)):
        inside = train_of_N < number
        random = np.random.default_rng(recipe.seed % 2**63)
        penalty = best_penalty(x_ND[inside], cluster_C[train_of_N[inside]], random)
        right_N = right(y_ND @ fit_pairs(x_ND[inside], penalty))
        accuracy = clustered.share(right_N, cluster_N).as_dict()
        points.append({"comparisons": number, **accuracy, "pairs": int(right_N.size), "penalty": penalty})
    return with_line(points)


def _differences(examples: Sequence[Example], states_RD: Floats) -> tuple[Floats, Any]:
    """State of the better less that of the worse response of every pair, and its comparison."""
    better_N, worse_N, comparison_N = labelled_pairs([e["ranks"] for e in examples])
    return states_RD[better_N] - states_RD[worse_N], comparison_N


def with_line(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The points with their accuracy on the least-squares line in log2 N, ``fitted``, and that line.

    Bai 2022, section 3.2, finds the accuracy of preference models about linear in the logarithm of the number
    of comparisons. ``fit`` has ``per_doubling``, the slope, and is None with fewer than two numbers.
    """
    x = np.array([math.log2(p["comparisons"]) for p in points])
    if len(points) < 2:
        return {"points": [{**p, "fitted": None} for p in points], "fit": None}
    slope, start = np.polyfit(x, [p["mean"] for p in points], 1)
    line = [float(start + slope * at) for at in x]
    fitted = [{**p, "fitted": y} for p, y in zip(points, line, strict=True)]
    return {"points": fitted, "fit": {"per_doubling": float(slope), "at_one": float(start)}}
