"""The command line: ``python -m benchmarks.faults [--kills N] [--seed N] [--write PAGE]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import faults
from benchmarks.faults.campaign import campaign, table
from benchmarks.faults.killed_process import prepare
from rlhf.runs.artifacts import write_atomically


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=faults.__doc__)
    parser.add_argument("--kills", type=int, default=100, help="how many at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--write", type=Path, help="a page with two `<!-- kills -->` marks around the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch) / "source")
        report = campaign(Path(scratch) / "source", Path(scratch), arguments.kills, arguments.seed)
    shown = table(report)
    print(shown)
    if arguments.write:
        mark = "<!-- kills -->"
        before, _, after = arguments.write.read_text(encoding="utf-8").split(mark)
        command = f"python -m benchmarks.faults --kills {arguments.kills} --seed {arguments.seed}"
        text = f"{before}{mark}\n`{command}`: {shown}\n{mark}{after}"
        write_atomically(arguments.write, text)
    sys.exit(1 if report.faults else 0)


if __name__ == "__main__":
    main()
