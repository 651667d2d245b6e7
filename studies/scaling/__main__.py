"""Run the study and write its report: ``python -m studies.scaling [--quick] [--models A B C] ...``.

Stopped at any moment, the same command goes on where it was: what is done stands in the work folder.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rlhf.errors import UserError, exit_on_user_error
from studies.engine import command
from studies.scaling.plan import FULL, QUICK, Given, Plan, for_models, for_text, units_of

PROMPT = "recipes/prompts/hhh.txt"  # the context of models that are given


def main() -> None:
    """Read the command line, do what is not done, write study.json, study.md and the plots."""
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
    run_study(plan, given, args)


def _arguments() -> argparse.Namespace:
    parser = command.arguments("scaling", __doc__)
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
        "--preference",
        type=Path,
        default=Path("docs/studies/preference/study.json"),
        help="report of studies.preference; where it is missing, the units it needs are run",
    )
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


def _check(args: argparse.Namespace, given: Given) -> None:
    """What can be told before torch is loaded.

    Raises:
        UserError: an option that cannot be used.
    """
    from rlhf.evals.registry import read_task
    from studies.scaling.data.texts import check, context_of

    if len(set(given.models)) < len(given.models):
        raise UserError("--models: a model stands twice; name each once")
    if given.tasks and not given.models:
        raise UserError("--tasks: the ladder's own models know a small world only; name others with --models")
    check(given.text)
    if given.context:
        context_of(given.context, 1)
    for name, files in (given.tasks or {}).items():
        read_task(name, files)
    command.check(args)


def run_study(plan: Plan, given: Given, args: argparse.Namespace) -> None:
    """Run the units and write the report."""
    from studies.engine.report import content
    from studies.engine.results import Results
    from studies.engine.units import with_needs
    from studies.scaling import claims, objectives, plots, report
    from studies.scaling.figures import Study, all_figures
    from studies.scaling.units import compute

    units = with_needs(units_of(plan, given))
    rows: Results | None = None
    source = "not measured on models that are given"
    with command.workers(args.jobs) as do:
        if plan.sizes and args.preference.is_file():
            rows = objectives.read(args.preference)
            source = f"read from {args.preference}, not trained again"
        elif plan.sizes:
            work = args.work.parent / "preference"
            rows = objectives.train(plan, work, do)
            source = f"trained in {work}, since there is no {args.preference}"
        do(units, args.work, compute)
    done = Study.read(units, args.work)
    made = claims.all_claims(done, rows)
    figures = [*all_figures(done), *(objectives.figures(rows) if rows else [])]
    kept = content(
        "scaling",
        {**asdict(plan), "given": asdict(given)},
        made,
        done,
        command=_command(args),
        jobs=args.jobs,
        preference=source,
        seeds=done.seeds,
        rungs=report.rungs(done),
        figures=[f.as_dict() for f in figures],
    )
    command.write(args.output, kept, report.page(kept), made, plots.canvases(done, rows))


if __name__ == "__main__":
    exit_on_user_error(main)
