"""The gold reward of our PPO, trl 1.12's ``PPOTrainer`` and the installed trl's RLOO and GRPO trainers.

    python -m benchmarks.gold RECIPE [--seeds 0 1 2] [--peers ppo rloo grpo] [section.key=value ...]

For every seed: comparisons and reward model by the project's own stages, then ours and the peers, one after
the other, trained against that reward model with the recipe's numbers on as many responses; then all of
them answer the held-out prompts, with one sampler and the same random numbers, and the recipe's gold judge
scores them: at equal samples and at equal seconds of training. What is finished stays in
``runs/benchmarks/gold`` and is not done again. Results: ``benchmarks/results/gold.json`` and ``gold.md``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gold.figures import compared
from benchmarks.gold.page import markdown, notes_of
from benchmarks.gold.plan import PEERS, check, check_variants
from benchmarks.harness import PEER, Children, Figures, environment, peer_folder, usable_cores
from benchmarks.report import RESULTS, opening, publish
from rlhf.errors import USER_ERROR_STATUS, CommandLine, UserError, exit_on_user_error
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import WEIGHTS, hash_of, read_json, sha256_of, write_json
from rlhf.runs.dtype import settled
from rlhf.runs.stage import RUNS

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")
CHILD = (sys.executable, "-m", "benchmarks.gold.sides")
STAGES = ("rlhf.models.prepare", "rlhf.collect", "reward.training")
KEPT = RUNS / "benchmarks" / "gold"
THREADS = usable_cores()
SHARED = ("seed", "model", "lora", "dialogue", "data", "ppo")
"""Sections of the recipe that a policy depends on, besides its reward model."""
QUICK = ("recipes/tiny.yaml", "ppo.steps=4")


def run_stage(module: str, words: Sequence[str]) -> None:
    """Run one stage of the project; a finished one says so and ends.

    Raises:
        SystemExit: it refused something; its own line has been shown.
        UserError: it failed otherwise.
    """
    told = {**os.environ, **environment(THREADS)}
    done = subprocess.run([sys.executable, "-m", module, *words], env=told, check=False)
    if done.returncode == USER_ERROR_STATUS:
        sys.exit(USER_ERROR_STATUS)
    if done.returncode:
        raise UserError(f"{module} ended with status {done.returncode}; see its lines above")


class Seed:
    """One seed of the comparison: its run, and what of its sides is finished.

    Args:
        recipe_file: the recipe.
        overrides: of the recipe.
        seed: its number.
        every: steps from mark to mark.
        child: the command of a child.
        peer: finds the folder of the release that has PPO.
        variants: further sides of ours, by what they override.
    """

    def __init__(
        self,
        recipe_file: str,
        overrides: Sequence[str],
        seed: int,
        every: int,
        child: Sequence[str],
        peer: Callable[[], Path],
        variants: Sequence[str] = (),
    ) -> None:
        name = f"{load(recipe_file, overrides).name}-gold-{seed}"
        self.words = [recipe_file, *overrides, f"seed={seed}", f"name={name}"]
        self.run, self.every, self.child, self.peer = RUNS / name, every, child, peer
        self.variants = variants

    def overrides(self, side: str = "ours") -> list[str]:
        """What this seed and a side override of the recipe."""
        return [*self.words[1:], *(side.split() if side in self.variants else ())]

    def recipe(self, side: str = "ours") -> Recipe:
        """A side's recipe of this seed, with the type of weights that its run has."""
        return settled(load(self.words[0], self.overrides(side)), self.run, measured=False)

    def ask(self, kind: str, side: str, **values: Any) -> Figures:
        """What a child has found that does one kind of work."""
        with tempfile.TemporaryDirectory() as scratch:
            children = Children(
                self.child, Path(scratch), THREADS, peer=self.peer() if side == "ppo" else None
            )
            task = {"recipe": self.words[0], "overrides": self.overrides(side), "run": str(self.run)}
            return children.ask(kind, {**task, **values})

    def place(self, side: str) -> Path:
        """The folder of a side, by what its policy depends on."""
        recipe = self.recipe(side).model_dump(mode="json", include={*SHARED})
        side = "ours" if side in self.variants else side
        release = {"ours": "", "ppo": PEER[1]}.get(side, importlib.metadata.version("trl"))
        reward = [sha256_of(file) for file in sorted((self.run / "reward").rglob(WEIGHTS))]
        key = hash_of([recipe, reward, side, release, self.every])[:12]
        return KEPT / f"{self.run.name}-{side}-{key}"

    def train(self, side: str) -> Figures:
        """The marks of a side, which is trained where it is not finished."""
        place = self.place(side)
        done = place / "trained.json"
        if not done.is_file():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            kind = "theirs" if side == "ppo" else "ours" if side in self.variants else side
            found = self.ask(kind, side, folder=str(place), every=self.every)
            shutil.rmtree(place / "trainer", ignore_errors=True)
            write_json(done, found)
        found = read_json(done)
        print(f"{self.run.name}, {side}: {found['marks'][-1]['seconds']:.0f} s of training", flush=True)
        return dict(found)

    def judged(self, trained: dict[str, Figures]) -> dict[str, Figures]:
        """The record of this seed: gold, KL and length of the reference and at all marks."""
        evaluate = self.recipe().evaluate.model_dump(mode="json")
        file = f"judged-{hash_of([evaluate])[:12]}.json"
        places = {side: self.place(side) for side in ("reference", *trained)}
        adapters: dict[str, str | None] = {}
        for side, place in places.items():
            if not (place / file).is_file():
                marks = trained[side]["marks"] if side in trained else []
                adapters |= {f"{place}#{m['step']}": str(place / f"step-{m['step']}") for m in marks}
                adapters |= {} if marks else {f"{place}#0": None}
        if adapters:
            found = self.ask("judge", "", adapters=adapters)
            for place in places.values():
                own = {name.split("#")[1]: f for name, f in found.items() if name.split("#")[0] == str(place)}
                if own:
                    write_json(place / file, own)
        kept = {side: read_json(place / file) for side, place in places.items()}
        record = {
            side: {**one, "marks": [{**mark, **kept[side][str(mark["step"])]} for mark in one["marks"]]}
            for side, one in trained.items()
        }
        return {"reference": kept["reference"]["0"], **record}


