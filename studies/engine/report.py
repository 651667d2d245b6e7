"""study.json of a study, from its claims and finished units; and study.md, from study.json alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhf.markdown import table
from studies.engine.results import Results
from studies.engine.verdicts import Claim, shown

PACKAGES = ("torch", "transformers", "numpy", "matplotlib")
Content = dict[str, Any]
Plots = Mapping[int, tuple[str, str]]
"""File and caption of the plot of a claim, by the claim's number."""


def content(
    study: str,
    plan: dict[str, Any],
    claims: Sequence[Claim],
    results: Results,
    *,
    command: str,
    jobs: int,
    short: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **more: Any,
) -> Content:
    """Everything that is to be kept of a study, for JSON.

    short: what of a unit's result is kept; None = nothing. more: what only this study has.
    """
    units = []
    for unit, found in zip(results.units, results.found, strict=True):
        kept = {} if short is None else {"result": short(found["result"])}
        times = {k: found[k] for k in ("seconds", "cpu_seconds")}
        units.append({"kind": unit.kind, "key": unit.key, "settings": unit.settings} | kept | times)
    return {
        "study": study,
        "command": command,
        "plan": plan,
        "machine": _machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "time": {
            "units": len(units),
            "jobs": jobs,
            "unit_seconds": round(sum(u["seconds"] for u in units)),
            "cpu_seconds": round(sum(u["cpu_seconds"] for u in units)),
        },
        "claims": [c.as_dict() for c in claims],
        "units": units,
        **more,
    }


def as_json(content: Content) -> str:
    """The text of study.json, strict JSON."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _machine() -> dict[str, Any]:
    """What the study ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def page(
    content: Content,
    plots: Plots,
    *,
    title: str,
    intro: str,
    seeds: str,
    models: Sequence[str],
    end: str,
) -> str:
    """The study as one Markdown page.

    Args:
        content: of study.json.
        plots: by claim.
        title: of the page.
        intro: what kind of study it is.
        seeds: what a seed changes.
        models: the part about the models, its heading first.
        end: the last sentences, about how it was made.
    """
    claims = content["claims"]
    verdicts = [(str(c["number"]), c["title"], f"**{c['verdict']}**") for c in claims]
    parts = [
        f"# {title}",
        f"Made by `{content['command']}`; every figure is in `study.json` beside this page.",
        intro,
        table(("claim", "what", "verdict"), verdicts),
        _how_to_read(content, seeds),
        *models,
        *(part for claim in claims for part in _claim(claim, plots)),
        *_figures(content.get("figures", [])),
        "## How it was made",
        f"{_made(content)} {end}",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _how_to_read(content: Content, what: str) -> str:
    seeds = len(content["plan"]["seeds"])
    methods = {f["trend"]["method"] for f in content.get("figures", []) if f["trend"] is not None}
    lines = [
        "SUPPORTED: every statement of the claim holds on its whole 95% interval. CONTRADICTED: at least "
        "one is false on its whole interval. UNDECIDED: neither.",
        f"Intervals are over n = {seeds} seed{'s' if seeds > 1 else ''}: the wider of Student's t over the "
        f"seeds ({what} each) and the interval of the items alone.",
    ]
    if seeds == 1:
        lines.append("**With one seed, only the items are behind an interval.**")
    if "residuals" in methods:
        lines.append(
            "The slope's interval comes from the distances of the rungs from the line, which it takes for "
            "independent: for models of one family it is too narrow."
        )
    elif methods:
        lines.append(
            "The slope is that of a straight line on ln N, a least-squares fit; its interval comes from the "
            "slopes of the seeds, and says nothing about other rungs."
        )
    elif "figures" in content:
        lines.append("With fewer than three rungs there is no trend, and nothing that needs one is decided.")
    return " ".join(lines)


def _claim(claim: dict[str, Any], plots: Plots) -> list[str]:
    statements = [
        (s["text"], shown(s, s.get("digits", 3)), str(s["n"]), s["rule"], s["verdict"])
        for s in claim["statements"]
    ]
    parts = [
        f"## Claim {claim['number']}. {claim['title']}: {claim['verdict']}",
        f"The papers: {claim['paper']}",
        f"Done: {claim['done']}",
        table(("statement", "measured, 95% interval", "n", "supported if", "verdict"), statements),
        table(claim["table"]["columns"], claim["table"]["rows"]),
    ]
    if claim["number"] in plots:
        name, caption = plots[claim["number"]]
        parts.append(f"![{caption}]({name})")
    if claim["notes"]:
        parts.append("\n".join(f"- {note}" for note in claim["notes"]))
    return parts


def _figures(figures: Sequence[dict[str, Any]]) -> list[str]:
    """A table for every group of figures, which share a heading and a ladder."""
    if not figures:
        return []
    parts = [
        "## All figures",
        "Mean with its 95% interval at every rung, the slope on ln N, and the largest distance of a rung "
        "from the line. *Less*: paired by item.",
    ]
    for group, of_group in groupby(figures, lambda f: f["group"]):
        some = list(of_group)
        rows = []
        for figure in some:
            trend = figure["trend"] or {"slope": {"mean": None}, "misfit": None}
            misfit = "-" if trend["misfit"] is None else f"{trend['misfit']:.4f}"
            cells = [shown(rung, 4) for rung in figure["rungs"]]
            rows.append([figure["name"], figure["unit"], *cells, shown(trend["slope"], 4), misfit])
        labels = [rung["rung"] for rung in some[0]["rungs"]]
        parts += [f"### {group}", table(("", "unit", *labels, "slope a unit of ln N", "misfit"), rows)]
    return parts


def _made(content: Content) -> str:
    time, machine = content["time"], content["machine"]
    libraries = ", ".join(f"{name} {content['versions'][name]}" for name in PACKAGES)
    return (
        f"{time['units']} units, {time['unit_seconds'] / 60:.1f} min of unit time "
        f"({time['cpu_seconds'] / 60:.1f} min of CPU time), one thread each, {time['jobs']} at a time, on "
        f"{machine['cpu']} with {machine['cores']} cores; {libraries}."
    )
