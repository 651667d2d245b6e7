"""Run the study: ``python -m studies.ppo [--quick] [--seeds 0 1 2] [--arms "free small 0" ppo ...]``.

Stopped at any moment, the same command goes on where it was: finished units are kept.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace

from rlhf.errors import exit_on_user_error
from studies.engine import command
from studies.ppo.plan import ARMS, QUICK, Plan, units_of


def arguments() -> ArgumentParser:
    """The study's options."""
    parser = command.arguments("ppo", __doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=None, help="of all that is drawn")
    parser.add_argument(
        "--arms", nargs="*", choices=ARMS, default=None, metavar="ARM", help="only these policies"
    )
    return parser


def plan_of(args: Namespace) -> Plan:
    """The study that the options ask for."""
    plan = QUICK if args.quick else Plan()
    return replace(plan, seeds=tuple(args.seeds or plan.seeds), arms=tuple(args.arms or plan.arms))


def main() -> None:
    """Read the command line, do what is not done, write study.json, study.md and the plots."""
    args = arguments().parse_args()
    plan = plan_of(args)
    command.check(args)
    from rlhf.stats.intervals import SHARE
    from studies.engine.report import content
    from studies.engine.verdicts import shown
    from studies.ppo import claims, plots, report
    from studies.ppo.curves import BOUNDS, GOLD, Curves, estimate
    from studies.ppo.units import compute

    curves = Curves(command.results(args, units_of(plan), compute))
    made = claims.all_claims(curves)
    pairs = curves.results.by_seed("pairs", closed=False)
    words = ["python -m studies.ppo", *(["--quick"] if args.quick else [])]
    for name in ("seeds", "arms"):
        if value := getattr(args, name):
            words += [f"--{name}", *(f'"{v}"' if " " in str(v) else str(v) for v in value)]
    kept = content(
        "ppo",
        asdict(plan),
        made,
        curves.results,
        command=" ".join(words),
        jobs=args.jobs,
        short=lambda result: {k: v for k, v in result.items() if k not in ("pairs", "held_out")},
        reward_models=report.reward_models(curves),
        labels_right=shown(estimate([p["labels_right"] for p in pairs]).cut(SHARE)),
        base=shown(estimate([p["gold"] for p in pairs]).cut(BOUNDS[GOLD])),
    )
    shown_claims = [claim.number for claim in made]
    command.write(args.output, kept, report.page(kept), made, plots.canvases(curves, shown_claims))


if __name__ == "__main__":
    exit_on_user_error(main)
