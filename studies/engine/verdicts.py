"""From an interval to a verdict: a statement is judged by a bound of its 95% interval, never by its mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rlhf.stats.intervals import Estimate


class Verdict(StrEnum):
    """What the measurement says about a statement."""

    SUPPORTED = "SUPPORTED"
    CONTRADICTED = "CONTRADICTED"
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True)
class Statement:
    """One measured number, the bound it is held against, and the verdict.

    text: the statement in words. rule: the bound in words. digits: how many to print.
    """

    text: str
    rule: str
    estimate: Estimate
    verdict: Verdict
    digits: int = 3

    def as_dict(self) -> dict[str, Any]:
        """The statement for JSON."""
        words = {"text": self.text, "rule": self.rule, "digits": self.digits}
        return {**words, **self.estimate.as_dict(), "verdict": str(self.verdict)}


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, what was done about it, and what came out.

    columns and rows: the figures behind the statements, as a table. notes: what a reader must know to judge.
    """

    number: int
    title: str
    paper: str
    done: str
    statements: Sequence[Statement]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> Verdict:
        """The verdict on all statements together."""
        return together(s.verdict for s in self.statements)

    def as_dict(self) -> dict[str, Any]:
        """The claim for JSON."""
        return {
            "number": self.number,
            "title": self.title,
            "paper": self.paper,
            "done": self.done,
            "verdict": str(self.verdict),
            "statements": [s.as_dict() for s in self.statements],
            "table": {"columns": list(self.columns), "rows": [list(r) for r in self.rows]},
            "notes": list(self.notes),
        }


def above(text: str, estimate: Estimate, bound: float = 0.0, digits: int = 3) -> Statement:
    """The number is larger than ``bound``: supported if all of its interval is, contradicted if none is."""
    verdict = _verdict(estimate.low > bound, estimate.high < bound)
    return Statement(text, f"interval above {bound:g}", estimate, verdict, digits)


def below(text: str, estimate: Estimate, bound: float = 0.0, digits: int = 3) -> Statement:
    """The number is smaller than ``bound``: the mirror image of :func:`above`."""
    verdict = _verdict(estimate.high < bound, estimate.low > bound)
    return Statement(text, f"interval below {bound:g}", estimate, verdict, digits)


def inside(text: str, estimate: Estimate, low: float, high: float, digits: int = 3) -> Statement:
    """The number is between two bounds, an equivalence test: supported if all of its interval is.

    Contradicted if the interval lies wholly outside. That the interval merely touches the range says nothing.
    """
    verdict = _verdict(
        low <= estimate.low and estimate.high <= high, estimate.high < low or estimate.low > high
    )
    return Statement(text, f"interval inside [{low:g}, {high:g}]", estimate, verdict, digits)


def _verdict(supported: bool, contradicted: bool) -> Verdict:
    if supported:
        return Verdict.SUPPORTED
    return Verdict.CONTRADICTED if contradicted else Verdict.UNDECIDED


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Supported only if every part is, contradicted as soon as one part is."""
    found = set(verdicts)
    return _verdict(found == {Verdict.SUPPORTED}, Verdict.CONTRADICTED in found)


def shown(estimate: Estimate | dict[str, Any], digits: int = 3) -> str:
    """An estimate, or its JSON, as text: mean [low, high]; a dash for what is not known."""
    figure = estimate.as_dict() if isinstance(estimate, Estimate) else estimate
    if figure["mean"] is None:
        return "-"
    ends = figure["ci95"]
    interval = "" if ends is None else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{figure['mean']:.{digits}f}{interval}"
