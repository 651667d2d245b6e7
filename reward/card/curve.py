"""The learning curve: does more of these comparisons help, and by how much?

The probe on the frozen base's states costs one pass over the texts; the reward model is trained once for
every number. ``_R`` response, ``_N`` pair, ``_D`` hidden unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reward.card.baselines import best_penalty, fit_pairs
from reward.card.calibration import labeled_pairs, right
from reward.card.clusters import clusters
from reward.card.scorers import load_scorer
from reward.model.batch import Example, encode
from reward.model.ensemble import MODEL
from reward.model.forward import last_states, read_examples
from reward.model.model import new_reward_model
from reward.training.run import run as train_reward_model
from rlhf.data.comparisons import Comparison, Counts, drawn
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import MANIFEST, read_json
from rlhf.runs.initial_adapter import start_files, start_parents
from rlhf.runs.stage import RUNS, StageRun, open_stage
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
    found = _training_comparisons(recipe)
    if max(recipe.card.curve) > found:
        raise UserError(
            f"card.curve: {max(recipe.card.curve)} of {found} training comparisons; ask for {found} at most"
        )


def _training_comparisons(recipe: Recipe) -> int:
    with (RUNS / recipe.name / "comparisons" / "train.jsonl").open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def learning_curve(recipe: Recipe, run: StageRun, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Points of the curve and the line through them; what is done survives an interruption."""
    check_curve(recipe)
    of = recipe.card.curve_of
    if of == "reward":
        run.say(f"card: {how_long(recipe)}")
    make = _of_reward_models if of == "reward" else _of_probes
    found: dict[str, Any] = run.remember("curve", lambda: {"of": of, **make(recipe, comparisons)})
    return found


def how_long(recipe: Recipe) -> str:
    """What the curve of the reward model costs, judged by the run's own reward stage."""
    numbers = sorted(set(recipe.card.curve))
    said = (
        f"card.curve_of=reward: trains a reward model on {', '.join(f'{n:,}' for n in numbers)} comparisons"
    )
    manifest = RUNS / recipe.name / "reward" / MANIFEST
    if not manifest.is_file():
        return f"{said}; how long is not known before make reward"
    whole = _training_comparisons(recipe)
    of_stage = min(whole, recipe.reward.limit or whole)
    minutes = float(read_json(manifest)["seconds"]) / 60 * sum(numbers) / of_stage
    return f"{said}; about {minutes:.0f} min, as make reward took for {of_stage:,}"


def _of_reward_models(recipe: Recipe, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    better_N, worse_N, comparison_N = labeled_pairs([c.ranks for c in comparisons])
    cluster_N = clusters(comparisons).of_C[comparison_N]
    texts = [(c.prompt, r) for c in comparisons for r in c.responses]
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    points = []
    for number in sorted(set(recipe.card.curve)):
        scorer = load_scorer(str(_trained(recipe, number)), recipe)
        scores_R = scorer.score(*map(list, zip(*distinct, strict=True)))[[place[text] for text in texts]]
        right_N = right(scores_R[better_N] - scores_R[worse_N])
        accuracy = clustered.share(right_N, cluster_N).as_dict()
        points.append({"comparisons": number, **accuracy, "pairs": int(right_N.size)})
    return with_line(points)


def _trained(recipe: Recipe, number: int) -> Path:
    """The reward model of the recipe on so many comparisons, trained unless it is there."""
    section = recipe.reward
    probe = section.probe if section.head_init == "probe" or section.layers == "auto" else False
    own = section.model_copy(update={"limit": number, "members": 1, "probe": probe})
    small, stage = recipe.model_copy(update={"reward": own}), f"curve-{number}"
    pretrained = ("pmp",) if recipe.pmp and not section.start else ()
    parents = ("comparisons", *pretrained, *start_parents(recipe, "reward"))
    run = open_stage(small, stage, section="reward", parents=parents, inputs=start_files(recipe, "reward"))
    if run is not None:
        run.finish(train_reward_model(small, run))
    return RUNS / recipe.name / stage / MODEL


def _of_probes(recipe: Recipe, comparisons: Sequence[Comparison]) -> dict[str, Any]:
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
    better_N, worse_N, comparison_N = labeled_pairs([e["ranks"] for e in examples])
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
