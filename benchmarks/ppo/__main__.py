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

from benchmarks.harness import (
    Figures,
    Turn,
    command_line,
    machine,
    medians,
    now,
    raw,
    run_all,
    turns,
)
from benchmarks.paired_run import SIDES, Children, Ratio, add_options, against_targets, publish, settings_of
from benchmarks.peer import peer_folder, with_peer
from benchmarks.ppo.page import NOTES, markdown
from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import files_of
from rlhf.runs.artifacts import hash_of, write_json

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
PEER = ("trl", "1.12.0")
CHILD = (sys.executable, "-m", "benchmarks.ppo.sides")
PROMPTS = "recipes/prompts/sentiment_train.jsonl"
CASES = {
    "all_layers": "all layers adapted",
    "top_third": "the top third of the layers adapted",
}
_SPEED, _MEMORY = "s_per_step", "peak_bytes"

_ALL = "all layers adapted"
_TOP = "our top third against all layers of theirs, which cannot keep a trunk (another adapter)"
_SAME = "the top third adapted on both sides"
RATIOS = {
    "speed_ratio_all_layers": Ratio(_SPEED, "all_layers", "all_layers", _ALL, 1.5),
    "speed_ratio_top_third": Ratio(_SPEED, "all_layers", "top_third", _TOP, 4.0),
    "speed_ratio_top_third_same_layers": Ratio(_SPEED, "top_third", "top_third", _SAME, None),
    "memory_ratio": Ratio(_MEMORY, "all_layers", "all_layers", _ALL, 3.0),
    "memory_ratio_top_third": Ratio(_MEMORY, "all_layers", "top_third", _TOP, 3.0),
    "memory_ratio_top_third_same_layers": Ratio(_MEMORY, "top_third", "top_third", _SAME, None),
}

_EQUAL = ("rows", "prompt_tokens", "measured_steps", "threads")
_EQUAL_VERSIONS = ("torch", "transformers", "peft", "accelerate")


def check_same_work(runs: Sequence[Figures]) -> None:
    """All runs must have had the same prompts, steps, threads and libraries, and theirs the release meant.

    Raises:
        RuntimeError: names the figure that differs.
    """
    for name in _EQUAL:
        if len({r[name] for r in runs}) > 1:
            raise RuntimeError(f"{name} differs between the runs: {sorted({r[name] for r in runs})}")
    for name in _EQUAL_VERSIONS:
        found = {r["versions"][name] for r in runs}
        if len(found) > 1:
            raise RuntimeError(f"the version of {name} differs between the runs: {sorted(found)}")
    peers = {r["versions"]["trl"] for r in runs if r["side"] == "theirs"}
    if peers != {PEER[1]}:
        raise RuntimeError(f"theirs ran trl {sorted(peers)}, not {PEER[1]}")


def evaluate(runs: Sequence[Figures]) -> dict[str, Figures]:
    """Every ratio with its target; for speeds also ``by_token`` and ``by_processor_time``."""
    beside = {_SPEED: {"by_token": "s_per_token", "by_processor_time": "cpu_s_per_step"}}
    return against_targets(RATIOS, runs, beside)


def shares(runs: Sequence[Figures], peak: float) -> dict[str, dict[str, float]]:
    """Share of the matmul peak by case and side: the median run's operations a second over the peak's."""
    return {
        case: {
            side: statistics.median(found) / peak
            for side in SIDES
            if (found := raw(runs, case, side, "flops_per_s"))
        }
        for case in CASES
    }


