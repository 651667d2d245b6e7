"""What the benchmarks against trl share: children, their base, ratios with targets, where a report goes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, environment, ratio, raw, relative_name, run_child, write_results
from rlhf.errors import UserError
from rlhf.runs.artifacts import write_json

RESULTS = Path("benchmarks/results")
SIDES = ("ours", "theirs")


@dataclass(frozen=True)
class Ratio:
    """A figure of theirs over the same figure of ours."""

    figure: str
    theirs: str
    """Case of theirs."""
    ours: str
    words: str
    target: float | None
    """At least so much is wanted; None = told beside it, no target."""

    def over(self, runs: Sequence[Figures], figure: str) -> Figures:
        """:func:`benchmarks.harness.ratio` of a figure of these two cases."""
        return ratio(raw(runs, self.theirs, "theirs", figure), raw(runs, self.ours, "ours", figure))


def against_targets(
    ratios: Mapping[str, Ratio], runs: Sequence[Figures], beside: Mapping[str, Mapping[str, str]]
) -> dict[str, Figures]:
    """Every ratio with its target, of those whose case of theirs was run.

    Args:
        ratios: by name.
        runs: figures of all children.
        beside: by figure, others whose ratio is told beside it, by the name that it gets.
    """
    there = {(r["case"], r["side"]) for r in runs}
    found: dict[str, Figures] = {}
    for name, what in ratios.items():
        if (what.theirs, "theirs") not in there:
            continue
        values = what.over(runs, what.figure)
        also = {key: what.over(runs, figure)["value"] for key, figure in beside.get(what.figure, {}).items()}
        found[name] = {
            **values,
            **also,
            "figure": what.figure,
            "ours": what.ours,
            "theirs": what.theirs,
            "target": what.target,
            "reached": None if what.target is None else values["value"] >= what.target,
            "means": what.words,
        }
    return found


class Children:
    """The processes that do the work of a benchmark, one at a time.

    Args:
        command: a child's; the kind of work, the file of its task and that of its result follow.
        scratch: folder for these files.
        threads: of every child.
    """

    def __init__(self, command: Sequence[str], scratch: Path, threads: int) -> None:
        self.command, self.scratch, self.told = command, scratch, environment(threads)

    def ask(self, kind: str, values: dict[str, Any], told: dict[str, str] | None = None) -> Figures:
        """The figures of a child that has done this work; ``told``: another environment."""
        task, result = self.scratch / "task.json", self.scratch / "result.json"
        write_json(task, values)
        return run_child([*self.command, kind, str(task), str(result)], result, told or self.told)

    def base(self, arguments: argparse.Namespace, recipe: str) -> tuple[Path, int]:
        """Folder of the base, made tiny with ``--quick``, and its number of layers.

        Raises:
            UserError: it is not there; ``recipe`` is one that brings it.
        """
        base = self.scratch / "tiny" if arguments.quick else Path(arguments.base)
        if arguments.quick:
            self.ask("tiny", {"base": str(base)})
        if not (base / "config.json").is_file():
            raise UserError(f"--base: no model at {base}; run `make model RECIPE={recipe}` first")
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        return base, int(config["num_hidden_layers"])


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    add = parser.add_argument
    add("--base", default="models/smollm2-135m", help="folder of the base model")
    add("--rounds", type=int, default=3, help="times that every side of every case runs")
    add("--threads", type=int, default=2)
    add("--output", type=Path, default=None, help=f"folder of the results, {RESULTS} unless --quick")
    add("--quick", action="store_true", help="a tiny random model, one round: to see that it works")


def settings_of(arguments: argparse.Namespace, *elsewhere: str) -> Figures:
    """The options for the report, those apart whose files other entries name; no path of this machine."""
    settings = {k: v for k, v in vars(arguments).items() if k not in (*elsewhere, "output")}
    return settings | {"base": "a tiny random model" if arguments.quick else relative_name(arguments.base)}


def publish(arguments: argparse.Namespace, name: str, report: Figures, text: str) -> None:
    """Print a page; write it and its report, but with ``--quick`` only where a folder is named."""
    print(f"\n{text}")
    folder = arguments.output or (None if arguments.quick else RESULTS)
    if folder is not None:
        write_results(folder, name, report, text)
        print(f"written: {relative_name(str(folder))}/{name}.json and {name}.md")
