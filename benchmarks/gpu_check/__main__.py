"""The command line: ``python -m benchmarks.gpu_check [--quick] [--minutes 10] [--parts NAME ...]``.

Writes ``gpu-check.json`` and ``gpu-check.md`` after every part, so that what was found stands whatever ends
the check. Exit status 1 where a part failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_check import report
from benchmarks.gpu_check.parts import PARTS, Machine, Part, run
from benchmarks.gpu_check.roads import Deadline
from benchmarks.harness import Figures
from rlhf.errors import CommandLine, UserError, exit_on_user_error
from rlhf.runs.artifacts import write_atomically, write_json
from rlhf.training.launch import visible_gpus


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--quick", action="store_true", help="a few parts, small: does the check work?")
    parser.add_argument("--minutes", type=float, default=10.0, help="what would end later is left out")
    parser.add_argument("--parts", nargs="+", choices=names, default=None, help="only these")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the two files")
    arguments = parser.parse_args(words)
    if arguments.minutes <= 0:
        raise UserError(f"--minutes {arguments.minutes:g}: more than 0")
    return arguments


def chosen(arguments: argparse.Namespace) -> list[Part]:
    """The parts that the command line asks for, in order."""
    if arguments.parts:
        return [part for part in PARTS if part.name in arguments.parts]
    return [part for part in PARTS if part.quick or not arguments.quick]


def check(parts: Sequence[Part], machine: Machine, minutes: float, output: Path, command: str) -> Figures:
    """Do the parts one after the other; returns gpu-check.json, which is written after each."""
    whole, started = Deadline(60 * minutes), time.monotonic()
    content: Figures = {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": {},
        "parts": [],
    }
    output.mkdir(parents=True, exist_ok=True)
    for part in parts:
        began = time.monotonic()
        found = run(part, machine, whole.left)
        row = {"name": part.name, "what": part.what, **found, "seconds": time.monotonic() - began}
        content["parts"].append(row)
        if part.name == "device":
            content["device"] = found.get("figures", {})
        content["seconds"] = time.monotonic() - started
        told = found.get("why") or report.line(found["figures"])
        print(f"{part.name}: {found['state']} in {row['seconds']:.0f} s: {told}", flush=True)
        write_json(output / "gpu-check.json", content)
        write_atomically(output / "gpu-check.md", report.page(content))
    return content


def main() -> None:
    """The `gpu-check` target."""
    words = sys.argv[1:]
    arguments = parse(words)
    machine = Machine(len(visible_gpus(os.environ)), arguments.quick)
    command = " ".join(["python -m benchmarks.gpu_check", *words])
    content = check(chosen(arguments), machine, arguments.minutes, arguments.output, command)
    print(f"written: {arguments.output / 'gpu-check.md'}")
    sys.exit(any(part["state"] == "failed" for part in content["parts"]))


if __name__ == "__main__":
    exit_on_user_error(main)
