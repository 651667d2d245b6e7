"""The `card` stage: how far a reward model can be trusted, on comparisons it has not seen.

``python -m reward.card RECIPE [section.key=value ...]`` writes ``runs/<name>/card/card.json``,
``card.md`` and ``scores.jsonl`` (comparisons with their scores), and prints the page. The model is this
run's own, or any sequence-classification reward model; the comparisons are the run's held-out ones, or any
files.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reward.card.beside import bag_of_words, best_probe, ceiling_of, probe_scores
from reward.card.clusters import clusters
from reward.card.figures import Scored, figures
from reward.card.report import as_markdown
from reward.card.suites import suites
from rlhf.data.comparisons import (
    Comparison,
    Counts,
    Prompt,
    at_most,
    distinct_responses,
    native_row,
    prompt_key,
)
from rlhf.data.prompts import read_prompts
from rlhf.data.readers import read_comparisons
from rlhf.data.readers.native import read_native
from rlhf.data.split import counted_as_trained
from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import Recipe, from_command_line
from rlhf.runs.artifacts import (
    model_files,
    print_page,
    write_atomically,
    write_json,
    write_jsonl,
)
from rlhf.runs.stage import RUNS, StageRun, input_hashes, open_stage
from rlhf.training.progress import progress

if TYPE_CHECKING:
    from reward.card.scorers import Scorer

COMPARISONS_AT_ONCE = 64  # scored between two notes on the disk
_SHOWN = ("torch", "transformers", "peft", "numpy")


def evaluate(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Do the stage's work; returns the card."""
    from reward.card.curve import check_curve, learning_curve
    from reward.card.scorers import check_scorer, load_scorer
    from rlhf.training.shares import join, leave

    join(recipe.distributed)
    section = recipe.card
    if section.against:  # told now, and not when the first model is done
        check_scorer(section.against, recipe, key="card.against")
    if section.curve:
        check_curve(recipe)
    comparisons, counts = comparisons_of(recipe, run)
    path = model_of(recipe)
    scorer = load_scorer(path, recipe)
    distinct = [distinct_responses(c, scorer.read) for c in comparisons]
    comparisons = [c for c in distinct if len(set(c.ranks)) > 1]
    if len(comparisons) < len(distinct):
        lost = len(distinct) - len(comparisons)
        counts.drop("responses equal within what the model reads", lost)
        run.say(
            f"card: {lost} of {len(distinct)} comparisons left out: their responses are equal after the cut"
        )
    if not comparisons:
        raise UserError(f"card.comparisons: nothing that {path} can tell apart: {counts}")
    scores_R, cut_R = scored(run, scorer, comparisons, "model")
    if not section.against:
        leave()
    found_elsewhere = _out_of_distribution(recipe, scorer, comparisons)
    card: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "model": {**scorer.describe(), "files": input_hashes(list(map(str, model_files(path))))},
        "against_model": None,
        "data": {
            "files": input_hashes(comparison_files(recipe)),
            "seen": seen(recipe),
            "counts": counts.as_dict(),
            "reading": str(counts),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _SHOWN},
        },
    }
    normalized, gain = scorer.normalized, scorer.gain
    bag = bag_of_words(recipe, run, model_run(recipe) / "comparisons" / "train.jsonl", comparisons)
    against_R = None
    del scorer  # one model in memory at a time
    if section.against:
        other = load_scorer(section.against, recipe, key="card.against")
        against_R, _ = scored(run, other, comparisons, "against")
        card["against_model"] = {
            **other.describe(),
            "files": input_hashes(list(map(str, model_files(section.against)))),
        }
        del other
        leave()
    card |= figures(
        Scored(comparisons, scores_R, cut_R, normalized, gain),
        bins=section.bins,
        near_tie=section.near_tie,
        against_R=against_R,
        bag_R=np.array(bag["scores"]) if bag else None,
        probes_R=probe_scores(recipe, comparisons),
    )
    of_C = clusters(comparisons).of_C
    card["bag_of_words"] = bag and bag["about"]
    if card["probe"] and "best" in card["probe"]:
        card["probe"]["best"] |= best_probe(recipe)
    card["ceiling"] = ceiling_of(recipe, comparisons, of_C)
    card["suites"] = suites(comparisons, scores_R, of_C)
    card["curve"] = learning_curve(recipe, run, comparisons) if section.curve else None
    card["out_of_distribution"] = found_elsewhere
    write_scores(run.folder / "scores.jsonl", comparisons, {"scores": scores_R, "against": against_R})
    return card


