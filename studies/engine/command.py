"""The command line of a study: common options, mistakes told before torch is loaded, processes, files.

Stopped at any moment, the same command goes on where it was: what is done stands in the work folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rlhf.errors import CommandLine, UserError
from rlhf.runs.artifacts import write_atomically
from studies.engine.results import Results
from studies.engine.units import Compute, Unit, run, with_needs
from studies.engine.verdicts import Claim


def arguments(study: str, about: str | None) -> argparse.ArgumentParser:
    """The options that all studies have."""
    parser = CommandLine(prog=f"python -m studies.{study}", description=about)
    parser.add_argument("--quick", action="store_true", help="small sizes: minutes, no verdict to cite")
    reports, work = Path(f"docs/studies/{study}"), Path(f"runs/studies/{study}")
    parser.add_argument("--output", "--out", type=Path, default=reports, help="the report's folder")
    parser.add_argument("--work", type=Path, default=work, help="where finished units are kept")
    parser.add_argument("--jobs", type=int, default=2, help="units at a time, each on one thread")
    return parser


def check(args: argparse.Namespace) -> None:
    """Check the common options and make the folders.

    Raises:
        UserError: an option that cannot be used, or no matplotlib.
    """
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least 1 unit has to run at a time")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('the plots need matplotlib: install it with pip install "matplotlib==3.10.*"')
    for folder in (args.output, args.work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another one") from error


Do = Callable[[Iterable[Unit], Path, Compute], None]
"""Does the units that are not done in a folder."""


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[Do]:
    """Processes that do units, so many at a time; an error or an interrupt ends what was not begun."""
    from studies.engine.training import start_worker

    # spawn: a process that has loaded torch must not be forked
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        try:
            yield lambda units, folder, compute: run(units, folder, compute, say=say, pool=pool, jobs=jobs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def results(args: argparse.Namespace, units: Iterable[Unit], compute: Compute) -> Results:
    """Do the units and what they need, unless it is done, and read what came of them."""
    everything = with_needs(units)
    with workers(args.jobs) as do:
        do(everything, args.work, compute)
    return Results.read(everything, args.work)


def write(
    output: Path, content: dict[str, Any], page: str, claims: Sequence[Claim], canvases: Mapping[str, Any]
) -> None:
    """Write study.json, study.md and the plots, and print the verdicts."""
    from studies.engine import plots, report

    write_atomically(output / "study.json", report.as_json(content))
    write_atomically(output / "study.md", page)
    plots.save(canvases, output)
    for claim in claims:
        say(f"claim {claim.number}: {claim.verdict} ({claim.title})")
    say(f"wrote {output / 'study.md'}")


def say(line: str) -> None:
    """One line of progress."""
    print(line, flush=True)
