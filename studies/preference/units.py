"""What each kind of unit does: train one model (or one stage of it), measure it, keep the result.

    lm           language modelling on the corpus; the start of every other model of its size and seed
    versus       a preference model or an imitation of the good side, on the same pairs   (claims 1, 2)
    pmp          preference-model pre-training on the source comparisons, or its control  (claims 3, 4)
    finetune     a preference model on few comparisons of the target                      (claims 3, 4)
    calibration  a preference model on Bradley-Terry labels                               (claim 11)
    sets         ranked sets, one batch element a prompt or shuffled into pairs           (claim 12)

A result depends on the unit's settings and on what it needs, on nothing else. Data depend on the seed and
the purpose alone: models of all sizes and arms see the same sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from studies.engine.training import Schedule, index_stream, train
from studies.engine.units import Settings, Unit, keep, weights_path
from studies.preference import data, losses
from studies.preference.data import Floats, Ints, Pairs, Part, World
from studies.preference.measure import calibration, to_text
from studies.preference.model import Rung, count, make_rung

PURPOSES = ("world", "corpus", "training", "test", "order of the data", "labels")
FINETUNING_POOL = 2000  # the first n of these pairs are the n pairs of a finetuning

DRAW: dict[str, Callable[..., Pairs]] = {"ranked": data.ranked_pairs, "binary": data.binary_pairs}


def random(seed: int, purpose: str, *more: int) -> np.random.Generator:
    """The generator of one purpose: a function of the seed and the purpose, not of what was drawn before."""
    return np.random.default_rng([seed, PURPOSES.index(purpose), *more])


def world_of(seed: int) -> World:
    """The rule and the word frequencies of a seed."""
    return data.make_world(random(seed, "world"))


def compute(unit: Unit, folder: Path) -> dict[str, Any]:
    """Do a unit; returns its result, and leaves the weights that others need in the folder."""
    model = make_rung(unit.settings["layers"], unit.settings["seed"])
    for need in unit.needs:
        model.load_state_dict(load_file(weights_path(need, folder)))
    result = KINDS[unit.kind](model, unit.settings)
    if unit.kind in LEAVING_WEIGHTS:
        keep(weights_path(unit, folder), lambda file: save_file(model.state_dict(), file))
    return result


def language_model(model: Rung, s: Settings) -> dict[str, Any]:
    """Train on the corpus; how far the loss of held-out sentences is from the entropy of the grammar."""
    world = world_of(s["seed"])
    text = data.corpus(world, s["sentences"], random(s["seed"], "corpus"))
    trained = _fit(model, s, len(text), lambda i: losses.imitation_loss(model, text, i))
    rng = random(s["seed"], "test")
    test = data.sample(world, np.asarray(rng.integers(data.TOPICS, size=s["test"])), rng, part="held_out")
    tokens = int(test.mask_NT[:, 2:].sum())
    return {
        **count(model),
        "first_loss": trained[0],
        "held_out_loss": -float(losses.scores_of(model, test, losses.summed_log_prob).sum()) / tokens,
        "entropy": -float(test.log_p_N.sum()) / tokens,
    }


def versus(model: Rung, s: Settings) -> dict[str, Any]:
    """Train one arm (pm or il) on ranked or binary pairs; which held-out pairs it orders rightly.

    labels: "shuffled" puts every pair in a random order, a control in which nothing can be learned.
    Imitation is scored by the sum and the mean of the log-probabilities, and by the sum less that of the
    language model it started from, which takes out how common the words are.
    """
    pairs, test = _drawn(DRAW[s["data"]], s, s["pairs"])
    if s["labels"] == "shuffled":
        pairs = data.in_random_order(pairs, random(s["seed"], "labels"))
    if s["arm"] == "pm":
        trained = _fit(model, s, len(pairs), partial(losses.preference_loss, model, pairs))
        credits = {"score": _credit(model, test, losses.reward)}
    else:
        before = _both(model, test, losses.summed_log_prob)
        trained = _fit(model, s, len(pairs), partial(losses.imitation_loss, model, pairs.good))
        after = _both(model, test, losses.summed_log_prob)
        tokens = [side.mask_NT[:, 2:].sum(axis=1) for side in (test.good, test.bad)]
        credits = {
            "sum": losses.credit(*after),
            "mean": losses.credit(after[0] / tokens[0], after[1] / tokens[1]),
            "sum less language model": losses.credit(after[0] - before[0], after[1] - before[1]),
            "language model": losses.credit(*before),
        }
        if s["data"] == "ranked":
            perfect = [data.perfect_imitation(side) for side in (test.good, test.bad)]
            credits["perfect imitation, sum"] = losses.credit(*perfect)
            credits["perfect imitation, mean"] = losses.credit(perfect[0] / tokens[0], perfect[1] / tokens[1])
    return {"credits": {k: to_text(v) for k, v in credits.items()}, "last_loss": _last(trained)}


def pretrain(model: Rung, s: Settings) -> dict[str, Any]:
    """One pass over the source comparisons (quality of the sentence), in the form the arm says.

    imitation: language modelling on the good sides, the control that sees the same sentences without their
    order. ranked: the pairs as they are. binary: the two control-token comparisons of every pair.
    """
    pairs, test = _drawn(data.ranked_pairs, s, s["pairs"])
    loss: dict[str, Callable[[Ints], torch.Tensor]] = {
        "imitation": partial(losses.imitation_loss, model, pairs.good),
        "ranked": partial(losses.preference_loss, model, pairs),
        "binary": partial(losses.binarized_loss, model, pairs),
    }
    trained = _fit(model, s, len(pairs), loss[s["arm"]])
    return {
        "source_accuracy": float(_credit(model, test, losses.reward).mean()),
        "source_accuracy_by_control": float(_credit(model, test, losses.good_less_bad).mean()),
        "last_loss": _last(trained),
    }


def finetune(model: Rung, s: Settings) -> dict[str, Any]:
    """Train on the first ``pairs`` comparisons of the target; which held-out target pairs are then right."""
    test = target_pairs(s, s["test"], part="held_out")
    if s["pairs"] == 0:
        return {"credit": to_text(_credit(model, test, losses.reward))}
    pairs = target_pairs(s, FINETUNING_POOL, part="train").take(np.arange(s["pairs"]))
    trained = _fit(model, s, len(pairs), partial(losses.preference_loss, model, pairs))
    return {"credit": to_text(_credit(model, test, losses.reward)), "last_loss": _last(trained)}


def target_pairs(s: Settings, n: int, *, part: Part) -> Pairs:
    """Comparisons under one of the target preferences.

    shifted: shares the rule with the source, weighs it differently and adds an aspect. conflicting: the
    source's levels of quality in the opposite order. agreeing: the source's own order, other sentences.
    """
    world = world_of(s["seed"])
    rng = random(s["seed"], "training" if part == "train" else "test", 1)
    if s["target"] == "shifted":
        return data.shifted_pairs(world, n, rng, part=part)
    return data.ranked_pairs(world, n, rng, part=part, reverse=s["target"] == "conflicting")


def calibrate(model: Rung, s: Settings) -> dict[str, Any]:
    """Train on Bradley-Terry labels for some passes; how the gaps of held-out pairs foretell their labels."""
    pairs, test = _drawn(data.noisy_pairs, s, s["pairs"], sharpness=s["sharpness"])
    trained = _fit(model, s, len(pairs), partial(losses.preference_loss, model, pairs))
    good, bad = _both(model, test, losses.reward)
    known = s["sharpness"] * (test.good.quality_N - test.bad.quality_N)
    return {
        "model": calibration(good - bad),
        "known score": calibration(known.astype(np.float64)),
        "last_loss": _last(trained),
    }


def ranked_sets(model: Rung, s: Settings) -> dict[str, Any]:
    """One pass over ranked sets of K; held-out loss on the way, and forward passes paid a comparison.

    grouped: a step takes b prompts whole. shuffled: it takes as many single comparisons, b K (K - 1) / 2,
    drawn from all prompts. Both see every comparison once, in the same number of steps.
    """
    k, sharp = s["k"], s["sharpness"]
    train_sets, test_sets = _drawn(data.ranked_sets, s, s["prompts"], k=k, sharpness=sharp)
    steps = s["prompts"] // s["batch"]
    curve: list[dict[str, float]] = []
    forwards = 0

    def losses_N(sentences: data.Sentences, ranks_NK: Ints) -> Floats:
        """Loss of every set of K."""
        return losses.set_losses(losses.scores_of(model, sentences, losses.reward).reshape(-1, k), ranks_NK)

    def measure(step: int) -> None:
        if step in {round(steps * i / s["points"]) for i in range(s["points"] + 1)}:
            curve.append({"seen": step / steps, "loss": float(losses_N(*test_sets).mean())})

    def loss(items: Ints) -> torch.Tensor:
        nonlocal forwards
        if s["arm"] == "grouped":
            forwards += len(items) * k
            return losses.set_loss(model, train_sets[0], train_sets[1], items)
        forwards += len(items) * 2
        return losses.preference_loss(model, pairs, items)

    pairs = data.pairs_of_sets(*train_sets)
    measure(0)
    if s["arm"] == "grouped":
        trained = _fit(model, s, s["prompts"], loss, after_step=measure)
    else:
        in_pairs = {**s, "batch": s["batch"] * k * (k - 1) // 2}
        trained = _fit(model, in_pairs, len(pairs), loss, after_step=measure)
    known = sharp * test_sets[0].quality_N.reshape(-1, k).astype(np.float64)
    return {
        "curve": curve,
        "held_out_losses": [round(float(x), 5) for x in losses_N(*test_sets)],
        "training_loss": float(losses_N(*train_sets).mean()),
        "known_score_loss": float(losses.set_losses(known, test_sets[1]).mean()),
        "forwards_per_prompt": forwards / (steps * s["batch"]),
        "last_loss": _last(trained),
    }


KINDS: dict[str, Callable[[Rung, Settings], dict[str, Any]]] = {
    "lm": language_model,
    "versus": versus,
    "pmp": pretrain,
    "finetune": finetune,
    "calibration": calibrate,
    "sets": ranked_sets,
}
LEAVING_WEIGHTS = {"lm", "pmp"}


def _drawn(draw: Callable[..., Any], s: Settings, number: int, **more: Any) -> tuple[Any, Any]:
    """What is trained on, so many, and what is held out, drawn in the same way."""
    world = world_of(s["seed"])
    return (
        draw(world, number, rng=random(s["seed"], "training"), part="train", **more),
        draw(world, s["test"], rng=random(s["seed"], "test"), part="held_out", **more),
    )


def _fit(
    model: Rung,
    s: Settings,
    items: int,
    loss_of: Callable[[Ints], torch.Tensor],
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    steps = max(s.get("least_steps", 1), s.get("epochs", 1) * items // s["batch"])
    stream = index_stream(items, s["batch"], steps, random(s["seed"], "order of the data"))
    return train(model, stream, loss_of, Schedule(s["learning_rate"], steps), after_step)


def _both(model: Rung, pairs: Pairs, score: losses.ScoreOf) -> tuple[Floats, Floats]:
    return losses.scores_of(model, pairs.good, score), losses.scores_of(model, pairs.bad, score)


def _credit(model: Rung, pairs: Pairs, score: losses.ScoreOf) -> Floats:
    return losses.credit(*_both(model, pairs, score))


def _last(losses: list[float]) -> float:
    return float(np.mean(losses[-20:]))
