"""Which units a study consists of, with every number that decides its result and its cost. No torch here.

The budgets and learning rates were looked at on seed 100 with one layer, which is no part of the study, and
not searched: larger rungs have those of the smallest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.runs.artifacts import hash_of, sha256_of
from studies.engine.ladder import seconds
from studies.engine.units import Settings, Unit

OVERHEAD = 1.0  # seconds a unit
LARGEST = 3  # layers of a model that is given, for its cost
REVISION = 1  # to be raised when the meaning of a unit changes but its settings do not
BASE, PROMPTED, DISTILLED, PPO, PTX = "base", "prompted", "distilled", "ppo", "ppo-ptx"
ARMS = (BASE, PROMPTED, DISTILLED, PPO, PTX)


@dataclass(frozen=True)
class Plan:
    """One study. Words are those of a text, tokens those of a model; all numbers are of one rung and seed."""

    name: str = "full"
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = (1, 2, 3)  # layers
    # the ladder's own models
    vocabulary: int = 1024  # most tokens of the tokenizer
    window: int = 256  # tokens of a training row and of the model
    tokens: int = 1_000_000
    batch: int = 4  # rows
    learning_rate: float = 1e-3
    # context distillation
    context_words: int = 120
    sequences: int = 640
    sequence_words: int = 80
    sequence_batch: int = 8
    distil_rate: float = 2e-3
    epochs: int = 1
    top_k: int = 50  # Bai 2022, A.1
    sequences_held_out: int = 80
    # adapters of distillation and PPO
    rank: int = 16
    alpha: int = 32
    # PPO
    steps: int = 50
    responses: int = 32  # a step
    response_tokens: int = 20
    ppo_epochs: int = 2
    ppo_rate: float = 1e-3
    kl_coef: float = 0.05
    ptx_coef: float = 1.0
    prompts: int = 256
    # evaluation
    texts: int = 120
    text_words: int = 80
    last_words: int = 300
    items: int = 120  # of each inverse-scaling task
    judged: int = 150  # prompts whose continuation is judged
    public: int = 200  # items of a task that is given by its files


FULL = Plan()
QUICK = Plan(
    name="quick",
    seeds=(0,),
    sizes=(1, 2),
    tokens=160_000,
    sequences=160,
    sequences_held_out=30,
    steps=6,
    prompts=64,
    texts=40,
    last_words=80,
    items=40,
    judged=40,
    public=40,
)


def for_models(plan: Plan) -> Plan:
    """The same with budgets for models that are thousands of times larger; one seed, since they are given."""
    return replace(
        plan,
        name=f"{plan.name}, models",
        seeds=(0,),
        sizes=(),
        sequences=min(plan.sequences, 160),
        sequences_held_out=min(plan.sequences_held_out, 30),
        steps=min(plan.steps, 10),
        responses=16,
        texts=min(plan.texts, 60),
        last_words=min(plan.last_words, 100),
        judged=min(plan.judged, 60),
        items=min(plan.items, 60),
    )


def for_text(plan: Plan) -> Plan:
    """The same for rungs that are trained on files, where a word is some two tokens."""
    return replace(
        plan, window=512, batch=2, context_words=70, sequence_words=50, text_words=60, response_tokens=24
    )


@dataclass(frozen=True)
class Given:
    """What the command line says beside the plan.

    models: folders or hub ids; none = the ladder's own. text: files; none = the small world. context: file
    with the context; None = a story of the small world. tasks: public evaluations by name, with their files.
    """

    models: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    context: str | None = None
    tasks: Mapping[str, tuple[str, ...]] | None = None


def stamped(files: Sequence[str]) -> list[list[str]]:
    """Files with the hashes of their contents, so that changed ones make other units."""
    return [[f, sha256_of(Path(f)) if Path(f).is_file() else ""] for f in files]


def stamp_of_model(place: str) -> str:
    """Hash of a model folder's files; a hub id is its name."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return place
    files = sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors", ".bin")
    )
    return hash_of({p.name: sha256_of(p) for p in files})


def units_of(plan: Plan, given: Given) -> list[Unit]:
    """All evaluations of a study; what they need comes as their needs."""
    units: list[Unit] = []
    shared: Settings = {"revision": REVISION, "text": stamped(given.text)}
    shared["context"] = stamped([given.context] if given.context else [])
    for seed in plan.seeds:
        for rung in _rungs(plan, given, seed, shared):
            units += _arms(plan, given, rung, shared)
    return units


def _rungs(plan: Plan, given: Given, seed: int, shared: Settings) -> list[Unit]:
    if given.models:
        return [
            Unit("rung", {"model": m, "stamp": stamp_of_model(m), "seed": seed, "revision": REVISION})
            for m in given.models
        ]
    own = _of(plan, "vocabulary", "window", "tokens", "batch", "learning_rate")
    own |= {"seed": seed, "text": shared["text"], "revision": REVISION}
    return [Unit("rung", own | {"layers": n}, cost=seconds(n, plan.tokens, 0, OVERHEAD)) for n in plan.sizes]


def _arms(plan: Plan, given: Given, rung: Unit, shared: Settings) -> list[Unit]:
    """The evaluations of all arms of one rung."""
    own: Settings = {k: rung.settings[k] for k in ("model", "layers", "seed") if k in rung.settings} | shared
    adapter = _of(plan, "rank", "alpha")

    def unit(kind: str, settings: Settings, needs: tuple[Unit, ...], trained: int, read: int) -> Unit:
        cost = seconds(own.get("layers", LARGEST), trained, read, OVERHEAD)
        return Unit(kind, own | settings, needs, cost)

    distil = adapter | _of(plan, "context_words", "sequences", "top_k", "epochs", words="sequence_words")
    distil |= _of(plan, batch="sequence_batch", learning_rate="distil_rate", test="sequences_held_out")
    distil["revision"] = REVISION + 1  # since it is the project's own trainer that distils
    tokens = plan.epochs * plan.sequences * plan.sequence_words
    passages = plan.sequences + 4 * plan.sequences_held_out
    words = plan.context_words + plan.sequence_words
    needs: dict[str, tuple[Unit, ...]] = {BASE: (rung,), PROMPTED: (rung,)}
    needs[DISTILLED] = (rung, unit("distil", distil, (rung,), tokens, passages * words))
    for arm in (PPO, PTX):
        ppo = adapter | _of(plan, "steps", "responses", "response_tokens", "prompts", "kl_coef")
        ppo |= _of(plan, epochs="ppo_epochs", learning_rate="ppo_rate", words="sequence_words")
        ppo |= {"arm": arm, "ptx_coef": plan.ptx_coef if arm == PTX else 0.0}
        sampled = plan.steps * plan.responses * 2 * plan.response_tokens
        needs[arm] = (rung, unit("ppo", ppo, (rung,), 2 * plan.ppo_epochs * sampled, 6 * sampled))
    tasks = {name: stamped(files) for name, files in (given.tasks or {}).items()}
    items = _of(plan, "context_words", "texts", "last_words", "items", "judged", "public", "response_tokens")
    items |= {"words": plan.text_words, "tasks": tasks}
    read = plan.texts * plan.text_words + 60 * plan.last_words + 120 * plan.items + 60 * plan.judged
    return [
        unit("evaluate", items | {"arm": arm} | (adapter if len(needs[arm]) > 1 else {}), needs[arm], 0, read)
        for arm in ARMS
    ]


def _of(plan: Plan, *names: str, **renamed: str) -> Settings:
    """Fields of a plan as settings, some under another name."""
    fields = {name: name for name in names} | renamed
    return {name: getattr(plan, field) for name, field in fields.items()}
