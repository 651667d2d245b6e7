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

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from studies.preference import data, train
from studies.preference.data import Floats, Ints, Pairs, Part, World
from studies.preference.ladder import Rung, count, make_rung
from studies.preference.measure import calibration, to_text
from studies.preference.train import Schedule, index_stream
from studies.preference.work import Settings, Unit, weights_path, write_result

PURPOSES = ("world", "corpus", "training", "test", "order of the data", "labels")
FINETUNING_POOL = 2000  # the first n of these pairs are the n pairs of a finetuning

DRAW: dict[str, Callable[..., Pairs]] = {"ranked": data.ranked_pairs, "binary": data.binary_pairs}


def random(seed: int, purpose: str, *more: int) -> np.random.Generator:
    """The generator of one purpose: a function of the seed and the purpose, not of what was drawn before."""
    return np.random.default_rng([seed, PURPOSES.index(purpose), *more])


def world_of(seed: int) -> World:
    """The rule and the word frequencies of a seed."""
    return data.make_world(random(seed, "world"))


def start_worker() -> None:
    """Make a process fit for units: one thread, and nothing that is not deterministic."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def execute(unit: Unit, folder: Path) -> None:
    """Do a unit and leave its result, and the weights others need, in the folder."""
    wall, cpu = time.monotonic(), time.process_time()
    model = make_rung(unit.settings["layers"], unit.settings["seed"])
    for need in unit.needs:
        model.load_state_dict(load_file(weights_path(need, folder)))
    result = KINDS[unit.kind](model, unit.settings)
    if unit.kind in LEAVING_WEIGHTS:
        path = weights_path(unit, folder)
        unfinished = path.with_name(f"{path.name}.unfinished.{os.getpid()}")
        save_file(model.state_dict(), unfinished)
        unfinished.replace(path)
    write_result(unit, folder, result, time.monotonic() - wall, time.process_time() - cpu)


def language_model(model: Rung, s: Settings) -> dict[str, Any]:
    """Train on the corpus; how far the loss of held-out sentences is from the entropy of the grammar."""
    world = world_of(s["seed"])
    text = data.corpus(world, s["sentences"], random(s["seed"], "corpus"))
    losses = _fit(model, s, len(text), lambda i: train.imitation_loss(model, text, i))
    rng = random(s["seed"], "test")
    test = data.sample(world, np.asarray(rng.integers(data.TOPICS, size=s["test"])), rng, part="held_out")
    tokens = int(test.mask_NT[:, 2:].sum())
    parameters = count(model)
    return {
        "matrix_weights": parameters.matrices,
        "non_embedding_parameters": parameters.non_embedding,
        "parameters": parameters.total,
        "first_loss": losses[0],
        "held_out_loss": -float(train.scores_of(model, test, train.summed_log_prob).sum()) / tokens,
        "entropy": -float(test.log_p_N.sum()) / tokens,
    }


def versus(model: Rung, s: Settings) -> dict[str, Any]:
    """Train one arm (pm or il) on ranked or binary pairs; which held-out pairs it orders rightly.

    labels: "shuffled" puts every pair in a random order, a control in which nothing can be learned.
    Imitation is scored by the sum and the mean of the log-probabilities, and by the sum less that of the
    language model it started from, which takes out how common the words are.
    """
    world = world_of(s["seed"])
    draw = DRAW[s["data"]]
    pairs = draw(world, s["pairs"], random(s["seed"], "training"), part="train")
    test = draw(world, s["test"], random(s["seed"], "test"), part="held_out")
    if s["labels"] == "shuffled":
        pairs = data.in_random_order(pairs, random(s["seed"], "labels"))
    if s["arm"] == "pm":
        losses = _fit(model, s, len(pairs), lambda i: train.preference_loss(model, pairs, i))
        credits = {"score": _credit(model, test, train.reward)}
    else:
        before = _both(model, test, train.summed_log_prob)
        losses = _fit(model, s, len(pairs), lambda i: train.imitation_loss(model, pairs.good, i))
        after = _both(model, test, train.summed_log_prob)
        tokens = [side.mask_NT[:, 2:].sum(axis=1) for side in (test.good, test.bad)]
        credits = {
            "sum": train.credit(*after),
            "mean": train.credit(after[0] / tokens[0], after[1] / tokens[1]),
            "sum less language model": train.credit(after[0] - before[0], after[1] - before[1]),
            "language model": train.credit(*before),
        }
        if s["data"] == "ranked":
            perfect = [data.perfect_imitation(side) for side in (test.good, test.bad)]
            credits["perfect imitation, sum"] = train.credit(*perfect)
            credits["perfect imitation, mean"] = train.credit(perfect[0] / tokens[0], perfect[1] / tokens[1])
    return {"credits": {k: to_text(v) for k, v in credits.items()}, "last_loss": _last(losses)}


def pretrain(model: Rung, s: Settings) -> dict[str, Any]:
    """One pass over the source comparisons (quality of the sentence), in the form the arm says.

    imitation: language modelling on the good sides, the control that sees the same sentences without their
    order. ranked: the pairs as they are. binary: the two control-token comparisons of every pair.
    """
    world = world_of(s["seed"])
    pairs = data.ranked_pairs(world, s["pairs"], random(s["seed"], "training"), part="train")
    losses = _fit(
        model,
        s,
        len(pairs),
        {
            "imitation": lambda i: train.imitation_loss(model, pairs.good, i),
            "ranked": lambda i: train.preference_loss(model, pairs, i),
            "binary": lambda i: train.binarised_loss(model, pairs, i),
        }[s["arm"]],
    )
    test = data.ranked_pairs(world, s["test"], random(s["seed"], "test"), part="held_out")
    return {
        "source_accuracy": float(_credit(model, test, train.reward).mean()),
        "source_accuracy_by_control": float(_credit(model, test, train.good_less_bad).mean()),
        "last_loss": _last(losses),
    }


def finetune(model: Rung, s: Settings) -> dict[str, Any]:
    """Train on the first ``pairs`` comparisons of the target; which held-out target pairs are then right."""
    test = target_pairs(s, s["test"], part="held_out")
    if s["pairs"] == 0:
        return {"credit": to_text(_credit(model, test, train.reward))}
    pairs = target_pairs(s, FINETUNING_POOL, part="train").take(np.arange(s["pairs"]))
    losses = _fit(model, s, len(pairs), lambda i: train.preference_loss(model, pairs, i))
    return {"credit": to_text(_credit(model, test, train.reward)), "last_loss": _last(losses)}


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
    world, sharp = world_of(s["seed"]), s["sharpness"]
    pairs = data.noisy_pairs(world, s["pairs"], random(s["seed"], "training"), part="train", sharpness=sharp)
    test = data.noisy_pairs(world, s["test"], random(s["seed"], "test"), part="held_out", sharpness=sharp)
    losses = _fit(model, s, len(pairs), lambda i: train.preference_loss(model, pairs, i))
    good, bad = _both(model, test, train.reward)
    known = sharp * (test.good.quality_N - test.bad.quality_N)
    return {
        "model": calibration(good - bad),
        "known score": calibration(known.astype(np.float64)),
        "last_loss": _last(losses),
    }


def ranked_sets(model: Rung, s: Settings) -> dict[str, Any]:
    """One pass over ranked sets of K; held-out loss on the way, and forward passes paid a comparison.

    grouped: a step takes b prompts whole. shuffled: it takes as many single comparisons, b K (K - 1) / 2,
    drawn from all prompts. Both see every comparison once, in the same number of steps.
    """
    world, k, sharp = world_of(s["seed"]), s["k"], s["sharpness"]
    rng, rng_test = random(s["seed"], "training"), random(s["seed"], "test")
    sentences, ranks_NK = data.ranked_sets(world, s["prompts"], k, rng, part="train", sharpness=sharp)
    test, test_NK = data.ranked_sets(world, s["test"], k, rng_test, part="held_out", sharpness=sharp)
    comparisons = k * (k - 1) // 2
    steps = s["prompts"] // s["batch"]
    curve: list[dict[str, float]] = []
    forwards = 0

    def measure(step: int) -> None:
        if step in {round(steps * i / s["points"]) for i in range(s["points"] + 1)}:
            scores_NK = train.scores_of(model, test, train.reward).reshape(-1, k)
            curve.append({"seen": step / steps, "loss": float(train.set_losses(scores_NK, test_NK).mean())})

    def loss(items: Ints) -> torch.Tensor:
        nonlocal forwards
        if s["arm"] == "grouped":
            forwards += len(items) * k
            return train.set_loss(model, sentences, ranks_NK, items)
        forwards += len(items) * 2
        return train.preference_loss(model, pairs, items)

    pairs = data.pairs_of_sets(sentences, ranks_NK)
    measure(0)
    if s["arm"] == "grouped":
        losses = _fit(model, s, s["prompts"], loss, after_step=measure)
    else:
        in_pairs = {**s, "batch": s["batch"] * comparisons}
        losses = _fit(model, in_pairs, len(pairs), loss, after_step=measure)
    held_out_N = train.set_losses(train.scores_of(model, test, train.reward).reshape(-1, k), test_NK)
    seen_N = train.set_losses(train.scores_of(model, sentences, train.reward).reshape(-1, k), ranks_NK)
    known = sharp * test.quality_N.reshape(-1, k).astype(np.float64)
    return {
        "curve": curve,
        "held_out_losses": [round(float(x), 5) for x in held_out_N],
        "training_loss": float(seen_N.mean()),
        "known_score_loss": float(train.set_losses(known, test_NK).mean()),
        "forwards_per_prompt": forwards / (steps * s["batch"]),
        "last_loss": _last(losses),
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


def _fit(
    model: Rung,
    s: Settings,
    items: int,
    loss_of: Callable[[Ints], torch.Tensor],
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    steps = max(s.get("least_steps", 1), s.get("epochs", 1) * items // s["batch"])
    stream = index_stream(items, s["batch"], steps, random(s["seed"], "order of the data"))
    losses = train.train(model, stream, loss_of, Schedule(s["learning_rate"], steps), after_step)
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(f"the loss is not finite after {steps} steps at {s['learning_rate']}")
    return losses


def _both(model: Rung, pairs: Pairs, score: train.ScoreOf) -> tuple[Floats, Floats]:
    return train.scores_of(model, pairs.good, score), train.scores_of(model, pairs.bad, score)


def _credit(model: Rung, pairs: Pairs, score: train.ScoreOf) -> Floats:
    return train.credit(*_both(model, pairs, score))


def _last(losses: list[float]) -> float:
    return float(np.mean(losses[-20:]))
