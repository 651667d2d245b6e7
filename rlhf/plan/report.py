"""The plan as a page: a table by stage, what there is, and what would help."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.markdown import table
from rlhf.plan.machine import Machine
from rlhf.plan.memory import Parts
from rlhf.plan.remedies import Remedy
from rlhf.plan.stages import Moment, Plan

ERROR = 0.15
"""How far an estimate may be off; within it a recipe is neither refused nor called safe."""
_SHOWN = 6  # remedies


def gigabytes(number: float) -> str:
    """Bytes in GB (10^9)."""
    return f"{number / 1e9:.2f}"


def verdict(largest: Moment, machine: Machine) -> str:
    """One line: what the largest stage needs, and whether it fits."""
    needed = largest.parts.total
    share = needed / machine.bytes
    how = "does not fit" if share > 1 else "fits, but only just" if share > 1 - ERROR else "fits"
    there = f"{machine.bytes / 1e9:.{1 if machine.bytes >= 1e9 else 6}f} GB"
    return (
        f"{largest.stage} ({largest.name}) needs about {gigabytes(needed)} GB of {there}, {share:.0%}: "
        f"it {how} ({machine.words})"
    )


def fits(largest: Moment, machine: Machine) -> bool:
    """Whether the largest moment fits into the memory that there is."""
    return largest.parts.total <= machine.bytes


def cannot_fit(largest: Moment, machine: Machine) -> bool:
    """Whether it would not fit either if the estimate were too high by as much as it may be off."""
    return largest.parts.total * (1 - ERROR) > machine.bytes


def page(plan: Plan, machine: Machine, notes: Sequence[str]) -> str:
    """The table by stage, with the columns that hold something, and the lines below it."""
    moments = plan.by_stage()
    columns = [name for name in Parts._fields if any(getattr(m.parts, name) >= 5e6 for m in moments)]
    rows = [
        [m.stage, m.name, *(gigabytes(getattr(m.parts, n)) for n in columns), gigabytes(m.parts.total)]
        for m in moments
    ]
    heads = ["stage", "largest at", *(name.replace("_", " ") for name in columns), "all"]
    lines = [f"GB a process ({machine.words})", "", table(heads, rows)]
    if plan.host:
        every = plan.host * machine.processes
        lines.append(
            f"The machine's own memory: about {every / 1e9:.0f} GB while {machine.processes} "
            f"process{'es load' if machine.processes > 1 else ' loads'} the base before it goes to the GPU."
        )
    return "\n".join([*lines, *notes, verdict(plan.largest(), machine)])


def help_page(remedies: Sequence[Remedy], combined: Remedy | None, machine: Machine) -> str:
    """What would help, each remedy with its figure."""
    several = [combined] if combined is not None and len(combined.overrides) > 1 else []
    rows = [
        [" ".join(r.overrides), gigabytes(r.largest.parts.total), f"{r.largest.stage} ({r.largest.name})",
         "yes" if fits(r.largest, machine) else "no"]
        for r in [*remedies[:_SHOWN], *several]
    ]  # fmt: skip
    if not rows:
        return "Nothing in the recipe would lower it: use a smaller model, or a machine with more memory."
    return "\n".join(["", table(["with SET=", "GB", "largest then", "fits"], rows)])
