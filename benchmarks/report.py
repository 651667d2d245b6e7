"""Figures of two sides: ratios of medians with targets, and the page and JSON file of a benchmark."""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import MEMORY, SIDES, Figures, gigabytes, machine
from rlhf.markdown import table
from rlhf.runs.artifacts import write_atomically, write_json

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Ratio:
    """A cost of theirs over the same cost of ours."""

    figure: str
    theirs: str
    """Case of theirs."""
    ours: str
    means: str
    target: float | None
    """At least so much is wanted; None = no target."""

    def over(self, runs: Sequence[Figures], figure: str) -> Figures:
        """:func:`ratio` of a figure of these two cases."""
        return ratio(raw(runs, self.theirs, "theirs", figure), raw(runs, self.ours, "ours", figure))


def raw(runs: Iterable[Figures], case: str, side: str, name: str) -> list[float]:
    """One figure of all runs of a side, in the order of the rounds."""
    chosen = [r for r in runs if (r["case"], r["side"]) == (case, side)]
    return [float(r[name]) for r in sorted(chosen, key=lambda r: r["round"])]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Figures:
    """Their median over our median; over 1 is to our favor where the figure is a cost.

    Args:
        theirs: a cost (seconds, bytes) of every run, by round.
        ours: the same of ours.

    Returns:
        ``value``, ``by_round``: the quotient of each round, and ``low`` and ``high``, their ends.

    Raises:
        ValueError: another number of rounds on each side, none, or a cost that is not positive.
    """
    if len(theirs) != len(ours) or not ours:
        raise ValueError(f"{len(theirs)} runs of theirs against {len(ours)} of ours")
    if min(*theirs, *ours) <= 0:
        raise ValueError("a cost is positive")
    each = [t / o for t, o in zip(theirs, ours, strict=True)]
    value = statistics.median(theirs) / statistics.median(ours)
    return {"value": value, "by_round": each, "low": min(each), "high": max(each)}


def against_targets(
    ratios: Mapping[str, Ratio], runs: Sequence[Figures], beside: Mapping[str, str]
) -> dict[str, Figures]:
    """Every ratio with its target, of those whose case of theirs was run.

    Args:
        ratios: by name.
        runs: figures of all children.
        beside: other figures whose ratio is given with that of a speed, by the name that it gets.
    """
    found: dict[str, Figures] = {}
    for name, what in ratios.items():
        if not raw(runs, what.theirs, "theirs", what.figure):
            continue
        values, also = what.over(runs, what.figure), {} if what.figure == MEMORY else beside
        reached = None if what.target is None else values["value"] >= what.target
        values |= {key: what.over(runs, figure)["value"] for key, figure in also.items()}
        found[name] = {**values, **asdict(what), "reached": reached}
    return found


def medians(runs: Sequence[Figures], cases: Iterable[str]) -> dict[str, dict[str, Figures]]:
    """The median of every figure that is one number, by case and side, of those that were run."""
    found: dict[str, dict[str, Figures]] = {}
    for case, side in itertools.product(cases, SIDES):
        some = [r for r in runs if (r["case"], r["side"]) == (case, side)]
        if some:
            names = [n for n, v in some[0].items() if type(v) in (int, float) and n not in ("place", "round")]
            found.setdefault(case, {})[side] = {n: statistics.median(r[n] for r in some) for n in names}
    return found