def _out_of_distribution(
    recipe: Recipe, scorer: Scorer, comparisons: Sequence[Comparison]
) -> dict[str, Any] | None:
    """How well activations tell ``card.outliers`` from the prompts of the comparisons; None = not asked for.

    Raises:
        UserError: another library's classifier, or too few prompts.
    """
    section = recipe.card
    if not section.outliers:
        return None
    from reward.card.ood import report
    from reward.card.scorers import RewardModelScorer

    if not isinstance(scorer, RewardModelScorer):
        raise UserError("card.outliers: only a reward model of this project shows its activations; remove it")
    strange, _ = read_prompts(section.outliers, on_bad_rows=recipe.data.on_bad_rows, key="card.outliers")
    own = list({prompt_key(c.prompt): c.prompt for c in comparisons}.values())
    keys = {prompt_key(p) for p in own}
    strange = [p for p in strange if prompt_key(p) not in keys]
    inside_ND, outside_MD = (scorer.activations(part, section.outlier_layer) for part in (own, strange))
    found = report(inside_ND, outside_MD, exposure=section.exposure, seed=recipe.seed)
    return {"layer": section.outlier_layer, **found}


def model_of(recipe: Recipe) -> str:
    """Folder or hub id of the model that the card is about."""
    return recipe.card.model or str(RUNS / recipe.name / "reward" / "model")


def comparison_files(recipe: Recipe) -> list[str]:
    """What the comparisons are read from."""
    return recipe.card.comparisons or [str(RUNS / recipe.name / "comparisons" / "held_out.jsonl")]


def training_files(recipe: Recipe) -> list[Path]:
    """Training comparisons that are known: of the run, and of the runs in whose folders the models lie."""
    section = recipe.card
    named = [name for name in (section.model, section.against) if name]
    runs = [RUNS / recipe.name, *map(_run_of, named)]
    files = [run / "comparisons" / "train.jsonl" for run in dict.fromkeys(runs)]
    return [file for file in files if file.is_file()]


def _run_of(model: str) -> Path:
    """The run in whose stage a model would lie, as in runs/<name>/reward/model."""
    return Path(model).expanduser().absolute().parent.parent


def model_run(recipe: Recipe) -> Path:
    """Folder of the run that the model is of, whether it is there or not."""
    return _run_of(recipe.card.model) if recipe.card.model else RUNS / recipe.name


def seen(recipe: Recipe) -> str:
    """What is known of whether the model was trained on these comparisons, without a full stop."""
    if (model_run(recipe) / "comparisons" / "train.jsonl").is_file():
        what, _ = counted_as_trained(recipe.data)
        none = "No prompt of these comparisons" if what == "prompt" else "None of these comparisons"
        return f"{none} is among the training comparisons of the model's run"
    return "Whether the model was trained on these comparisons is for its makers to say"


def comparisons_of(recipe: Recipe, run: StageRun) -> tuple[list[Comparison], Counts]:
    """The comparisons to judge by, and what became of those read.

    Prompts that are also training prompts of the run, or of a model's, are left out, and counted; where the
    recipe does not split by prompt, comparisons that are also training ones.

    Raises:
        UserError: nothing is left.
    """
    section = recipe.card
    if section.comparisons:
        comparisons, counts = read_comparisons(
            section.comparisons,
            on_bad_rows=recipe.data.on_bad_rows,
            key="card.comparisons",
            columns=section.columns,
        )
    else:
        counts = Counts()
        comparisons = read_native(comparison_files(recipe)[0], "stop", counts)
    trained = [read_native(file, "stop", Counts()) for file in training_files(recipe)]
    what, key_of = counted_as_trained(recipe.data)
    keys = {key_of(c) for part in trained for c in part}
    read, comparisons = len(comparisons), [c for c in comparisons if key_of(c) not in keys]
    if len(comparisons) < read:
        counts.drop(f"also among the training {what}s of a run", read - len(comparisons))
    comparisons = at_most(comparisons, section.limit, recipe.seed, counts, "card.limit")
    if not comparisons:
        raise UserError(
            f"card.comparisons: nothing usable in {', '.join(comparison_files(recipe))}: {counts}"
        )
    run.say(f"card: {counts}")
    return comparisons, counts


