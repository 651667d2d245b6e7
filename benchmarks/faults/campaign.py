"""Many kills of the PPO stage: where they fell, and whether the finished run differs from an undisturbed one.

The kills go to the phases of :data:`benchmarks.faults.killed_process.PHASES` in turn; where within a phase is
drawn.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.faults.killed_process import (
    BETWEEN,
    BRIEF,
    LAST,
    PHASES,
    STATEFUL,
    STEPS,
    Plan,
    Start,
    link_stages,
    outcome,
)


def phase_times(alone: Start) -> dict[str, tuple[float, float]]:
    """Visits a step and seconds a visit of every phase, in an undisturbed run."""
    seconds = collections.defaultdict(list)
    for name, duration in alone.visits():
        seconds[name].append(duration)
    return {name: (len(s) / STEPS, sum(s) / len(s)) for name, s in seconds.items()}


def draw(phase: str, known: Mapping[str, tuple[float, float]], rng: random.Random) -> Plan:
    """A moment in a phase, in one of the first two steps after a start."""
    visits, seconds = known[phase]
    within = 1 if phase in LAST else max(1, round(visits * rng.choice((1.0, 1.0, 2.0))))
    delay = rng.choice((0.0, float("inf"))) if phase in BRIEF else rng.uniform(0, seconds)
    return Plan(phase, rng.randrange(within), delay)


@dataclasses.dataclass
class Report:
    """Kills, starts and differences of a campaign."""

    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """By what the process was doing."""
    reached: set[str] = dataclasses.field(default_factory=set)
    """Phases that were not over at some kill; a call of the score function is inside a rollout."""
    runs: int = 0
    starts: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    """Differences from the undisturbed run, and starts that failed."""

    @property
    def killed(self) -> int:
        """All kills."""
        return sum(self.kills.values())


def kill_repeatedly(folder: Path, wanted: Mapping[str, Any], phases: Iterator[str], known: Mapping[str, Any],
                    rng: random.Random, report: Report, kills: int) -> None:  # fmt: skip
    """Kill one run up to so many times, let it end, and compare it with what is wanted."""
    report.runs += 1
    every = rng.choice((1, 2))  # the distance of checkpoints does not change the result
    overrides = (*STATEFUL, f"ppo.checkpoint_every={every}")
    for number in range(kills + 1):
        done = (folder / f"runs/tiny/ppo/checkpoints/step-{STEPS:07d}").is_dir()
        plan = draw(rng.choice(LAST) if done else next(phases), known, rng) if number < kills else None
        start = Start(folder, overrides, plan)
        report.starts += 1
        status = start.wait()
        if status == -signal.SIGKILL:
            within = start.killed_in()
            report.kills[within[-1] if within else BETWEEN] += 1
            report.reached.update(within)
            continue
        if status != 0:
            report.faults.append(f"run {report.runs}, {plan}: status {status}: {start.output()[-500:]}")
            return
        break
    found = outcome(folder)
    report.faults += [f"run {report.runs}: {key} differ" for key in wanted if found[key] != wanted[key]]


def campaign(source: Path, scratch: Path, kills: int, seed: int) -> Report:
    """Kill runs until there have been so many kills.

    Args:
        source: a folder that :func:`prepare` made.
        scratch: where the runs go.
        kills: how many at least.
        seed: of the moments.
    """
    rng, report = random.Random(f"faults, seed {seed}"), Report()
    whole = link_stages(source, scratch / "whole")
    alone = Start(whole)
    if alone.wait() != 0:
        raise RuntimeError(alone.output()[-2000:])
    wanted, known = outcome(whole), phase_times(alone)

    early = [phase for phase in PHASES if phase not in LAST]

    def in_turn() -> Iterator[str]:
        while True:
            yield from rng.sample(early, len(early))

    phases = in_turn()
    while report.killed < kills and not report.faults:
        folder = link_stages(source, scratch / f"run-{report.runs}")
        kill_repeatedly(folder, wanted, phases, known, rng, report, kills - report.killed)
    return report


def table(report: Report) -> str:
    """The report in Markdown."""
    rows = [
        f"| {phase}: {what} | {report.kills[phase]} |"
        for phase, what in (*PHASES.items(), (BETWEEN, "everything else"))
    ]
    wrong = "none" if not report.faults else "; ".join(report.faults)
    return "\n".join(
        [
            f"{report.killed} kills in {report.starts} starts of {report.runs} runs. Differences: {wrong}.",
            "",
            "| what the process was doing when it was killed | kills |",
            "|---|---|",
            *rows,
        ]
    )
