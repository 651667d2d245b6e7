"""Run the study and write its report: ``python -m studies.preference [--quick] [--output DIR] [--work DIR]``.

Stopped at any moment, the same command goes on where it was: what is done stands in the work folder.
"""

from __future__ import annotations

from dataclasses import asdict

from rlhf.errors import exit_on_user_error
from studies.engine import command


def main() -> None:
    """Read the command line, do what is not done, write study.json, study.md and the plots."""
    args = command.arguments("preference", __doc__).parse_args()
    command.check(args)
    from studies.engine.report import content
    from studies.preference import claims, plots, report
    from studies.preference.plan import FULL, QUICK, units_of
    from studies.preference.units import compute

    plan = QUICK if args.quick else FULL
    results = command.results(args, units_of(plan), compute)
    made = claims.all_claims(results)
    kept = content(
        "preference",
        asdict(plan),
        made,
        results,
        command="python -m studies.preference" + (" --quick" if args.quick else ""),
        jobs=args.jobs,
        short=report.short,
        models=report.models(results),
    )
    command.write(args.output, kept, report.page(kept), made, plots.canvases(results))


if __name__ == "__main__":
    exit_on_user_error(main)