def scored(
    run: StageRun, scorer: Scorer, comparisons: Sequence[Comparison], name: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores of all responses in order, and which texts were cut; what is done survives an interruption.

    A response that stands in several comparisons of a prompt is scored once.
    """
    place: dict[tuple[Prompt, str], int] = {}  # of each prompt and response, by their first comparison

    def read(rows: Sequence[tuple[Prompt, str]]) -> dict[str, Any]:
        if not rows:
            return {"scores": [], "cut": []}
        prompts, responses = [prompt for prompt, _ in rows], [response for _, response in rows]
        cut = scorer.cut(prompts, responses)
        return {"scores": scorer.score(prompts, responses).tolist(), "cut": cut.tolist()}

    from rlhf.training.shares import own, together

    chunks = []
    for number, start in enumerate(range(0, len(comparisons), COMPARISONS_AT_ONCE)):
        before = len(place)
        for row in _rows(comparisons[start : start + COMPARISONS_AT_ONCE]):
            place.setdefault(row, len(place))
        chunks.append((f"{name}-{number:05d}", list(place)[before:]))
    parts = together(
        [
            run.remember(note, partial(read, rows), own=True)
            for note, rows in progress(f"card: {name}", own(chunks), leave=True)
        ]
    )
    scores_I, cut_I = ([x for part in parts for x in part[name]] for name in ("scores", "cut"))
    place_R = [place[row] for row in _rows(comparisons)]
    return np.array(scores_I, dtype=np.float64)[place_R], np.array(cut_I, dtype=bool)[place_R]


def _rows(comparisons: Sequence[Comparison]) -> list[tuple[Prompt, str]]:
    return [(c.prompt, r) for c in comparisons for r in c.responses]


def write_scores(
    path: Path, comparisons: Sequence[Comparison], scores: dict[str, NDArray[np.float64] | None]
) -> None:
    """One comparison a line, as it was read, with the raw scores of its responses, the mean left in."""
    ends = np.cumsum([len(c.responses) for c in comparisons])[:-1]
    split = {name: np.split(x, ends) for name, x in scores.items() if x is not None}
    write_jsonl(
        path,
        (
            {**native_row(c), **{name: part[i].tolist() for name, part in split.items()}}
            for i, c in enumerate(comparisons)
        ),
    )


def main() -> None:
    """The `card` target; a finished stage prints its page again."""
    recipe = from_command_line()
    section = recipe.card
    model = section.model or recipe.ppo.own_reward or (RUNS / recipe.name / "reward").is_dir()
    if recipe.ppo.rewards and not model:
        print("card: this run has no reward model (ppo.rewards); nothing to do", flush=True)
        return
    parents = [*([] if section.comparisons else ["comparisons"]), *([] if section.model else ["reward"])]
    named = [name for name in (section.model, section.against) if name]
    inputs = [*section.comparisons, *section.outliers, *map(str, training_files(recipe))]
    inputs += [str(file) for name in named for file in model_files(name)]
    run = open_stage(recipe, "card", section="card", parents=parents, inputs=inputs, reads=named)
    if run is not None:
        card = evaluate(run.recipe, run)
        write_json(run.folder / "card.json", card)
        write_atomically(run.folder / "card.md", as_markdown(card))
        shown = {"accuracy": card["accuracy"]["overall"], "slope": card["calibration"]["slope"]}
        run.finish({"card": "card.json", **shown})
    print_page(RUNS / recipe.name / "card" / "card.md")


if __name__ == "__main__":
    exit_on_user_error(main)
