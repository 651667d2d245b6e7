"""Run the study and write its report: ``python -m studies.preference [--quick] [--out DIR] [--work DIR]``.

Stopped at any moment, the same command goes on where it was: what is done stands in the work folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from rlhf.errors import UserError, exit_on_user_error


def main() -> None:
    """Read the command line, do what is not done, write study.json, study.md and the plots."""
    parser = argparse.ArgumentParser(prog="python -m studies.preference", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one seed and small sizes: minutes, no verdict to cite"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/studies/preference"), help="where the report goes"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/studies/preference"), help="where finished units are kept"
    )
    parser.add_argument("--jobs", type=int, default=2, help="units at a time, each on one thread")
    given = parser.parse_args()
    if given.jobs < 1:
        raise UserError(f"--jobs {given.jobs}: at least 1 unit has to run at a time")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('the plots need matplotlib: install it with pip install "matplotlib==3.10.*"')
    for folder in (given.out, given.work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another one") from error
    run_study(quick=given.quick, out=given.out, work=given.work, jobs=given.jobs)


def run_study(*, quick: bool, out: Path, work: Path, jobs: int) -> None:
    """Run the units and write the report."""
    from rlhf.runs.artifacts import write_atomically
    from studies.preference import claims, plots, report, results, units
    from studies.preference.plan import FULL, QUICK, units_of
    from studies.preference.work import read_result, run, with_needs

    plan = QUICK if quick else FULL
    everything = with_needs(units_of(plan))
    # spawn: a process that has loaded torch must not be forked
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=units.start_worker) as pool:
        try:
            run(everything, work, units.execute, say=say, pool=pool, jobs=jobs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    found = [f for u in everything if (f := read_result(u, work)) is not None]
    finished = results.Results.of(everything, found)
    made = claims.all_claims(finished)
    command = "python -m studies.preference" + (" --quick" if quick else "")
    content = report.study(asdict(plan), made, everything, found, command=command, jobs=jobs)
    write_atomically(
        out / "study.json", json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
    write_atomically(out / "study.md", report.page(content, made))
    plots.draw_all(finished, out)
    for claim in made:
        say(f"claim {claim.number}: {claim.verdict} ({claim.title})")
    say(f"wrote {out / 'study.md'}")


def say(line: str) -> None:
    """One line of progress."""
    print(line, flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