def check_same_work(runs: Sequence[Figures], names: Iterable[str], where: str) -> None:
    """All runs must have done the same work, whichever side they are of.

    Raises:
        RuntimeError: names the figure that differs.
    """
    for name in names:
        if any(r[name] != runs[0][name] for r in runs):
            found = [(r["side"], r[name]) for r in runs]
            raise RuntimeError(f"{where}: {name} differs between the runs: {found}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    add = parser.add_argument
    add("--base", default="models/smollm2-135m", help="folder of the base model")
    add("--rounds", type=int, default=3, help="times that every side of every case runs")
    add("--threads", type=int, default=2)
    add("--output", type=Path, default=None, help=f"folder of the results, {RESULTS} unless --quick")
    add("--quick", action="store_true", help="a tiny random model, one round: to see that it works")


def add_dtypes(parser: argparse.ArgumentParser) -> None:
    """The options for the types that both sides compute in."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our base")
    parser.add_argument(
        "--their-dtype",
        choices=("float32", "bfloat16", "autocast"),
        default="float32",
        help="of their base; autocast = float32 weights, products in bfloat16",
    )


def in_dtypes(settings: Figures) -> str:
    """The types of both sides in words, for the end of a sentence; older reports, all float32, do not say."""
    if "dtype" not in settings:
        return ""
    ours, theirs = settings["dtype"], settings["their_dtype"]
    words = {"autocast": "float32 under bfloat16 autocast"}
    return f"; ours in {ours}, theirs in {words.get(theirs, theirs)}"


def relative_name(word: str) -> str:
    """A path below the current folder as it is, any other by its last part."""
    option, equals, value = word.rpartition("=")
    path = Path(value).expanduser()
    elsewhere = path.is_absolute() or ".." in path.parts
    return f"{option}{equals}{path.name if elsewhere else value}"


def opening(module: str, words: Sequence[str], packages: Iterable[str], *, peer: bool = False) -> Figures:
    """Date, command and machine of a report, without a path of this machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *map(relative_name, words)]),
        "machine": machine(packages, peer=peer),
    }


def settings_of(arguments: argparse.Namespace, *elsewhere: str) -> Figures:
    """The options for the report, without the output and those whose files other entries name."""
    settings = {k: v for k, v in vars(arguments).items() if k not in (*elsewhere, "output")}
    return settings | {"base": "a tiny random model" if arguments.quick else relative_name(arguments.base)}


def heading(title: str, report: Figures) -> list[str]:
    """The first two paragraphs of a page: its title, the command, the machine."""
    host, settings = report["machine"], report.get("settings")
    versions = ", ".join(f"{name} {number}" for name, number in host["versions"].items())
    rounds, threads = (
        (f"rounds: {settings['rounds']}, ", f"{settings['threads']} threads, ") if settings else ("", "")
    )
    return [
        f"# {title}\n",
        f"`{report['command']}`, {report['date']}, {rounds}on {host['cores']} cores of {host['cpu']} "
        f"({host['memory_gb']} GB, {threads}load {host['load_average']} at the start); {versions}.\n",
    ]


def ratio_table(ratios: Mapping[str, Ratio], report: Figures, speed: Callable[[Figures], str]) -> str:
    """Both sides and their ratio, a line each; ``speed`` shows the speed among the medians of a side."""
    rows = []
    for name, found in report["ratios"].items():
        what, target = ratios[name], found["target"]
        shown = gigabytes if what.figure == MEMORY else speed
        rows.append(
            [
                f"{'memory' if what.figure == MEMORY else 'speed'}: {what.means}",
                shown(report["medians"][what.ours]["ours"]),
                shown(report["medians"][what.theirs]["theirs"]),
                f"{found['value']:.2f}",
                f"{found['low']:.2f} to {found['high']:.2f}",
                "" if target is None else f"{target:.1f}, {'reached' if found['reached'] else 'missed'}",
            ]
        )
    return table(("", "ours", "theirs", "theirs / ours (cost)", "rounds", "target"), rows)


def publish(name: str, report: Figures, text: str, folder: Path | None = RESULTS) -> None:
    """Print a page, and write ``name.md`` and its report ``name.json`` to a folder, if there is one."""
    print(f"\n{text}")
    if folder is not None:
        write_json(folder / f"{name}.json", report)
        write_atomically(folder / f"{name}.md", text)
        print(f"written: {relative_name(str(folder))}/{name}.json and {name}.md")


def output_of(arguments: argparse.Namespace) -> Path | None:
    """Folder of the results: the one that is named, else the kept one, but none with ``--quick``."""
    return arguments.output or (None if arguments.quick else RESULTS)