def scales(batch: int, response: int) -> list[tuple[str, int, int, bool]]:
    """What ``--scaling`` runs: words, responses of a step, longest response, half the layers."""
    batches = [batch // 2, batch, 2 * batch]
    responses = [response // 2, 2 * response]
    return [
        *((f"batch {b}", b, response, False) for b in batches),
        *((f"response {r}", batch, r, False) for r in responses),
        ("random model, all layers", batch, response, False),
        ("random model, half the layers", batch, response, True),
    ]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ppo", description=(__doc__ or "").partition("\n")[0]
    )
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
    return arguments


def collect(
    arguments: argparse.Namespace, child: Sequence[str], scratch: Path, peer: Callable[..., Path]
) -> Figures:
    """Prepare the prompts, run all children; returns ``runs``, ``data``, ``scaling`` and ``matmul``."""
    children = Children(child, scratch, arguments.threads)
    ask, told = children.ask, children.told
    base, layers = children.base(arguments, "recipes/sentiment.yaml")
    if not files_of(arguments.prompts):
        raise UserError(f"--prompts: no file matches {arguments.prompts}; check the path")
    folder = peer(*PEER) if arguments.rounds else None

    wanted = {"base": str(base), "file": arguments.prompts, "shortest": arguments.shortest,
              "longest": arguments.longest, "seed": 0,
              "number": arguments.batch * (2 if arguments.scaling else 1)}  # fmt: skip
    rows = ask("prepare", wanted)["rows"]

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
            "threads": arguments.threads,
            **values,
        }

    def matmul() -> float:
        size = {"size": 64 if arguments.quick else 2048, "threads": arguments.threads}
        return float(ask("matmul", size)["flops_per_s"])

    def run(turn: Turn) -> Figures:
        values = task(arguments.batch, arguments.response, seed=turn.round)
        if turn.case == "top_third":
            values["layers"] = f"top_{max(1, layers // 3)}"
        if turn.side == "theirs":
            values["micro_batch"] = arguments.their_micro_batch
        figures = ask(
            turn.side, values, with_peer(told, folder) if folder and turn.side == "theirs" else told
        )
        print(
            f"round {turn.round + 1} of {arguments.rounds}, {turn.case}, {turn.side}: "
            f"{figures['s_per_step']:.2f} s a step, {figures['peak_bytes'] / 1e9:.2f} GB, "
            f"{figures['process_s']:.0f} s",
            flush=True,
        )
        return figures

    peaks = [matmul()]
    order = turns(list(CASES), SIDES, arguments.rounds)
    left_out = ("top_third", "theirs") if arguments.fewer else None
    runs = run_all([turn for turn in order if (turn.case, turn.side) != left_out], run)
    peaks.append(matmul())

    scaling: list[Figures] = []
    for words, batch, response, halved in scales(arguments.batch, arguments.response) * arguments.scaling:
        values = task(batch, response, steps=2)
        if words.startswith("random model"):
            parts = 2 if halved else 1
            values["base"] = str(scratch / f"random-{parts}")
            ask("random", {"base": str(base), "folder": values["base"], "parts": parts})
        figures = ask("ours", values)
        scaling.append({"words": words, **figures})
        print(f"scaling, {words}: {figures['s_per_step']:.2f} s a step", flush=True)
    return {
        "runs": runs,
        "scaling": scaling,
        "matmul": {"flops_per_s": max(peaks), "measured": peaks},
        "data": {
            "source": Path(arguments.prompts).name,
            "prompts": arguments.batch,
            "prompt_tokens": [len(row["ids"]) for row in rows[: arguments.batch]],
            "sha256": hash_of(rows),
        },
    }


def benchmark(
    words: Sequence[str], child: Sequence[str] = CHILD, peer: Callable[..., Path] = peer_folder
) -> Figures:
    """Run the benchmark of a command line; prints the page, writes the results and returns them.

    Args:
        words: the command line.
        child: the command of a child.
        peer: finds the folder of the peer's release.
    """
    arguments = parse(words)
    host = machine(PACKAGES)
    with tempfile.TemporaryDirectory() as scratch:
        measured = collect(arguments, child, Path(scratch), peer)
    runs, sides = measured["runs"], bool(arguments.rounds)
    report = {
        "benchmark": f"PPO against PPOTrainer of trl {PEER[1]}" if sides else "PPO: how its cost grows",
        "date": now(),
        "command": command_line("benchmarks.ppo", words),
        **(_both_sides(runs, measured["matmul"]["flops_per_s"]) if sides else {}),
        "machine": host,
        "settings": settings_of(arguments, "prompts"),
        "data": measured["data"],
        "matmul_peak": measured["matmul"],
        "scaling": measured["scaling"],
        "notes": NOTES if sides else [],
    }
    if sides:
        host["versions"]["trl"] = f"{PEER[1]} (theirs)"
    publish(arguments, "ppo" if sides else "ppo_scaling", report, markdown(report, CASES))
    return report


def _both_sides(runs: Sequence[Figures], peak: float) -> Figures:
    check_same_work(runs)
    ratios = evaluate(runs)
    return {
        **{name: found["value"] for name, found in ratios.items()},
        "matmul_share": shares(runs, peak),
        "ratios": ratios,
        "medians": medians(runs, CASES, SIDES),
        "runs": runs,
    }


def main() -> None:
    """The `bench-ppo` target."""
    benchmark(sys.argv[1:])


if __name__ == "__main__":
    exit_on_user_error(main)
