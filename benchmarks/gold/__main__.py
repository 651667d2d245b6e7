"""The reward that PPO reaches at equal samples: a finished run of ours against ``PPOTrainer`` of trl 1.12.0.

    make rlhf RECIPE=recipes/sentiment.yaml
    python -m benchmarks.gold recipes/sentiment.yaml [section.key=value ...]

Theirs trains on the run's own prompts, against the run's own reward model, with the recipe's numbers: steps,
batch, minibatches, epochs, adapter, KL, clips, learning rate of the policy. Then both policies answer the
held-out prompts, with one sampler and the same random numbers, and the recipe's gold judge scores them.
Results: ``benchmarks/results/gold.json`` and ``gold.md``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import Children, Figures, peer_folder
from benchmarks.report import RESULTS, heading, opening, publish
from rlhf.errors import UserError, exit_on_user_error
from rlhf.markdown import table
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import MANIFEST, read_json
from rlhf.runs.stage import RUNS

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
CHILD = (sys.executable, "-m", "benchmarks.gold.sides")
PLAIN = {
    "algorithm": "ppo",
    "kl_controller": "fixed",
    "kl_in": "reward",
    "missing_eos": "ignore",
    "samples_per_prompt": 1,
    "dual_clip": None,
    "reward_model": [],
    "start": None,
    "ptx_coef": 0.0,
    "score_clip": None,
    "score_normalization": "none",
    "value": "adapter",
    "length_penalty": 0.0,
}
"""What theirs can do, of the keys of ``ppo`` that it does not have."""
NOTES = [
    "The same on both sides: base, adapter, prompts, reward model (merged into a plain classifier for "
    "theirs), number of responses, epochs, minibatches, KL coefficient and estimator, clips, value "
    "coefficient, gamma, lambda, schedule, epsilon of AdamW, seed. The order of the prompts and the random "
    "numbers of sampling in training are each side's own.",
    "theirs has one learning rate for policy and value: the policy's. Its value is the merged reward model "
    "with an adapter of the same shape, as all its weights do not bear that rate.",
    "The reward model reads its score on EOS. trl reads a response that was cut at the limit on its last "
    "token, where this model was never trained; so for theirs EOS is put behind such a response before it is "
    "scored, as ours does.",
    "Wall time is what the clock said beside whatever else ran on the machine; `make bench-ppo` compares "
    "speed.",
]


def check(recipe: Recipe) -> None:
    """The run must be finished, and theirs must have what the recipe asks for.

    Raises:
        UserError: names what is missing, or the option that trl's PPOTrainer does not have.
    """
    for stage in ("comparisons", "reward", "ppo"):
        if not (RUNS / recipe.name / stage / MANIFEST).is_file():
            raise UserError(
                f"{RUNS / recipe.name / stage} is not complete: run `make rlhf` with this recipe first"
            )
    if recipe.evaluate.judge == "reward":
        raise UserError("evaluate.judge: a gold judge is wanted, for example evaluate.judge=vader")
    for name, plain in PLAIN.items():
        found = getattr(recipe.ppo, name)
        if found != plain:
            raise UserError(f"ppo.{name}: theirs has no {found!r}; set ppo.{name}={plain}")


def markdown(report: Figures) -> str:
    """The report as a page."""
    gold, length, kl, work = (report[name] for name in ("gold", "response_length", "kl", "work"))
    low, high = gold["ci95"]
    rows = [
        ["reference", f"{report['reference']['gold']:.3f}", f"{report['reference']['length']:.1f}", "", ""],
        *(
            [name, f"{gold[when]:.3f}", f"{length[when]:.1f}", f"{kl[side]:.2f}",
             f"{work[f'{side}_seconds']:.0f} s"]
            for name, side, when in (("trl 1.12.0", "theirs", "before"), ("ours", "ours", "after"))
        ),
    ]  # fmt: skip
    head = ("policy", "gold score", "tokens a response", "KL from the reference, nats", "training, wall time")
    return "\n".join(
        [
            *heading("Gold reward at equal samples, against trl's last PPOTrainer", report),
            f"{work['responses']} responses on each side ({work['steps']} steps of {work['batch']}), then "
            f"{gold['n']} held-out prompts, judged by {report['judge']}.\n",
            table(head, rows),
            f"Ours less theirs, paired by prompt: {gold['diff']:+.3f} [{low:+.3f}, {high:+.3f}] (95%).\n",
            *(f"- {note}" for note in report["notes"]),
            "",
        ]
    )


def compare(
    recipe_file: str,
    overrides: Sequence[str],
    child: Sequence[str] = CHILD,
    peer: Callable[[], Path] = peer_folder,
    output: Path = RESULTS,
) -> Figures:
    """Train theirs, judge both, write the page; returns the report.

    Args:
        recipe_file: the recipe of the finished run.
        overrides: of the recipe.
        child: the command of a child.
        peer: finds the folder of the peer's release.
        output: folder of the results.

    Raises:
        UserError: the run is not finished, or theirs has not what the recipe asks for.
    """
    recipe = load(recipe_file, overrides)
    check(recipe)
    ppo, run = recipe.ppo, (RUNS / recipe.name).absolute()
    with tempfile.TemporaryDirectory() as folder:
        children = Children(child, Path(folder), threads=2, peer=peer())
        task = {
            "recipe": str(Path(recipe_file).absolute()),
            "overrides": [*overrides],
            "run": str(run),
            "adapter": str(Path(folder) / "adapter"),
        }
        trained = children.ask("theirs", task)
        print(f"theirs: {trained['seconds']:.0f} s", flush=True)
        judged = children.ask("judge", task)
    report = {
        "benchmark": "gold reward at equal samples",
        **opening("benchmarks.gold", [recipe_file, *overrides], PACKAGES, peer=True),
        "judge": recipe.evaluate.judge,
        "work": {
            "responses": ppo.steps * ppo.batch_size,
            "steps": ppo.steps,
            "batch": ppo.batch_size,
            "theirs_seconds": trained["seconds"],
            "ours_seconds": read_json(run / "ppo" / MANIFEST)["seconds"],
        },
        **judged,
        "theirs": trained,
        "notes": NOTES,
    }
    publish("gold", report, markdown(report), output)
    return report


def main() -> None:
    """The command line."""
    if len(sys.argv) < 2:
        raise UserError(
            "no recipe given; write RECIPE [section.key=value ...], for example recipes/sentiment.yaml"
        )
    compare(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    exit_on_user_error(main)
