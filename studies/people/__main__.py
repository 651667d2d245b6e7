"""Run the study: ``python -m studies.people [--recipe RECIPE] [--set KEY=VALUE ...] [--quick]``.

Stopped at any moment, the same command goes on where it was: units and the runs behind them are kept.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import load
from studies.engine import command
from studies.people.plan import ARMS, Plan, check_variants, units_of


def arguments() -> ArgumentParser:
    """The study's options."""
    parser = command.arguments("people", __doc__)
    parser.add_argument("--recipe", default=None, help="the experiment (tiny.yaml with --quick)")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, key=value")
    parser.add_argument("--seeds", nargs="*", type=int, default=None, help="of the policies")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="policies; always ppo")
    variant = "a further arm of PPO by what it overrides, such as 'ppo.kl_coef=0.1'; may be given again"
    parser.add_argument("--variant", action="append", default=[], help=variant)
    return parser


def plan_of(args: Namespace) -> Plan:
    """The study that the options ask for."""
    recipe = args.recipe or ("recipes/tiny.yaml" if args.quick else "recipes/convincing.yaml")
    seeds = tuple(args.seeds or ((0,) if args.quick else (0, 1, 2)))
    arms = tuple(arm for arm in ARMS if arm in ("ppo", *args.arms))
    best_of = 4 if args.quick else 16
    return Plan(recipe, tuple(args.set), seeds, arms, best_of, tuple(args.variant))


def main() -> None:
    """Read the command line, do what is not done, write study.json and study.md."""
    args = arguments().parse_args()
    plan = plan_of(args)
    units = units_of(plan, load(Path(plan.recipe), args.set))
    check_variants(plan)
    command.check(args)
    from studies.engine.report import content
    from studies.people import report
    from studies.people.units import compute

    results = command.results(args, units, compute)
    words = [*(["--quick"] if args.quick else []), f"--recipe {plan.recipe}"]
    words += [f"--arms {' '.join(plan.arms)}"] if plan.arms != tuple(ARMS) else []
    words += [f"--variant {shlex.quote(variant)}" for variant in plan.variants]
    words += [f"--set {' '.join(args.set)}"] if args.set else []
    kept = content(
        "people",
        asdict(plan),
        [],
        results,
        command=f"python -m studies.people {' '.join(words)}",
        jobs=args.jobs,
        short=lambda result: {key: value for key, value in result.items() if key != "samples"},
        halves=results.one("halves"),
        reward_models={h: results.one("reward", half=h)["held_out_accuracy"] for h in ("train", "test")},
        arms=report.arms(results),
        against=report.against_ppo(results, plan.variants),
        base_length=report.base_length(results),
        samples=results.by_seed("policy", arm="ppo")[0]["samples"],
    )
    command.write(args.output, kept, report.page(kept), [], {})


if __name__ == "__main__":
    exit_on_user_error(main)
