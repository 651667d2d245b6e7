"""What preference-model pre-training is worth: fine-tuning on N human comparisons from different starts.

``python -m studies.pmp_transfer --recipe RECIPE [--set section.key=value ...]``: the recipe says what is
pre-trained on (its ``pmp`` section) and what is fine-tuned on. Arms: ``none`` (fresh adapter and head),
``lm`` (language-model loss on the best public answers, the control that has seen the same texts), ``ranked``
and ``binarized`` PMP (Askell 2021, section 4; claim: PMP helps, most at few comparisons). All arms are judged
on the same held-out comparisons; every trained model is one unit, so an interrupted study goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import CommandLine, exit_on_user_error
from rlhf.markdown import table
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import hash_of, read_json, sha256_of, write_atomically
from rlhf.runs.dtype import settled
from rlhf.runs.stage import RUNS
from rlhf.stats.intervals import cluster_mean_interval
from studies.engine.command import say
from studies.engine.results import Results
from studies.engine.units import Compute, Settings, Unit, run

ARMS = {
    "none": [],
    "lm": ["pmp.objective=imitation", "pmp.form=ranked"],
    "ranked": ["pmp.form=ranked"],
    "binarised": ["pmp.form=binarized"],
}
SHOWN = {"binarised": "binarized"}  # units, folders and pmp.json keep the name that earlier runs gave the arm


def units_of(recipe: Recipe, arms: list[str], numbers: list[int], seeds: list[int]) -> list[Unit]:
    """A fine-tuning of every arm on the first N comparisons; the stages before it have been run."""
    files = [RUNS / recipe.name / "comparisons" / f"{part}.jsonl" for part in ("train", "held_out")]
    shared: Settings = {"files": [sha256_of(file) for file in files], "drawn": max(numbers)}
    shared["recipe"] = hash_of(recipe.model_dump(mode="json"))
    made = []
    for seed in seeds:
        for number in numbers:
            for arm in arms:
                start = None if arm == "none" else sha256_of(_pretrained(recipe, arm) / "manifest.json")
                own = {"arm": arm, "pairs": number, "seed": seed, "start": start}
                made.append(Unit("finetune", own | shared, cost=float(number)))
    return made


def fine_tuning(recipe: Recipe) -> Compute:
    """What a unit does: fine-tune a start, and judge it; the trunk is computed once for all units."""
    import torch

    from reward.loss import pair_accuracy
    from reward.model.batch import encode_split, layout
    from reward.model.ensemble import MODEL
    from reward.model.model import head_of, new_reward_model, start_from
    from reward.training.run import judge
    from reward.training.trainer import plan_forward, train_preference_model
    from rlhf.data.comparisons import Counts, drawn
    from rlhf.data.readers.native import read_native
    from rlhf.tokenization.dialogue import load_dialogue

    dialogue = load_dialogue(recipe)

    @cache
    def data(number: int) -> tuple[Any, Any, Any]:
        """Training and held-out comparisons, and how to go over them."""
        train, held_out = (
            read_native(RUNS / recipe.name / "comparisons" / f"{part}.jsonl", "stop", Counts())
            for part in ("train", "held_out")
        )
        rows, exam = encode_split(drawn(train, number, recipe.seed), held_out, dialogue, print)
        fresh = new_reward_model(recipe, dialogue)
        return rows, exam, plan_forward(recipe, recipe.reward, fresh, [*rows, *exam], dialogue)

    def compute(unit: Unit, folder: Path) -> dict[str, Any]:
        arm, seed = unit.settings["arm"], unit.settings["seed"]
        rows, exam, plan = data(unit.settings["drawn"])
        model = new_reward_model(recipe, dialogue, seed)
        if arm != "none":
            start_from(model, _pretrained(recipe, arm) / MODEL)
        if arm in ("none", "lm"):  # no trained head: a random one would be noise beside those that have one
            torch.nn.init.zeros_(head_of(model).weight)
        trained = train_preference_model(
            recipe.model_copy(update={"seed": seed}),
            recipe.reward,
            dialogue,
            model,
            rows[: unit.settings["pairs"]],
            plan,
            folder=folder / f"{unit.kind}-{unit.key}",
        )
        figures, scores = judge(recipe, recipe.reward, trained, exam, dialogue, plan)
        flat_BK, ranks_BK, mask_BK = layout(exam)
        correct_B, pairs_B = pair_accuracy(scores[flat_BK], ranks_BK, mask_BK)
        lists = {"correct": correct_B.tolist(), "pairs": pairs_B.tolist()}
        return {"accuracy": figures["accuracy"].as_dict()} | lists

    return compute


def cells_of(results: Results) -> dict[str, Any]:
    """Accuracy of every arm and its difference to ``none`` on the same held-out comparisons."""
    cells: dict[str, Any] = {}
    for number in results.values("finetune", "pairs"):
        base_B, pairs_B = _correct(results, "none", number)
        for arm in (a for a in ARMS if a in results.values("finetune", "arm")):
            own_B, _ = _correct(results, arm, number)
            cell: dict[str, Any] = {"accuracy": cluster_mean_interval(own_B, pairs_B).as_dict()}
            if arm != "none":
                cell["difference"] = cluster_mean_interval(own_B - base_B, pairs_B).as_dict()
            cells[f"{arm}-{number}"] = cell
    return cells


def page(content: dict[str, Any]) -> str:
    """The table of pmp.json: a row an arm, a column a number of comparisons."""
    cells, numbers = content["cells"], content["numbers"]
    rows = []
    for arm in (a for a in ARMS if f"{a}-{numbers[0]}" in cells):
        row = [SHOWN.get(arm, arm)]
        for cell in (cells[f"{arm}-{number}"] for number in numbers):
            text = f"{cell['accuracy']['mean']:.3f}"
            if "difference" in cell:
                low, high = cell["difference"]["ci95"]
                text += f" ({cell['difference']['mean']:+.3f} [{low:+.3f}, {high:+.3f}])"
            row.append(text)
        rows.append(row)
    return table(["start", *(f"N = {n:,}" for n in numbers)], rows)


def _correct(results: Results, arm: str, number: int) -> tuple[Any, Any]:
    """Correct pairs of each held-out comparison, averaged over the seeds, and its pairs."""
    found = results.by_seed("finetune", arm=arm, pairs=number)
    return np.mean([f["correct"] for f in found], axis=0), np.asarray(found[0]["pairs"], dtype=float)


def _pretrained(recipe: Recipe, arm: str) -> Path:
    return RUNS / f"{recipe.name}-{arm}" / "pmp"


def main() -> None:
    """Run the study, or what is left of it."""
    parser = CommandLine(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", default="recipes/pmp.yaml")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    names = [SHOWN.get(arm, arm) for arm in ARMS]
    parser.add_argument("--arms", nargs="+", default=names, choices=names)
    parser.add_argument("--numbers", nargs="+", type=int, default=[50, 200, 800])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("docs/studies/pmp"))
    given = parser.parse_args()
    arms = [arm for arm in ARMS if SHOWN.get(arm, arm) in {*given.arms, "none"}]
    recipe = load(given.recipe, given.overrides)

    def stage(module: str, *more: str) -> None:
        """Run a stage the way its make target does."""
        command = [sys.executable, "-m", module, given.recipe, *given.overrides, *more]
        subprocess.run(command, check=True)

    stage("rlhf.collect")
    recipe = settled(recipe, RUNS / recipe.name)
    for arm in arms[1:]:
        stage("reward.pretraining", *ARMS[arm], f"name={recipe.name}-{arm}")
    units, work = units_of(recipe, arms, given.numbers, given.seeds), RUNS / recipe.name / "transfer"
    run(units, work, fine_tuning(recipe), say=say)
    pmp = {}
    for arm in arms[1:]:
        results = read_json(_pretrained(recipe, arm) / "manifest.json")["results"]
        pmp[arm] = {k: v for k, v in results.items() if k != "counts"}
    content = {"seeds": given.seeds, "numbers": given.numbers, "pmp": pmp}
    content["cells"] = cells_of(Results.read(units, work))
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomically(given.out / "pmp.json", json.dumps(content, indent=2) + "\n")
    write_atomically(given.out / "pmp.md", page(content))
    say(page(content))


if __name__ == "__main__":
    exit_on_user_error(main)
