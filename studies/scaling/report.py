"""study.json and study.md, from claims, figures and finished units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rlhf.markdown import table
from studies.preference.report import machine, spent, versions
from studies.preference.verdicts import Claim
from studies.preference.work import Unit
from studies.scaling.claims import in_words
from studies.scaling.figures import Figure, Study
from studies.scaling.trend import RESIDUALS

PLOTS = {
    1: ("objectives.png", "Lead of the preference model over imitation against N"),
    5: ("distillation.png", "What distillation takes over of the context, against N"),
    6: ("tax.png", "What each arm costs, against N"),
    19: ("inverse.png", "Accuracy on the inverse-scaling items against N, before and after PPO"),
}


def study(
    plan: dict[str, Any],
    done: Study,
    claims: Sequence[Claim],
    figures: Sequence[Figure],
    units: Sequence[Unit],
    found: Sequence[dict[str, Any]],
    *,
    command: str,
    jobs: int,
    preference: str,
) -> dict[str, Any]:
    """Everything that is to be kept of a study, for JSON."""
    return {
        "study": "scaling",
        "command": command,
        "plan": plan,
        "preference": preference,
        "seeds": done.seeds,
        "machine": machine(),
        "versions": versions(),
        "rungs": [{"rung": rung.label, "N": rung.size, **_trained(done, rung)} for rung in done.rungs],
        "time": spent(found, jobs),
        "claims": [c.as_dict() for c in claims],
        "figures": [f.as_dict() for f in figures],
        "units": [
            {"kind": u.kind, "key": u.key, "settings": u.settings}
            | {k: f[k] for k in ("seconds", "cpu_seconds")}
            for u, f in zip(units, found, strict=True)
        ],
    }


def _trained(done: Study, rung: Any) -> dict[str, Any]:
    """What the first seed's rung consists of, and the mean loss that it was left with."""
    results = [done.result("rung", rung, seed) for seed in done.seeds]
    kept = {k: results[0][k] for k in ("parameters", "vocabulary")}
    losses = [r["last_loss"] for r in results if "last_loss" in r]
    return kept | {"loss": sum(losses) / len(losses) if losses else None}


def page(content: dict[str, Any], claims: Sequence[Claim], figures: Sequence[Figure]) -> str:
    """The study as one Markdown page."""
    parts = [
        "# Evaluations and objectives over a ladder of models",
        f"Made by `{content['command']}`; every figure is in `study.json` beside this page.",
        _what(content),
        table(
            ("claim", "what", "verdict"),
            [(str(c.number), c.title, f"**{c.verdict}**") for c in claims],
        ),
        _how_to_read(content, figures),
        "## The ladder",
        _ladder(content),
        *(part for claim in claims for part in _section(claim)),
        "## All figures",
        "Mean with its 95% interval at every rung, the slope on ln N, and the largest distance of a rung "
        "from the line. *Less*: paired by item.",
        *(
            part
            for group, some in groupby(figures, lambda f: f.group)
            for part in _figures(group, list(some))
        ),
        "## How it was made",
        _made(content),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _what(content: dict[str, Any]) -> str:
    own = "sizes" in content["plan"] and content["plan"]["sizes"]
    models = (
        "Small language models trained here from nothing, on text of a small world of plain words"
        if own
        else "Models that were given"
    )
    tail = (
        ". They test the shape of the papers' claims, not their values: no number here can stand beside "
        "one of a model of ten billion parameters."
    )
    given = content["plan"]["given"]["text"]
    text = models + (f" and on {', '.join(given)}" if given else "") + tail
    if content["plan"]["name"].startswith("quick"):
        text += " **Tiny budgets: this page shows that all of it runs, and has no verdict to cite.**"
    return text


def _how_to_read(content: dict[str, Any], figures: Sequence[Figure]) -> str:
    seeds = len(content["seeds"])
    methods = {f.trend.method for f in figures if f.trend is not None}
    lines = [
        "SUPPORTED: every statement of the claim holds on its whole 95% interval. CONTRADICTED: at least "
        "one is false on its whole interval. UNDECIDED: neither.",
        f"Intervals are over n = {seeds} seed{'s' if seeds > 1 else ''}: the wider of Student's t over the "
        "seeds (other world, text, weights and items each) and the interval of the items alone."
        + ("" if seeds > 1 else " **With one seed, only the items are behind an interval.**"),
    ]
    if RESIDUALS in methods:
        lines.append(
            "The slope's interval comes from the distances of the rungs from the line, which it takes for "
            "independent: for models of one family it is too narrow."
        )
    elif methods:
        lines.append(
            "The slope is that of a straight line on ln N, a least-squares fit; its interval comes from the "
            "slopes of the seeds, and says nothing about other rungs."
        )
    else:
        lines.append("With fewer than three rungs there is no trend, and nothing that needs one is decided.")
    return " ".join(lines)


def _ladder(content: dict[str, Any]) -> str:
    rows = [
        (
            r["rung"],
            f"{r['N']:,.0f}",
            f"{r['parameters']:,}",
            f"{r['vocabulary']:,}",
            "-" if r["loss"] is None else f"{r['loss']:.3f}",
        )
        for r in content["rungs"]
    ]
    head = ("rung", "N, weights in matrices of the layers", "all parameters", "vocabulary")
    return table((*head, "training loss at the end, nats a token"), rows)


def _section(claim: Claim) -> list[str]:
    parts = [
        f"## Claim {claim.number}. {claim.title}: {claim.verdict}",
        f"The papers: {claim.paper}",
        f"Done: {claim.done}",
        table(
            ("statement", "measured, 95% interval", "n", "supported if", "verdict"),
            [
                (s.text, in_words(s.estimate, s.digits), str(s.estimate.n), s.rule, str(s.verdict))
                for s in claim.statements
            ],
        ),
        table(claim.columns, claim.rows),
    ]
    if claim.number in PLOTS:
        name, caption = PLOTS[claim.number]
        parts.append(f"![{caption}]({name})")
    if claim.notes:
        parts.append("\n".join(f"- {note}" for note in claim.notes))
    return parts


def _figures(group: str, figures: Sequence[Figure]) -> list[str]:
    """One table of figures that share a heading and a ladder."""
    labels = [rung.label for rung in figures[0].rungs]
    rows = []
    for figure in figures:
        trend = figure.trend
        slope, misfit = "-", "-"
        if trend is not None:
            slope = in_words(trend.slope, 4)
            misfit = "-" if math.isnan(trend.misfit) else f"{trend.misfit:.4f}"
        rows.append([figure.name, figure.unit, *(in_words(e, 4) for e in figure.estimates), slope, misfit])
    return [f"### {group}", table(("", "unit", *labels, "slope a unit of ln N", "misfit"), rows)]


def _made(content: dict[str, Any]) -> str:
    time, plan = content["time"], content["plan"]
    libraries = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    budget = (
        f"{plan['tokens']:,} training tokens a rung; " if plan["sizes"] else ""
    ) + f"{plan['sequences']} sequences distilled, {plan['steps']} PPO steps of {plan['responses']} responses"
    return (
        f"{time['units']} units, {time['unit_seconds'] / 60:.1f} min of unit time "
        f"({time['cpu_seconds'] / 60:.1f} min of CPU time), one thread each, {time['jobs']} at a time, on "
        f"{content['machine']['cpu']} with {content['machine']['cores']} cores; {libraries}. {budget}. "
        f"Preference objectives: {content['preference']}."
    )
