"""A reward model judged on all comparisons: a model a fold, each judged on the groups that it has not seen.

``python -m studies.folds --recipe RECIPE [--folds 4] [--set section.key=value ...]``. Cross-validation for
data with few independent units, such as debates: one split is about two or three of them, and says more about
these than about the model. Whole units of ``data.split_by`` are dealt out to the folds in the order of their
names; every fold is a run of the stages ``comparisons`` to ``card`` of its own, and the page is about the
judgments of all of them. Stopped at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.comparisons import Comparison, Counts, at_most, drawn, write_native
from rlhf.data.readers import read_comparisons
from rlhf.data.readers.native import parse, read_native
from rlhf.data.split import NOUNS, unit_keys
from rlhf.errors import UserError, exit_on_user_error
from rlhf.markdown import points, share, table
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import hash_of, read_jsonl, sha256_of, write_atomically
from rlhf.runs.stage import RUNS
from rlhf.stats.clustered import Floats
from studies.engine import command
from studies.engine.units import Unit

STAGES = (
    "rlhf.models.prepare",
    "rlhf.collect",
    "policy.sft",
    "policy.distillation",
    "reward.pretraining",
    "reward.training",
    "reward.card",
)


def check(recipe: Recipe, folds: int) -> None:
    """Whether a recipe's reward model can be judged in folds.

    Raises:
        UserError: too few folds, or comparisons, test files or a card that are not the recipe's own to split.
    """
    if folds < 2:
        raise UserError(f"--folds {folds}: at least 2, since each is held out from the others")
    if recipe.data.sampled or not recipe.data.comparisons:
        raise UserError("data.comparisons: folds are made of comparisons in files; name some")
    for key, given in (
        ("data.held_out_comparisons", recipe.data.held_out_comparisons),
        ("card.model", recipe.card.model),
        ("card.comparisons", recipe.card.comparisons),
        ("ppo.rewards", recipe.ppo.rewards and not recipe.ppo.own_reward),
    ):
        if given:
            raise UserError(
                f"{key}: every fold has a reward model and test comparisons of its own; remove it"
            )


def deal(keys: Sequence[str], folds: int) -> list[list[bool]]:
    """Of every fold, whether it holds each comparison out; keys: what keeps comparisons together.

    Raises:
        UserError: there are fewer keys than folds.
    """
    names = sorted(set(keys))
    if len(names) < folds:
        raise UserError(f"--folds {folds}: there are {len(names)} units (data.split_by); ask for fewer")
    fold_of = {name: number % folds for number, name in enumerate(names)}
    return [[fold_of[key] == fold for key in keys] for fold in range(folds)]


def write_folds(
    folder: Path, comparisons: Sequence[Comparison], held_out: Sequence[Sequence[bool]]
) -> list[tuple[Path, Path]]:
    """Two files a fold: the comparisons to train on and those held out, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for fold, held_C in enumerate(held_out):
        train, test = (folder / f"{fold}-of-{len(held_out)}-{part}.jsonl" for part in ("train", "held_out"))
        for file, wanted in ((train, False), (test, True)):
            write_native(file, [c for c, held in zip(comparisons, held_C, strict=True) if held is wanted])
        files.append((train, test))
    return files


def units_of(
    path: str, overrides: Sequence[str], recipe: Recipe, files: Sequence[tuple[Path, Path]]
) -> list[Unit]:
    """A reward model and its card a fold. files: of each, the comparisons to train on and those held out."""
    own = {
        "recipe": path,
        "overrides": list(overrides),
        "content": content_of(recipe),
        "folds": len(files),
    }
    return [
        Unit(
            "fold",
            own | {"fold": k, "files": list(map(str, pair)), "hashes": list(map(sha256_of, pair))},
            cost=1200.0,
        )
        for k, pair in enumerate(files)
    ]


def content_of(recipe: Recipe) -> str:
    """Tells a recipe from others of its name."""
    return hash_of(recipe.model_dump(mode="json"))[:8]


def run_name(unit: Unit) -> str:
    """Name of the run of a fold; another recipe has other runs."""
    s = unit.settings
    return f"{Path(s['recipe']).stem}-folds-{s['content']}-{s['folds']}-{s['fold']}"


def recipe_words(unit: Unit) -> list[str]:
    """The recipe of a fold, as on the command line of a stage."""
    s = unit.settings
    train, held_out = s["files"]
    own = [f"data.comparisons={train}", f"data.held_out_comparisons={held_out}"]
    own += [f"name={run_name(unit)}", "data.limit=null", "data.columns={}"]
    return [s["recipe"], *s["overrides"], *own]


def compute(unit: Unit, folder: Path) -> dict[str, Any]:
    """Train and judge the reward model of a fold; what the stages print goes to a log in the folder."""
    from studies.engine.stages import run_stage

    log = folder / f"{unit.kind}-{unit.key}.log"
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for module in STAGES:
            run_stage(module, recipe_words(unit))
    return {"held_out": len(list(read_jsonl(RUNS / run_name(unit) / "card" / "scores.jsonl")))}


@dataclass(frozen=True)
class Judgments:
    """The held-out comparisons of a fold, and the scores of their responses, one after the other, [R]."""

    comparisons: list[Comparison]
    scores: list[float]
    bag_R: Floats
    """By a bag of words of the fold's training comparisons; NaN where there is none."""
    probes_R: dict[str, Floats]
    """By the reward stage's probes."""


