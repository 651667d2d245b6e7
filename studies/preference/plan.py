"""Which units a study consists of, with every number that decides its result and its cost.

The numbers were chosen on seed 100, which is no part of the study, with one and two layers, so that every
arm learns something and none is perfect. Learning rates tried there: 2.5e-4 to 2e-3; that of imitation is its
best at both sizes, that of preference models is their best at L = 1 (at L = 2, 1e-3 did a little better).
Nothing was changed after the study's own seeds had been run.
"""

from __future__ import annotations

from dataclasses import dataclass

from studies.engine.ladder import seconds
from studies.engine.units import Settings, Unit
from studies.preference.data import WIDTH

# Learning rates of language modelling and imitation, of preference modelling, of finetuning; all sizes.
LM_RATE, PM_RATE, FINETUNE_RATE = 1e-3, 5e-4, 3e-4
OVERHEAD = 0.3  # seconds a unit: making the model and drawing the data

ARMS = ("none", "imitation", "ranked", "binary")
TARGETS = ("shifted", "conflicting", "agreeing")


@dataclass(frozen=True)
class Plan:
    """One study. Sizes are layers; pairs, sentences and prompts are those that a model is trained on."""

    name: str = "full"
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (1, 2, 3)  # claims 1 and 2
    small_sizes: tuple[int, ...] = (1, 2)  # claims 3, 4, 11 and 12
    sentences: int = 19_200
    versus_pairs: int = 4_800
    versus_test: int = 2_000
    source_pairs: int = 6_000
    target_pairs: tuple[int, ...] = (0, 50, 200, 500, 2_000)
    agreeing_pairs: tuple[int, ...] = (0, 50, 200)  # no claim is made where the orders agree
    target_test: int = 600
    calibration_pairs: int = 4_000
    calibration_test: int = 3_000
    epochs: tuple[int, ...] = (1, 4)
    prompts: int = 600
    prompts_test: int = 200


FULL = Plan()
QUICK = Plan(
    name="quick",
    seeds=(0,),
    sizes=(1, 2),
    small_sizes=(1,),
    sentences=9_600,
    versus_pairs=3_200,
    versus_test=1_000,
    source_pairs=4_000,
    target_pairs=(0, 50, 200, 2_000),
    agreeing_pairs=(0, 50),
    target_test=400,
    calibration_pairs=3_000,
    calibration_test=1_500,
    prompts=300,
    prompts_test=100,
)


def units_of(plan: Plan) -> list[Unit]:
    """All units of a study but the language models and pre-trainings, which come as their needs."""
    units: list[Unit] = []
    for seed in plan.seeds:
        for layers in plan.sizes:
            units += _versus(plan, layers, seed)
        for layers in plan.small_sizes:
            for part in (_transfer, _calibration, _sets):
                units += part(plan, layers, seed)
    return units


def language_model(plan: Plan, layers: int, seed: int) -> Unit:
    """The start of every model of this size and seed."""
    own: Settings = {"sentences": plan.sentences, "batch": 64, "learning_rate": LM_RATE, "test": 500}
    return _unit("lm", layers, seed, own, None, plan.sentences, 500)


def _versus(plan: Plan, layers: int, seed: int) -> list[Unit]:
    start = language_model(plan, layers, seed)
    made = []
    for data, arm, labels in (
        ("ranked", "pm", "true"),
        ("ranked", "il", "true"),
        ("binary", "pm", "true"),
        ("binary", "il", "true"),
        ("ranked", "pm", "shuffled"),
    ):
        if labels == "shuffled" and layers != plan.sizes[0]:
            continue
        rate, sides, looks = (PM_RATE, 2, 2) if arm == "pm" else (LM_RATE, 1, 4)
        own: Settings = {"data": data, "arm": arm, "labels": labels, "pairs": plan.versus_pairs}
        own |= {"batch": 32, "learning_rate": rate, "test": plan.versus_test}
        read = looks * plan.versus_test
        made.append(_unit("versus", layers, seed, own, start, sides * plan.versus_pairs, read))
    return made


def _transfer(plan: Plan, layers: int, seed: int) -> list[Unit]:
    made = []
    for arm in ARMS:
        start = language_model(plan, layers, seed)
        if arm != "none":
            own: Settings = {"arm": arm, "pairs": plan.source_pairs, "batch": 32, "test": 500}
            own |= {"learning_rate": LM_RATE if arm == "imitation" else PM_RATE}
            sentences = {"imitation": 1, "ranked": 2, "binary": 4}[arm] * plan.source_pairs
            start = _unit("pmp", layers, seed, own, start, sentences, 3_000)
        for target in TARGETS:
            for pairs in plan.agreeing_pairs if target == "agreeing" else plan.target_pairs:
                own = {"arm": arm, "target": target, "pairs": pairs, "batch": 16, "least_steps": 40}
                own |= {"learning_rate": FINETUNE_RATE, "test": plan.target_test}
                trained = 2 * max(pairs, 40 * 16) if pairs else 0
                made.append(_unit("finetune", layers, seed, own, start, trained, 2 * plan.target_test))
    return made


def _calibration(plan: Plan, layers: int, seed: int) -> list[Unit]:
    made = []
    for epochs in plan.epochs:
        own: Settings = {"epochs": epochs, "sharpness": 0.7, "pairs": plan.calibration_pairs, "batch": 32}
        own |= {"learning_rate": PM_RATE, "test": plan.calibration_test}
        trained, read = 2 * epochs * plan.calibration_pairs, 2 * plan.calibration_test
        start = language_model(plan, layers, seed)
        made.append(_unit("calibration", layers, seed, own, start, trained, read))
    return made


def _sets(plan: Plan, layers: int, seed: int) -> list[Unit]:
    made = []
    for arm, forwards in (("grouped", 6), ("shuffled", 30)):
        own: Settings = {"arm": arm, "k": 6, "sharpness": 0.7, "prompts": plan.prompts, "batch": 4}
        own |= {"learning_rate": PM_RATE, "test": plan.prompts_test, "points": 8}
        trained, read = forwards * plan.prompts, 10 * 6 * plan.prompts_test + 6 * plan.prompts
        made.append(_unit("sets", layers, seed, own, language_model(plan, layers, seed), trained, read))
    return made


def _unit(
    kind: str, layers: int, seed: int, own: Settings, start: Unit | None, trained: int, read: int
) -> Unit:
    """A unit behind the one that it starts from; trained, read: sentences, for its cost."""
    cost = seconds(layers, trained * WIDTH, read * WIDTH, OVERHEAD)
    return Unit(kind, {"layers": layers, "seed": seed} | own, (start,) if start else (), cost)
