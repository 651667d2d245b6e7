"""Run the study: ``python -m studies.online [--recipe RECIPE] [--set KEY=VALUE ...] [--quick]``.

Stopped at any moment, the same command goes on where it was: units and the runs behind them are kept.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import load
from studies.engine import command
from studies.online.plan import Plan, units_of


def arguments() -> ArgumentParser:
    """The study's options."""
    parser = command.arguments("online", __doc__)
    parser.add_argument("--recipe", default=None, help="the experiment (tiny.yaml with --quick)")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, key=value")
    parser.add_argument("--seeds", nargs="*", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None, help="of the online arm (3; 2 with --quick)")
    parser.add_argument("--comparisons", type=int, default=None, help="of each arm (384; 48 with --quick)")
    return parser


def plan_of(args: Namespace) -> Plan:
    """The study that the options ask for."""
    quick = args.quick
    return Plan(
        args.recipe or f"recipes/{'tiny' if quick else 'sentiment'}.yaml",
        tuple(args.set),
        tuple(args.seeds or ((0,) if quick else (0, 1, 2))),
        rounds=args.rounds or (2 if quick else 3),
        comparisons=args.comparisons or (48 if quick else 384),
        fresh=16 if quick else 128,
        noise=0.1 if quick else 0.0,  # a random model writes nothing that the judge can tell apart
    )


def main() -> None:
    """Read the command line, do what is not done, write study.json and study.md."""
    args = arguments().parse_args()
    plan = plan_of(args)
    units = units_of(plan, load(Path(plan.recipe), plan.overrides))
    command.check(args)
    from studies.engine.report import content
    from studies.online import report
    from studies.online.units import compute

    results = command.results(args, units, compute)
    claims = [report.claim(plan, results)]
    words = [*(["--quick"] if args.quick else []), f"--recipe {plan.recipe}", f"--rounds {plan.rounds}"]
    words += [f"--comparisons {plan.comparisons}", *([f"--set {' '.join(args.set)}"] if args.set else [])]
    kept = content(
        "online",
        asdict(plan),
        claims,
        results,
        command=f"python -m studies.online {' '.join(words)}",
        jobs=args.jobs,
        short=lambda result: {key: value for key, value in result.items() if key != "gold"},
    )
    command.write(args.output, kept, report.page(kept), claims, {})


if __name__ == "__main__":
    exit_on_user_error(main)
