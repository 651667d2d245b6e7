"""The command line: ``python -m benchmarks.faults [--kills N] [--seed N] [--write PAGE]``.

The kills go to the phases of :data:`benchmarks.faults.killed_process.PHASES` in turn; where within a phase is
drawn.
"""

from __future__ import annotations

import collections
import math
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import faults
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
    prepare,
)
from rlhf.errors import CommandLine, exit_on_user_error
from rlhf.runs.artifacts import write_atomically


class Campaign:
    """Many kills of the PPO stage: where they fell, and what differs from an undisturbed run.

    Args:
        alone: the undisturbed run, finished.
        seed: of the moments.
    """

    def __init__(self, alone: Start, seed: int) -> None:
        self.wanted = outcome(alone.root)
        self.rng = random.Random(f"faults, seed {seed}")
        self.phases = self._in_turn()
        seconds = collections.defaultdict(list)
        for name, duration in alone.phases()[0]:
            seconds[name].append(duration)
        self.known = {name: (len(s) / STEPS, sum(s) / len(s)) for name, s in seconds.items()}
        """Visits a step and seconds a visit of every phase."""
        self.kills: collections.Counter[str] = collections.Counter()
        """By what the process was doing."""
        self.reached: set[str] = set()
        """Phases that were not over at some kill; a call of the score function is inside a rollout."""
        self.runs = self.starts = 0
        self.faults: list[str] = []
        """Differences from the undisturbed run, and starts that failed."""

    def _in_turn(self) -> Iterator[str]:
        early = [phase for phase in PHASES if phase not in LAST]
        while True:
            yield from self.rng.sample(early, len(early))

    def _moment(self, phase: str) -> Plan:
        """A moment in a phase, in one of the first two steps after a start."""
        rng, (visits, seconds) = self.rng, self.known[phase]
        within = 1 if phase in LAST else max(1, round(visits * rng.choice((1.0, 1.0, 2.0))))
        delay = rng.choice((0.0, math.inf)) if phase in BRIEF else rng.uniform(0, seconds)
        return Plan(phase, rng.randrange(within), delay)

    def run(self, folder: Path, kills: int) -> None:
        """Kill one run up to so many times, let it end, and compare it with what is wanted."""
        self.runs += 1
        every = self.rng.choice((1, 2))  # the distance of checkpoints does not change the result
        overrides = (*STATEFUL, f"ppo.checkpoint_every={every}")
        for number in range(kills + 1):
            done = (folder / f"runs/tiny/ppo/checkpoints/step-{STEPS:07d}").is_dir()
            phase = self.rng.choice(LAST) if done else next(self.phases)
            plan = self._moment(phase) if number < kills else None
            start = Start(folder, overrides, plan)
            self.starts += 1
            status = start.wait()
            if status == -signal.SIGKILL:
                within = start.phases()[1]
                self.kills[within[-1] if within else BETWEEN] += 1
                self.reached.update(within)
            elif status != 0:
                self.faults.append(f"run {self.runs}, {plan}: status {status}: {start.output()[-500:]}")
                return
            else:
                break
        found = outcome(folder)
        self.faults += [f"run {self.runs}: {key} differ" for key in found if found[key] != self.wanted[key]]

    def table(self) -> str:
        """The report in Markdown."""
        wrong = "; ".join(self.faults) or "none"
        words = {**{phase: what for phase, (what, *_) in PHASES.items()}, BETWEEN: "everything else"}
        return "\n".join(
            [
                f"{self.kills.total()} kills in {self.starts} starts of {self.runs} runs. "
                f"Differences: {wrong}.",
                "",
                "| what the process was doing when it was killed | kills |",
                "|---|---|",
                *(f"| {phase}: {what} | {self.kills[phase]} |" for phase, what in words.items()),
            ]
        )


def campaign(source: Path, scratch: Path, kills: int, seed: int) -> Campaign:
    """Kill runs until there have been so many kills, or a difference.

    Args:
        source: a folder with the stages before PPO.
        scratch: where the runs go.
        kills: how many at least.
        seed: of the moments.
    """
    alone = Start(link_stages(source, scratch / "whole"))
    alone.finish()
    found = Campaign(alone, seed)
    while (done := found.kills.total()) < kills and not found.faults:
        found.run(link_stages(source, scratch / f"run-{found.runs}"), kills - done)
    return found


def main() -> None:
    """The command line."""
    parser = CommandLine(prog="python -m benchmarks.faults", description=faults.__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--write", type=Path, help="a page with two `<!-- kills -->` marks around the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch) / "source")
        found = campaign(Path(scratch) / "source", Path(scratch), arguments.kills, arguments.seed)
    print(found.table())
    if arguments.write:
        mark = "<!-- kills -->"
        before, _, after = arguments.write.read_text(encoding="utf-8").split(mark)
        command = f"python -m benchmarks.faults --kills {arguments.kills} --seed {arguments.seed}"
        write_atomically(arguments.write, f"{before}{mark}\n`{command}`: {found.table()}\n{mark}{after}")
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    exit_on_user_error(main)
