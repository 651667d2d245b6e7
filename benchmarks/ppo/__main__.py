"""PPO against ``PPOTrainer`` of trl 1.12.0, the last release that has it: seconds a step, peak memory.

    python -m benchmarks.ppo                # both sides, in turn, three rounds
    python -m benchmarks.ppo --scaling      # and how our cost grows with batch, response and model
    python -m benchmarks.ppo --scaling --rounds 0   # only that
    python -m benchmarks.ppo --quick        # does it work? no timing

Both sides run the same base, LoRA rank and targets, prompts (token ids), response length, batch and epochs,
in child processes of their own, in turn; every ratio is the median of theirs over the median of ours. Their
release lies in a folder of its own that only their process sees; everything else is the same installation.
Results: ``benchmarks/results/ppo.json`` and ``ppo.md``;
of the scaling alone ``ppo_scaling.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import MEMORY, PEER, Children, Figures, Turn, gigabytes, peer_folder, turns
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
    raw,
    settings_of,
)
from rlhf.errors import CommandLine, UserError, exit_on_user_error
from rlhf.markdown import table
from rlhf.recipe.load import files_of
from rlhf.runs.artifacts import hash_of, write_json

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
CHILD = (sys.executable, "-m", "benchmarks.ppo.sides")
PROMPTS = "recipes/prompts/sentiment_train.jsonl"
CASES = {
    "all_layers": "all layers adapted",
    "top_third": "the top third of the layers adapted",
}
_SPEED = "s_per_step"
_BESIDE = {"by_token": "s_per_token", "by_processor_time": "cpu_s_per_step"}
_EQUAL = ("rows", "prompt_tokens", "measured_steps", "threads", "versions")

_ALL = "all layers adapted"
_TOP = "our top third against all layers of theirs, which cannot keep a trunk (another adapter)"
_SAME = "the top third adapted on both sides"
RATIOS = {
    "speed_ratio_all_layers": Ratio(_SPEED, "all_layers", "all_layers", _ALL, 2.0),
    "speed_ratio_top_third": Ratio(_SPEED, "all_layers", "top_third", _TOP, 4.0),
    "speed_ratio_top_third_same_layers": Ratio(_SPEED, "top_third", "top_third", _SAME, None),
    "memory_ratio": Ratio(MEMORY, "all_layers", "all_layers", _ALL, 3.0),
    "memory_ratio_top_third": Ratio(MEMORY, "all_layers", "top_third", _TOP, 3.0),
    "memory_ratio_top_third_same_layers": Ratio(MEMORY, "top_third", "top_third", _SAME, None),
}

# ---------------------------------------------------------------- page

NOTES = [
    "The same on both sides: base, CPU and threads; LoRA rank, alpha and target modules; the "
    "prompts as token ids, all of them in every step; sampling from the whole distribution at temperature"
    " 1, a response ends at EOS or at the limit; batch, epochs, one minibatch an epoch; KL in the reward;"
    " penalty for a missing EOS; learning rate and epsilon of AdamW; versions of torch, transformers and "
    "peft.",
    "The value. Ours: a second LoRA adapter and a head on the one base. Theirs (PPOTrainer's own way): a "
    "model of its own, of which all weights learn; with --their-value lora it learns by an adapter like "
    "ours.",
    "The reward model. Both compute one with a fresh head. Ours: an adapter on the one base. Theirs: a "
    "model of its own.",
    "Only ours: log-probs of the sampled tokens taken once more in the training pass, checks of every "
    "rollout, and clipping of the gradient norm (PPOTrainer does not clip).",
    "Seconds a step: wall time from the end of one step to the end of the next; the first step of a run "
    "is left out. Memory: peak resident memory (VmHWM) of the child process, loading included.",
    "Responses are sampled, so their lengths differ a little between runs; tokens a second counts prompt "
    "and response tokens without padding, and by_token is the speed ratio with that difference taken out.",
    "score: everything between sampling and the first update. update: all epochs, and the log.",
    "micro_batch: responses that go through an update at once; it does not change the gradients of ours. "
    "Theirs generates and scores the whole batch at once.",
    "Share of the peak: operations that the step's matrix products need (benchmarks/ppo/task.py: linear "
    "maps, adapters, vocabulary head on response positions, real tokens only) a second, over the best of "
    "several products of two square matrices in the type of ours, by BLAS or oneDNN, with the same threads.",
    "The reward reached at equal samples is not compared here.",
]
_PHASES = (
    "a step, median of the runs",
    "seconds",
    "generate",
    "score",
    "update",
    "tokens/s",
    "response tokens",
    "peak memory",
    "share of the matmul peak",
    "weights that learn",
)
_SCALING = ("ours, all layers adapted", "tokens a step", "seconds a step", "ms a token", "GFLOP/s needed")


def markdown(report: Figures) -> str:
    """The report as a page."""
    settings, data, shares = report["settings"], report["data"], report.get("matmul_share", {})
    lengths = data["prompt_tokens"]
    page = [
        *heading(report["benchmark"], report),
        f"{settings['base']}: {settings['batch']} responses a step of at most {settings['response']} tokens "
        f"to prompts of {min(lengths)} to {max(lengths)} tokens (made of {data['source']}), "
        f"{settings['epochs']} epochs, {settings['micro_batch']} responses at once in our update"
        f"{in_dtypes(settings)}.\n",
    ]
    if "ratios" in report:
        value = {"full": "all its weights", "lora": "a LoRA adapter"}[settings["their_value"]]
        sides = [
            [
                f"{CASES[case]}: {side}",
                *(f"{found[name]:.2f}" for name in ("s_per_step", "generate_s", "score_s", "update_s")),
                f"{found['tokens_per_s']:.1f}",
                f"{found['mean_response_tokens']:.1f}",
                gigabytes(found),
                f"{shares[case][side]:.1%}",
                f"{found['trainable_parameters']:,.0f}",
            ]
            for case, of_case in report["medians"].items()
            for side, found in of_case.items()
        ]
        page += [
            f"Measured steps of a run: {settings['steps']}; {settings['their_micro_batch']} responses at "
            f"once in their update; their value model learns with {value}.\n",
            "Cost of theirs over cost of ours, medians of the runs; over 1 is to our favor.\n",
            ratio_table(RATIOS, report, _seconds),
            table(_PHASES, sides),
        ]
    page.append(f"Matmul peak: {report['matmul_peak']['flops_per_s'] / 1e9:,.1f} GFLOP/s.\n")
    if report["scaling"]:
        grown = [
            [
                found["words"],
                f"{found['prompt_tokens'] + found['response_tokens']:.0f}",
                f"{found['s_per_step']:.2f}",
                f"{1000 * found['s_per_token']:.2f}",
                f"{found['flops_per_s'] / 1e9:.1f}",
            ]
            for found in report["scaling"]
        ]
        page += [
            "How the cost of ours grows: linear where milliseconds a token stay the same; with half the "
            "layers they halve but for the vocabulary.\n",
            table(_SCALING, grown),
        ]
    return "\n".join([*page, *(f"- {note}" for note in report["notes"]), ""])


def _seconds(figures: Figures) -> str:
    return f"{figures['s_per_step']:.2f} s"


# ---------------------------------------------------------------- command line


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(prog="python -m benchmarks.ppo", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--prompts", default=PROMPTS, metavar="FILE", help="texts that prompts are joined of")
    add("--batch", type=int, default=16, help="responses a step")
    add("--shortest", type=int, default=16, help="tokens of the shortest prompt")
    add("--longest", type=int, default=64, help="tokens of the longest prompt")
    add("--response", type=int, default=48, help="longest response, tokens")
    add("--epochs", type=int, default=4, help="passes over a rollout")
    add("--steps", type=int, default=2, help="measured steps of a run, behind one that is not")
    add("--micro-batch", type=int, default=8, help="responses in an update at once, as in a recipe")
    add("--their-micro-batch", type=int, default=None, help="of theirs; none = the same")
    add("--their-value", choices=("full", "lora"), default="full", help="how their value model learns")
    add_dtypes(parser)
    add("--fewer", action="store_true", help="leave out theirs with the top third, which has no target")
    add("--scaling", action="store_true", help="also ours alone on other batches, responses and models")
    add_options(parser)
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.batch, arguments.response, arguments.epochs, arguments.micro_batch = 4, 8, 2, 2
        arguments.steps, arguments.rounds, arguments.threads = 1, 1, 1
    if arguments.their_micro_batch is None:
        arguments.their_micro_batch = arguments.micro_batch
    for name in ("batch", "response", "epochs", "steps", "rounds", "threads", "micro_batch", "shortest"):
        least = 0 if name == "rounds" and arguments.scaling else 1
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')}: at least {least}")
    if arguments.longest < arguments.shortest:
        raise UserError("--longest: at least --shortest")
    if arguments.scaling and min(arguments.batch, arguments.response) < 2:
        raise UserError("--scaling halves --batch and --response: at least 2 each")
    for name in ("micro_batch", "their_micro_batch"):
        micro = getattr(arguments, name)
        if micro < 1 or arguments.batch % min(micro, arguments.batch):
            raise UserError(f"--{name.replace('_', '-')} {micro}: use a divisor of --batch {arguments.batch}")
    if not files_of(arguments.prompts):
        raise UserError(f"--prompts: no file matches {arguments.prompts}; check the path")
    return arguments


def scales(batch: int, response: int) -> list[tuple[str, int, int, int]]:
    """What ``--scaling`` runs: words, responses of a step, longest response, 1 or 2 = half the layers."""
    return [
        *((f"batch {b}", b, response, 1) for b in (batch // 2, batch, 2 * batch)),
        *((f"response {r}", batch, r, 1) for r in (response // 2, 2 * response)),
        ("random model, all layers", batch, response, 1),
        ("random model, half the layers", batch, response, 2),
    ]


def collect(
    arguments: argparse.Namespace, child: Sequence[str], scratch: Path, peer: Callable[[], Path]
) -> Figures:
    """Prepare the prompts, run all children; returns ``runs``, ``data``, ``scaling`` and ``matmul_peak``."""
    children = Children(child, scratch, arguments.threads)
    base, layers = children.base(arguments, "recipes/sentiment.yaml")
    children.peer = peer() if arguments.rounds else None
    wanted = {"base": str(base), "file": arguments.prompts, "shortest": arguments.shortest,
              "longest": arguments.longest, "seed": 0,
              "number": arguments.batch * (2 if arguments.scaling else 1)}  # fmt: skip
    rows = children.ask("prepare", wanted)["rows"]

    def task(batch: int, response: int, **values: Any) -> dict[str, Any]:
        write_json(scratch / f"rows-{batch}.json", {"rows": rows[:batch]})
        return {
            "base": str(base),
            "rows": str(scratch / f"rows-{batch}.json"),
            "layers": "all",
            "response_tokens": response,
            "epochs": arguments.epochs,
            "steps": 1 + arguments.steps,
            "micro_batch": arguments.micro_batch,
            "value": arguments.their_value,
            "dtype": arguments.dtype,
            **values,
        }

    def task_of(turn: Turn) -> dict[str, Any]:
        ours = turn.side == "ours"
        micro = arguments.micro_batch if ours else arguments.their_micro_batch
        dtype = arguments.dtype if ours else arguments.their_dtype
        adapted = "all" if turn.case == "all_layers" else f"top_{max(1, layers // 3)}"
        return task(
            arguments.batch,
            arguments.response,
            layers=adapted,
            micro_batch=micro,
            dtype=dtype,
            seed=turn.round,
        )

    def matmul() -> float:
        wanted = {"size": 64 if arguments.quick else 2048, "dtype": arguments.dtype}
        return float(children.ask("matmul", wanted)["flops_per_s"])

    peaks = [matmul()]
    left_out = ("top_third", "theirs") if arguments.fewer else None
    order = [turn for turn in turns(CASES, arguments.rounds) if turn[1:] != left_out]
    runs = children.run(order, task_of, lambda figures: f"{_seconds(figures)} a step")
    peaks.append(matmul())

    scaling: list[Figures] = []
    for words, batch, response, parts in scales(arguments.batch, arguments.response) * arguments.scaling:
        values = task(batch, response, steps=2)
        if words.startswith("random model"):
            values["base"] = str(scratch / f"random-{parts}")
            children.ask("random", {"base": str(base), "folder": values["base"], "parts": parts})
        scaling.append({"words": words, **children.ask("ours", values)})
        print(f"scaling, {words}: {_seconds(scaling[-1])} a step", flush=True)
    return {
        "runs": runs,
        "scaling": scaling,
        "matmul_peak": {"flops_per_s": max(peaks), "measured": peaks},
        "data": {
            "source": Path(arguments.prompts).name,
            "prompts": arguments.batch,
            "prompt_tokens": [len(row["ids"]) for row in rows[: arguments.batch]],
            "sha256": hash_of(rows),
        },
    }


def both_sides(runs: Sequence[Figures], peak: float) -> Figures:
    """Every ratio, and the share of the matmul peak: the median run's operations a second over the peak's."""
    check_same_work(runs, _EQUAL, "both sides")
    ratios = against_targets(RATIOS, runs, _BESIDE)
    middle = medians(runs, CASES)
    shares = {
        case: {side: statistics.median(raw(runs, case, side, "flops_per_s")) / peak for side in sides}
        for case, sides in middle.items()
    }
    return {
        **{name: found["value"] for name, found in ratios.items()},
        "matmul_share": shares,
        "ratios": ratios,
        "medians": middle,
        "notes": NOTES,
    }


def benchmark(
    words: Sequence[str], child: Sequence[str] = CHILD, peer: Callable[[], Path] = peer_folder
) -> Figures:
    """Run the benchmark of a command line; prints the page, writes the results and returns them.

    Args:
        words: the command line.
        child: the command of a child.
        peer: finds the folder of the peer's release.
    """
    arguments = parse(words)
    sides = bool(arguments.rounds)
    report = {
        "benchmark": f"PPO against PPOTrainer of trl {PEER[1]}" if sides else "PPO: how its cost grows",
        **opening("benchmarks.ppo", words, PACKAGES, peer=sides),
        "settings": settings_of(arguments, "prompts"),
        "notes": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        report |= collect(arguments, child, Path(scratch), peer)
    if sides:
        report |= both_sides(report["runs"], report["matmul_peak"]["flops_per_s"])
    publish("ppo" if sides else "ppo_scaling", report, markdown(report), output_of(arguments))
    return report


def main() -> None:
    """The `bench-ppo` target."""
    benchmark(sys.argv[1:])


if __name__ == "__main__":
    exit_on_user_error(main)
