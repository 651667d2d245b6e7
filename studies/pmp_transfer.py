"""What preference-model pre-training is worth: fine-tuning on N human comparisons from different starts.

``python -m studies.pmp_transfer --recipe RECIPE [--set section.key=value ...]``: the recipe says what is
pre-trained on (its ``pmp`` section) and what is fine-tuned on. Arms: ``none`` (fresh adapter and head),
``lm`` (language-model loss on the best public answers, the control that has seen the same texts), ``ranked``
and ``binarised`` PMP (Askell 2021, section 4; claim: PMP helps, most at few comparisons). All arms are judged
on the same held-out comparisons; every trained model is one JSON file, so an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import read_json, write_atomically, write_json
from rlhf.runs.stage import RUNS, StageRun
from rlhf.stats.intervals import cluster_mean_interval

ARMS = {
    "none": [],
    "lm": ["pmp.objective=imitation", "pmp.form=ranked"],
    "ranked": ["pmp.form=ranked"],
    "binarised": ["pmp.form=binarized"],
}


def stage(module: str, recipe: str, overrides: list[str]) -> None:
    """Run one stage the way its make target does."""
    subprocess.run([sys.executable, "-m", module, recipe, *overrides], check=True)


def fine_tuned(recipe: Recipe, work: Path, arms: list[str], numbers: list[int], seeds: list[int]) -> None:
    """Fine-tune every arm on the first N comparisons and judge it; the trunk is computed once for all."""
    import torch

    from reward.loss import pair_accuracy
    from reward.model.batch import encode, layout
    from reward.model.ensemble import MODEL
    from reward.model.model import head_of, new_reward_model, start_from
    from reward.training.run import drawn, judge, stored
    from reward.training.trainer import plan_forward, train_preference_model
    from rlhf.tokenization.dialogue import load_dialogue

    todo = [
        (s, n, a) for s in seeds for n in numbers for a in arms if not (work / f"{a}-{n}-{s}.json").is_file()
    ]
    if not todo:
        return
    dialogue = load_dialogue(recipe)
    home = StageRun("reward", RUNS / recipe.name / "reward", recipe, {}, {}, True, None)
    train = encode(drawn(stored(home, "train"), max(numbers), recipe.seed), dialogue)
    held_out = encode(stored(home, "held_out"), dialogue, first=len(train))
    plan = plan_forward(
        recipe, recipe.reward, new_reward_model(recipe, dialogue), [*train, *held_out], dialogue
    )
    flat_BK, ranks_BK, mask_BK = layout(held_out)
    for done, (seed, number, arm) in enumerate(todo):
        started = time.time()
        folder = work / f"{arm}-{number}-{seed}"
        run = StageRun("reward", folder, recipe, {}, {}, True, None)
        model = new_reward_model(recipe, dialogue, seed)
        if arm != "none":
            start_from(model, RUNS / f"{recipe.name}-{arm}" / "pmp" / MODEL)
        if recipe.reward.head_init == "zero" and arm in ("none", "lm"):  # these have no trained head
            torch.nn.init.zeros_(head_of(model).weight)
        seeded = recipe.model_copy(update={"seed": seed})
        trained = train_preference_model(
            seeded, recipe.reward, dialogue, model, train[:number], plan, folder=run.folder
        )
        figures, scores = judge(recipe, recipe.reward, trained, held_out, dialogue, plan)
        correct_B, pairs_B = pair_accuracy(scores[flat_BK], ranks_BK, mask_BK)
        result = {
            "arm": arm,
            "comparisons": number,
            "seed": seed,
            "accuracy": figures["accuracy"].as_dict(),
            "correct": correct_B.tolist(),
            "pairs": pairs_B.tolist(),
            "seconds": time.time() - started,
        }
        write_json(work / f"{arm}-{number}-{seed}.json", result)
        mean = figures["accuracy"].mean
        print(f"{done + 1}/{len(todo)}: {arm}, {number} comparisons, seed {seed}: {mean:.3f}", flush=True)


def table(work: Path, arms: list[str], numbers: list[int], seeds: list[int]) -> tuple[dict[str, Any], str]:
    """Accuracy of every arm and its difference to ``none`` on the same held-out comparisons."""
    cells: dict[str, Any] = {}
    for number in numbers:
        base = _correct(work, "none", number, seeds)
        for arm in arms:
            own = _correct(work, arm, number, seeds)
            pairs = own[1]
            cell: dict[str, Any] = {"accuracy": cluster_mean_interval(own[0], pairs).as_dict()}
            if arm != "none":
                cell["difference"] = cluster_mean_interval(own[0] - base[0], pairs).as_dict()
            cells[f"{arm}-{number}"] = cell
    head = "| start | " + " | ".join(f"N = {n:,}" for n in numbers) + " |"
    lines = [head, "|---|" + "---|" * len(numbers)]
    for arm in arms:
        words = [arm]
        for number in numbers:
            cell = cells[f"{arm}-{number}"]
            text = f"{cell['accuracy']['mean']:.3f}"
            if "difference" in cell:
                low, high = cell["difference"]["ci95"]
                text += f" ({cell['difference']['mean']:+.3f} [{low:+.3f}, {high:+.3f}])"
            words.append(text)
        lines.append("| " + " | ".join(words) + " |")
    return cells, "\n".join(lines) + "\n"


def _correct(work: Path, arm: str, number: int, seeds: list[int]) -> tuple[Any, Any]:
    """Correct pairs of each held-out comparison, averaged over the seeds, and its pairs."""
    found = [read_json(work / f"{arm}-{number}-{seed}.json") for seed in seeds]
    return np.mean([f["correct"] for f in found], axis=0), np.asarray(found[0]["pairs"], dtype=float)


def main() -> None:
    """Run the study, or what is left of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", default="recipes/pmp.yaml")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--numbers", nargs="+", type=int, default=[50, 200, 800])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("docs/studies/pmp"))
    given = parser.parse_args()
    arms = [a for a in ARMS if a in {*given.arms, "none"}]
    recipe = load(given.recipe, given.overrides)
    stage("rlhf.collect", given.recipe, given.overrides)
    for arm in arms:
        if arm != "none":
            own = [*given.overrides, *ARMS[arm], f"name={recipe.name}-{arm}"]
            stage("reward.pretraining", given.recipe, own)
    work = RUNS / recipe.name / "transfer"
    work.mkdir(parents=True, exist_ok=True)
    fine_tuned(recipe, work, arms, given.numbers, given.seeds)
    cells, text = table(work, arms, given.numbers, given.seeds)
    pmp = {}
    for arm in arms:
        if arm != "none":
            results = read_json(RUNS / f"{recipe.name}-{arm}" / "pmp" / "manifest.json")["results"]
            pmp[arm] = {k: v for k, v in results.items() if k != "counts"}
    given.out.mkdir(parents=True, exist_ok=True)
    summary = {"seeds": given.seeds, "numbers": given.numbers, "cells": cells, "pmp": pmp}
    write_atomically(given.out / "pmp.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(given.out / "pmp.md", text)
    print(text, flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
