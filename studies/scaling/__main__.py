"""Run the study and write its report: ``python -m studies.scaling [--quick] [--models A B C] ...``.

Stopped at any moment, the same command goes on where it was: what is done stands in the work folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, exit_on_user_error

PROMPT = "recipes/prompts/hhh.txt"  # the context of models that are given


def main() -> None:
    """Read the command line, do what is not done, write study.json, study.md and the plots."""
    from studies.scaling.plan import FULL, QUICK, Given, for_models, for_text

    args = _arguments()
    given = Given(
        models=tuple(args.models),
        text=tuple(args.text),
        context=args.context or (PROMPT if args.models else None),
        tasks=_tasks(args.tasks),
    )
    _check(args, given)
    plan = QUICK if args.quick else FULL
    if given.models:
        plan = for_models(plan)
    elif given.text:
        plan = for_text(plan)
    run_study(
        plan,
        given,
        out=args.output,
        work=args.work,
        jobs=args.jobs,
        preference=args.preference,
        command=_command(args),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.scaling", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two rungs, tiny budgets: no trend, no verdict to cite"
    )
    parser.add_argument(
        "--models", nargs="+", default=[], help="folders or hub ids, instead of training a ladder"
    )
    parser.add_argument(
        "--text", nargs="+", default=[], help="files to train and measure on (.txt, or rows with `text`)"
    )
    parser.add_argument(
        "--context", help=f"file with the context (default: made here; with --models {PROMPT})"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME=FILES", help="public evaluations, with --models"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/studies/scaling"), help="the report's folder"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/studies/scaling"), help="where finished units are kept"
    )
    parser.add_argument(
        "--preference",
        type=Path,
        default=Path("docs/studies/preference/study.json"),
        help="report of studies.preference; where it is missing, the units it needs are run",
    )
    parser.add_argument("--jobs", type=int, default=2, help="units at a time, each on one thread")
    return parser.parse_args()


def _command(args: argparse.Namespace) -> str:
    """The command with what decides the figures; where they are kept does not."""
    words = ["python -m studies.scaling", *(["--quick"] if args.quick else [])]
    for name in ("models", "text", "context", "tasks"):
        value = getattr(args, name)
        if value:
            words += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return " ".join(words)


def _tasks(specs: list[str]) -> dict[str, tuple[str, ...]]:
    """name=file[,file ...] as files by name."""
    from rlhf.evals.registry import TASKS, canonical

    tasks: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        name, sign, files = spec.partition("=")
        if not sign or not all(files.split(",")):
            raise UserError(f"--tasks {spec!r}: write NAME=FILE[,FILE ...], as in lambada=lambada_test.jsonl")
        name = canonical(name)
        if name == "lm_loss":
            raise UserError("--tasks lm_loss: held-out loss is measured anyway; name its files with --text")
        if TASKS[name].needs:
            raise UserError(f"--tasks {name}: this task writes text; name one that only scores, as lambada")
        tasks[name] = (*tasks.get(name, ()), *files.split(","))
    return tasks


def _check(args: argparse.Namespace, given: Any) -> None:
    """What can be told before torch is loaded.

    Raises:
        UserError: an option that cannot be used.
    """
    from rlhf.evals.registry import read_task
    from studies.scaling.data.texts import check, context_of

    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least 1 unit has to run at a time")
    if len(set(given.models)) < len(given.models):
        raise UserError("--models: a model stands twice; name each once")
    if given.tasks and not given.models:
        raise UserError("--tasks: the ladder's own models know a small world only; name others with --models")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('the plots need matplotlib: install it with pip install "matplotlib==3.10.*"')
    check(given.text)
    if given.context:
        context_of(given.context, 1)
    for name, files in given.tasks.items():
        read_task(name, files)
    for folder in (args.output, args.work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; give another one") from error


def run_study(
    plan: Any, given: Any, *, out: Path, work: Path, jobs: int, preference: Path, command: str
) -> None:
    """Run the units and write the report."""
    from rlhf.runs.artifacts import write_atomically
    from studies.preference.units import start_worker
    from studies.preference.work import read_result, run, with_needs
    from studies.scaling import claims, figures, objectives, plots, report
    from studies.scaling.plan import units_of
    from studies.scaling.units import execute

    everything = with_needs(units_of(plan, given))
    # spawn: a process that has loaded torch must not be forked
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        try:
            rows, source = _objectives(plan, preference, work.parent / "preference", pool, jobs)
            run(everything, work, execute, say=say, pool=pool, jobs=jobs)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    found = [f for u in everything if (f := read_result(u, work)) is not None]
    done = figures.Study(everything, found)
    made = claims.all_claims(done, rows)
    numbers = [*figures.all_figures(done), *(objectives.figures(rows) if rows else [])]
    content = report.study(
        {**asdict(plan), "given": asdict(given)},
        done,
        made,
        numbers,
        everything,
        found,
        command=command,
        jobs=jobs,
        preference=source,
    )
    write_atomically(
        out / "study.json", json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    )
    write_atomically(out / "study.md", report.page(content, made, numbers))
    plots.draw_all(done, rows, out)
    for claim in made:
        say(f"claim {claim.number}: {claim.verdict} ({claim.title})")
    say(f"wrote {out / 'study.md'}")


def _objectives(plan: Any, file: Path, work: Path, pool: Executor, jobs: int) -> tuple[Any, str]:
    """The preference objectives of the ladder's own sizes, and where they come from."""
    from studies.scaling import objectives

    if not plan.sizes:
        return [], "not measured on models that are given"
    if file.is_file():
        return objectives.read(file), f"read from {file}, not trained again"
    rows = objectives.train(plan, work, say, pool, jobs)
    return rows, f"trained in {work}, since there is no {file}"


def say(line: str) -> None:
    """One line of progress."""
    print(line, flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
