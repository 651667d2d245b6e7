"""The reward stage against ``trl.RewardTrainer``: comparisons a second, and peak memory.

    python -m benchmarks.reward                                     # made comparisons, needs no data
    python -m benchmarks.reward --comparisons hh/*.jsonl.gz         # real pairs
    python -m benchmarks.reward --quick                             # does it work? no timing

Both sides train the same base, adapter and head on the same token ids, with the same optimizer, schedule,
number of epochs and comparisons an optimizer step. They run in child processes, in turn; every ratio is the
median of theirs over the median of ours. Results: ``benchmarks/results/reward.json`` and ``reward.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import MEMORY, Children, Figures, Turn, turns
from benchmarks.report import (
    Ratio,
    add_dtypes,
    add_options,
    against_targets,
    check_same_work,
    heading,
    in_dtypes,
    medians,
    opening,
    output_of,
    publish,
    ratio_table,
    settings_of,
)
from rlhf.errors import CommandLine, UserError, exit_on_user_error
from rlhf.markdown import table
from rlhf.recipe.load import files_of
from rlhf.runs.artifacts import hash_of, write_json

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
CHILD = (sys.executable, "-m", "benchmarks.reward.sides")
MAX_TOKENS = 256
_SPEED = "s_per_comparison"
_BESIDE = {"by_processor_time": "cpu_s_per_comparison", "with_first_step": "whole_s_per_comparison"}
_EQUAL = ("comparisons", "comparisons_steady", "steps", "response_tokens", "trainable_parameters", "threads")


class Case(NamedTuple):
    """One comparison of the two sides."""

    responses: int
    top_third: bool
    """Only the last third of the layers has an adapter."""
    words: str


CASES = {
    "pairs_all_layers": Case(2, False, "pairs, all layers adapted"),
    "pairs_top_third": Case(2, True, "pairs, the top third of the layers adapted"),
    "k4": Case(4, False, "rankings of four, all layers adapted"),
}
_OTHER = "pairs, our top third against all layers of theirs (another adapter: not the same training)"


def _of_one_case(figure: str, case: str, target: float) -> Ratio:
    return Ratio(figure, case, case, CASES[case].words, target)


RATIOS = {
    "speed_ratio_pairs_all_layers": _of_one_case(_SPEED, "pairs_all_layers", 2.5),
    "speed_ratio_pairs_top_third": _of_one_case(_SPEED, "pairs_top_third", 3.0),
    "speed_ratio_top_third_against_all_layers": Ratio(
        _SPEED, "pairs_all_layers", "pairs_top_third", _OTHER, 3.0
    ),
    "speed_ratio_k4": _of_one_case(_SPEED, "k4", 10.0),
    "memory_ratio": _of_one_case(MEMORY, "pairs_all_layers", 1.0),
    "memory_ratio_pairs_top_third": _of_one_case(MEMORY, "pairs_top_third", 1.0),
    "memory_ratio_k4": _of_one_case(MEMORY, "k4", 1.0),
}

NOTES = [
    "Speed: comparisons a second of steady training. The first optimizer step is left out on both sides; "
    "time that ours spends before it on hidden states below the first adapted layer counts, by the share of "
    "comparisons that is left.",
    "k4: trl has no k-way loss, so there the same rankings are their C(4,2) = 6 pairs each, and 6 times as "
    "many pairs make a step; the throughput counts rankings, not pairs, on both sides.",
    "Memory: peak resident memory of the child process, from its start to the last step.",
    "Both sides read the same token ids (chat template, EOS behind every response), on the CPU. Of trl's "
    "defaults gradient checkpointing is off on both sides, and bf16 unless it is asked for (autocast).",
    "tokens_per_micro_batch cuts our step into micro-batches, their_pairs_at_once theirs (null = a step at "
    "once, as trl does unless told otherwise); neither changes the gradients.",
    "The losses are of different random heads: they show that both train, and are not equal.",
    "Positions a comparison: token positions, padding included, that go forward through the whole decoder; "
    "they depend on no machine.",
]
_WORK_HEAD = (
    "work of a run",
    "comparisons",
    "response tokens",
    "positions a comparison",
    "weights that learn",
    "loss, first to last step",
)


def _speed(figures: Figures) -> str:
    return f"{figures['comparisons_per_s']:.3f} /s"


def markdown(report: Figures) -> str:
    """The report as a page."""
    work = [
        [
            f"{CASES[case].words}: {side}",
            f"{figures['comparisons']:.0f}",
            f"{figures['response_tokens']:,.0f}",
            f"{figures['positions_per_comparison']:.0f}",
            f"{figures['trainable_parameters']:,.0f}",
            f"{figures['first_loss']:.3f} to {figures['final_loss']:.3f}",
        ]
        for case, sides in report["medians"].items()
        for side, figures in sides.items()
    ]
    page = heading("The reward stage against trl.RewardTrainer", report)
    if types := in_dtypes(report["settings"]):
        page.append(f"Speed, memory and work{types}.\n")
    page += [ratio_table(RATIOS, report, _speed), table(_WORK_HEAD, work)]
    return "\n".join([*page, *(f"- {note}" for note in report["notes"]), ""])


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(prog="python -m benchmarks.reward", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--comparisons", nargs="+", default=[], metavar="FILE", help="pairs; none = made with HH's lengths")
    add("--rankings", nargs="+", default=[], metavar="FILE", help="rankings of four or more; none = made")
    add("--pairs", type=int, default=40, help="pairs a child trains on")
    add("--ranked", type=int, default=8, help="rankings of four a child trains on")
    add("--pairs-a-step", type=int, default=8)
    add("--rankings-a-step", type=int, default=2)
    add("--epochs", type=int, default=1)
    add("--tokens-per-micro-batch", type=int, default=4096, help="of ours, as in a recipe")
    add("--their-pairs-at-once", type=int, default=None, help="of theirs; none = a whole step, its default")
    add_dtypes(parser)
    add_options(parser)
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.pairs, arguments.ranked, arguments.rounds = 8, 4, 1
        arguments.pairs_a_step, arguments.threads = 4, 1
    if min(arguments.pairs // arguments.pairs_a_step, arguments.ranked // arguments.rankings_a_step) < 2:
        raise UserError(
            "--pairs and --ranked: at least two optimizer steps are needed, the first is left out"
        )
    if arguments.rounds < 1 or arguments.threads < 1:
        raise UserError("--rounds and --threads: at least 1")
    for spec in (*arguments.comparisons, *arguments.rankings):
        if not files_of(spec):
            raise UserError(f"no file matches {spec}; check the path")
    return arguments


def collect(
    arguments: argparse.Namespace, child: Sequence[str], scratch: Path
) -> tuple[list[Figures], Figures]:
    """Prepare the rows, run all children; returns their figures and what the rows are."""
    children = Children(child, scratch, arguments.threads)
    base, layers = children.base(arguments, "recipes/hh.yaml")
    data: Figures = {}
    for responses, specs, number in (
        (2, arguments.comparisons, arguments.pairs),
        (4, arguments.rankings, arguments.ranked),
    ):
        files = [file for spec in specs for file in files_of(spec)]
        wanted = {"base": str(base), "files": files, "responses": responses, "number": number, "seed": 0,
                  "max_tokens": MAX_TOKENS, "scale": 0.15 if arguments.quick else 1.0}  # fmt: skip
        rows = children.ask("prepare", wanted)["rows"]
        write_json(scratch / f"rows-{responses}.json", {"rows": rows})
        data[f"responses_{responses}"] = {
            "source": [Path(f).name for f in files] or "made with the lengths of Anthropic HH",
            "comparisons": len(rows),
            "mean_prompt_tokens": statistics.mean(len(r["prompt"]) for r in rows),
            "mean_response_tokens": statistics.mean(len(t) for r in rows for t in r["responses"]),
            "sha256": hash_of(rows),
        }

    def task_of(turn: Turn) -> dict[str, Any]:
        case = CASES[turn.case]
        return {
            "base": str(base),
            "rows": str(scratch / f"rows-{case.responses}.json"),
            "layers": f"top_{max(1, layers // 3)}" if case.top_third else "all",
            "batch_size": arguments.pairs_a_step if case.responses == 2 else arguments.rankings_a_step,
            "epochs": arguments.epochs,
            "max_tokens": MAX_TOKENS,
            "tokens_per_micro_batch": arguments.tokens_per_micro_batch,
            "their_pairs_at_once": arguments.their_pairs_at_once,
            "dtype": arguments.dtype if turn.side == "ours" else arguments.their_dtype,
        }

    return children.run(turns(CASES, arguments.rounds), task_of, _speed), data


def benchmark(words: Sequence[str], child: Sequence[str] = CHILD) -> Figures:
    """Run the benchmark of a command line; prints the page, writes the results and returns them."""
    arguments = parse(words)
    report = {
        "benchmark": "reward stage against trl.RewardTrainer",
        **opening("benchmarks.reward", words, PACKAGES),
        "settings": settings_of(arguments, "comparisons", "rankings") | {"max_tokens": MAX_TOKENS},
    }
    with tempfile.TemporaryDirectory() as scratch:
        runs, data = collect(arguments, child, Path(scratch))
    for case in CASES:
        check_same_work([run for run in runs if run["case"] == case], _EQUAL, case)
    report |= {
        "data": data,
        "ratios": against_targets(RATIOS, runs, _BESIDE),
        "medians": medians(runs, CASES),
        "runs": runs,
        "notes": NOTES,
    }
    publish("reward", report, markdown(report), output_of(arguments))
    return report


def main() -> None:
    """The `bench-reward` target."""
    benchmark(sys.argv[1:])


if __name__ == "__main__":
    exit_on_user_error(main)