def judgments(unit: Unit) -> Judgments:
    """What the models of a fold say of what it holds out."""
    from reward.card.baselines import fit_bag_of_words
    from reward.card.beside import probe_scores

    path, *words = recipe_words(unit)
    recipe, run = load(Path(path), words), RUNS / run_name(unit)
    rows = list(read_jsonl(run / "card" / "scores.jsonl"))
    own = [next(iter(parse({k: v for k, v in row.items() if k != "scores"}, ""))) for row in rows]
    train = read_native(run / "comparisons" / "train.jsonl", "stop", Counts())
    bag = fit_bag_of_words(drawn(train, recipe.reward.limit, recipe.seed), seed=recipe.seed)
    texts = [response for c in own for response in c.responses]
    return Judgments(
        own,
        [score for row in rows for score in row["scores"]],
        bag.scores(texts) if bag else np.full(len(texts), np.nan),
        probe_scores(recipe, own),
    )


def judged(folds: Sequence[Judgments]) -> dict[str, Any]:
    """The figures over the judgments of some folds' models: accuracy, and what it stands beside.

    Each is (figure, what the reward model adds to it) as on the card (:func:`reward.card.figures.figures`).
    """
    from reward.card.figures import Scored, figures

    scores = [score for fold in folds for score in fold.scores]
    bag_R = np.concatenate([fold.bag_R for fold in folds])
    names = set.intersection(*(set(fold.probes_R) for fold in folds))
    found = figures(
        Scored(
            [c for fold in folds for c in fold.comparisons],
            np.array(scores),
            np.zeros(len(scores), dtype=bool),
            normalized=True,
        ),
        bins=10,
        near_tie=0.5,
        bag_R=None if np.isnan(bag_R).any() else bag_R,
        probes_R={name: np.concatenate([fold.probes_R[name] for fold in folds]) for name in names},
    )
    base, probe = found["baselines"], found["probe"] or {}
    return {
        "pairs": found["pairs"],
        "unit": found["unit"],
        "clusters": found["clusters"],
        "reward model": (found["accuracy"]["overall"], None),
        "longer is better": (base["longer_is_better"], base["adds"]["longer_is_better"]),
        "bag of words": (base["bag_of_words"], base["adds"].get("bag_of_words")),
        "probe, last layer": (probe.get("last"), probe.get("adds_last")),
        "best probe": (probe.get("best"), probe.get("adds_best")),
        "on pairs of like length": (base["like_length"], None),
        "bag of words on those": (
            base["like_length_bag_of_words"],
            base["adds"].get("like_length_bag_of_words"),
        ),
    }


def page(content: dict[str, Any]) -> str:
    """The study as a page: all judgments, then every fold alone."""
    every = content["all"]
    rows = [
        [name, *share(found[0]), f"{found[0]['pairs']:,}", points(found[1]) if found[1] else ""]
        for name, found in every.items()
        if isinstance(found, (list, tuple)) and found[0]
    ]
    folds = [
        [str(number), *share(fold["reward model"][0]), f"{fold['pairs']:,}", f"{fold['clusters']:,}",
         share(fold["longer is better"][0])[0]]
        for number, fold in enumerate(content["folds"])
    ]  # fmt: skip
    unseen = f"Every pair is judged by a model that has seen none of its {NOUNS[content['split_by']]}."
    return "\n".join([
        f"# {content['recipe']}: reward models judged in {len(folds)} folds\n",
        f"    {content['command']}\n",
        f"{unseen} 95% intervals over {every['clusters']:,} {every['unit']}; differences are paired.\n",
        table(["", "accuracy", "95% interval", "pairs", "the reward model adds"], rows),
        "Fold by fold:\n",
        table(["fold", "accuracy", "95% interval", "pairs", every["unit"], "longer is better"], folds),
    ])  # fmt: skip


def main() -> None:
    """Read the command line, do what is not done, write study.json and study.md."""
    parser = command.arguments("folds", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", default=None, help="what is learned (tiny_assistant.yaml with --quick)")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, key=value")
    parser.add_argument(
        "--folds", type=int, default=None, help="parts, each held out once (4; 2 with --quick)"
    )
    args = parser.parse_args()
    path = args.recipe or f"recipes/{'tiny_assistant' if args.quick else 'convincing'}.yaml"
    folds = (2 if args.quick else 4) if args.folds is None else args.folds
    recipe = load(Path(path), args.set)
    check(recipe, folds)
    data = recipe.data
    found, counts = read_comparisons(
        data.comparisons, on_bad_rows=data.on_bad_rows, columns=data.columns, repeats=data.repeats
    )
    found = at_most(found, data.limit, recipe.seed, counts, "data.limit")
    held_out = deal(unit_keys(found, data.split_by), folds)
    command.check(args)
    from studies.engine.results import Results

    print(f"comparisons: {counts}", flush=True)
    files = write_folds(args.work / content_of(recipe), found, held_out)
    units = units_of(path, args.set, recipe, files)
    with command.workers(args.jobs) as do:
        do(units, args.work, compute)
    Results.read(units, args.work)
    by_fold = [judgments(unit) for unit in units]
    words = [f"--recipe {path} --folds {folds}", *([f"--set {' '.join(args.set)}"] if args.set else [])]
    content = {
        "recipe": recipe.name,
        "command": f"python -m studies.folds {' '.join(words)}",
        "split_by": data.split_by,
        "all": judged(by_fold),
        "folds": [judged([one]) for one in by_fold],
    }
    from studies.engine.report import as_json

    write_atomically(args.output / "study.json", as_json(content))
    write_atomically(args.output / "study.md", page(content))
    print(page(content), flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