def compare(
    recipe_file: str,
    overrides: Sequence[str],
    seeds: Sequence[int],
    peers: Sequence[str],
    *,
    variants: Sequence[str] = (),
    every: int = 2,
    child: Sequence[str] = CHILD,
    peer: Callable[[], Path] = peer_folder,
    stage: Callable[[str, Sequence[str]], None] = run_stage,
    output: Path | None = RESULTS,
    words: Sequence[str] = (),
) -> Figures:
    """Train and judge every side of every seed, write the page; returns the report.

    Args:
        recipe_file: the recipe.
        overrides: of the recipe.
        seeds: numbers of the seeds.
        peers: of :data:`PEERS`.
        variants: overrides of ``ppo``, words apart by blanks: ours once more with each of them.
        every: steps from mark to mark.
        child: the command of a child.
        peer: finds the folder of the release that has PPO.
        stage: runs one stage of the project.
        output: folder of the results.
        words: the command line, for the report.

    Raises:
        UserError: a stage failed, or theirs has not what the recipe asks for.
    """
    for seed in seeds:
        check(load(recipe_file, [*overrides, f"seed={seed}"]))
    check_variants(recipe_file, overrides, variants)
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: {output} cannot be made ({error.strerror})") from None
    began = opening("benchmarks.gold", words, PACKAGES, peer="ppo" in peers)
    if "ppo" in peers:  # the newer release is that of the others
        began["machine"]["versions"] |= {
            "trl": f"{importlib.metadata.version('trl')}, {PEER[1]} (PPOTrainer)"
        }
        peer()
    records = {}
    for number, seed in enumerate(seeds):
        one = Seed(recipe_file, overrides, seed, every, child, peer, variants)
        for module in STAGES:
            stage(module, one.words)
        sides = ["ours", *variants, *peers]
        turn = number % len(sides)  # what one leaves behind helps or hurts each alike
        trained = {side: one.train(side) for side in sides[turn:] + sides[:turn]}
        records[str(seed)] = one.judged({side: trained[side] for side in sides})
    recipe = one.recipe()
    ppo = recipe.ppo
    report = {
        "benchmark": "gold reward at equal samples and at equal wall time",
        **began,
        "seeds": [*seeds],
        "judge": recipe.evaluate.judge,
        "dtype": recipe.model.dtype,
        "prompts": len(records[str(seeds[0])]["reference"]["gold"]),
        "work": {"responses": ppo.steps * ppo.batch_size, "steps": ppo.steps, "batch": ppo.batch_size},
        **compared(records),
        "peak_bytes": {
            seed: {side: part["peak_bytes"] for side, part in record.items() if side != "reference"}
            for seed, record in records.items()
        },
        "records": records,
        "notes": notes_of(sides),
    }
    publish("gold" if peers else "gold_settings", report, markdown(report), output)
    return report


def main() -> None:
    """The command line."""
    words = sys.argv[1:]
    given = {n for n, word in enumerate(words) if n and words[n - 1] == "--variant"}
    overrides = [
        word for n, word in enumerate(words) if "=" in word and not word.startswith("-") and n not in given
    ]
    parser = CommandLine(prog="python -m benchmarks.gold", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("recipe", nargs="?", help="an experiment, for example recipes/sentiment.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=None, help="none with --variant alone")
    variant = "'ppo.KEY=VALUE ...': ours once more with it; may be given several times"
    parser.add_argument("--variant", dest="variants", action="append", default=[], help=variant)
    parser.add_argument("--every", type=int, default=2, help="steps from mark to mark")
    parser.add_argument("--output", type=Path, default=None, help=f"folder, {RESULTS} unless --quick")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, the first seed alone")
    found = parser.parse_args([w for n, w in enumerate(words) if n in given or w not in overrides])
    if not found.quick and not found.recipe:
        raise UserError("no recipe given; write RECIPE, for example recipes/sentiment.yaml")
    if found.every < 1:
        raise UserError(f"--every {found.every}: marks are at least one step apart; give 1 or more")
    if found.quick and found.recipe:
        raise UserError(f"--quick has a recipe of its own; leave out {found.recipe}")
    if len({*found.seeds}) < len(found.seeds):
        raise UserError("--seeds: a seed stands twice; give it once")
    recipe, *small = QUICK if found.quick else (found.recipe,)
    compare(
        recipe,
        [*small, *overrides],
        found.seeds[:1] if found.quick else found.seeds,
        found.peers if found.peers is not None else [] if found.variants else PEERS,
        variants=found.variants,
        every=found.every,
        output=found.output or (None if found.quick else RESULTS),
        words=words,
    )


if __name__ == "__main__":
    exit_on_user_error(main)
