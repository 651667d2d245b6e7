"""What a recipe needs of a machine: ``[GPU=24GB PROCS=8 NODES=1] python -m rlhf.plan RECIPE [time=true]``."""

from __future__ import annotations

import os
import sys

from rlhf.errors import UserError, exit_on_user_error
from rlhf.plan.check import show
from rlhf.recipe.load import from_command_line

TIME = ("time=true", "time=false")


def main() -> None:
    """The `plan` target; nothing is loaded, but for a micro-batch with ``time=true``."""
    words = sys.argv[1:]
    recipe = from_command_line([word for word in words if word not in TIME])
    times = [word for word in words if word in TIME][-1:] == [TIME[0]]
    if times and os.environ.get("GPU", "").strip().lower() not in ("", "none", "cpu"):
        raise UserError("time=true measures this machine, and GPU speaks of another; leave one of them out")
    show(recipe)
    if times:
        from rlhf.plan.timing import timed

        print(timed(recipe), flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
