"""study.json and study.md, from claims and finished units."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.preference.measure import from_text
from studies.preference.verdicts import Claim, Statement
from studies.preference.work import Unit

PACKAGES = ("torch", "transformers", "numpy", "matplotlib")
PLOTS = {
    1: ("versus.png", "Accuracy on ranked and binary pairs against the size of the model"),
    3: ("transfer.png", "Accuracy against the number of finetuning pairs (claims 3 and 4)"),
    11: ("calibration.png", "Observed against promised agreement"),
    12: ("sets.png", "Held-out loss over the one pass"),
}


def machine() -> dict[str, Any]:
    """What the study ran on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.partition(":")[2].strip() for x in info.read_text().splitlines() if x.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that the figures depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def spent(found: Sequence[dict[str, Any]], jobs: int) -> dict[str, int]:
    """What the units of a study took, seconds, so many of them at a time."""
    return {
        "units": len(found),
        "jobs": jobs,
        "unit_seconds": round(sum(f["seconds"] for f in found)),
        "cpu_seconds": round(sum(f["cpu_seconds"] for f in found)),
    }


def study(
    plan: dict[str, Any],
    claims: Sequence[Claim],
    units: Sequence[Unit],
    found: Sequence[dict[str, Any]],
    *,
    command: str,
    jobs: int,
) -> dict[str, Any]:
    """Everything that is to be kept of a study, for JSON."""
    return {
        "study": "preference",
        "command": command,
        "plan": plan,
        "machine": machine(),
        "versions": versions(),
        "models": _models(units, found),
        "time": spent(found, jobs),
        "claims": [c.as_dict() for c in claims],
        "units": [
            {
                "kind": u.kind,
                "key": u.key,
                "settings": u.settings,
                "result": _short(f["result"]),
                "seconds": f["seconds"],
                "cpu_seconds": f["cpu_seconds"],
            }
            for u, f in zip(units, found, strict=True)
        ],
    }


def page(content: dict[str, Any], claims: Sequence[Claim]) -> str:
    """The study as one Markdown page."""
    plan, time = content["plan"], content["time"]
    seeds = len(plan["seeds"])
    lines = [
        "# Preference-modelling claims on a small ladder of models",
        "",
        f"Made by `{content['command']}`; every figure is in `study.json` beside this page.",
        "",
        "Transformers trained from scratch on sentences of a small grammar whose quality is known. They "
        "test the shape of the papers' claims, not their values: the largest model here is smaller than "
        "the smallest there.",
        "",
        "| claim | what | verdict |",
        "|---|---|---|",
        *(f"| {c.number} | {c.title} | **{c.verdict}** |" for c in claims),
        "",
        "SUPPORTED: every statement of the claim holds on its whole 95% interval. CONTRADICTED: at least "
        f"one is false on its whole interval. UNDECIDED: neither. Intervals are over n = {seeds} "
        f"seed{'s' if seeds > 1 else ''} (another rule, other data, other weights each): the wider of "
        "Student's t over the seeds and the interval of the test items alone."
        + ("" if seeds > 1 else " **With one seed, only the items are behind an interval.**"),
        "",
        "## Models and data",
        "",
        "GPT-2 blocks of width 128 L, L layers, heads of 64, without dropout; a scalar head reads the "
        "score at END.",
        "",
        "| L | weights of the layers, 196,608 L^3 | with biases and norms | with embeddings and head |",
        "|---|---|---|---|",
        *(
            f"| {m['layers']} | {m['matrices']:,} | {m['non_embedding']:,} | {m['total']:,} |"
            for m in content["models"]
        ),
        "",
        "A sentence: START, one of 6 topics, 7 words (of 32) and 0 to 3 fillers (of 6) in random order, "
        "END. A random half of the words fits each topic; quality = how many of the 7 fit, P(q) = (q + "
        "1) / 36. Words differ in frequency, whether they fit or not. Both sides of a pair have one "
        f"topic. Every model of a size and seed starts from one language model of {plan['sentences']:,} "
        "sentences. Training and test sentences are disjoint by construction.",
        "",
    ]
    for claim in claims:
        lines += _section(claim, seeds)
    lines += [
        "## How it was made",
        "",
        f"{time['units']} units, {time['unit_seconds'] / 60:.0f} min of unit time "
        f"({time['cpu_seconds'] / 60:.0f} min of CPU time), one thread each, {time['jobs']} at a time, on "
        f"{content['machine']['cpu']} with {content['machine']['cores']} cores; "
        + ", ".join(f"{k} {v}" for k, v in content["versions"].items())
        + ".",
        "",
        "Sizes, learning rates and the grammar were chosen on a seed that is no part of the study; "
        "nothing was changed after its own seeds had been run.",
        "",
    ]
    return "\n".join(lines)


def _section(claim: Claim, seeds: int) -> list[str]:
    lines = [
        f"## Claim {claim.number}. {claim.title}: {claim.verdict}",
        "",
        f"The paper: {claim.paper}",
        "",
        f"Done: {claim.done}",
        "",
        "| statement | measured, 95% interval | n seeds | supported if | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {s.text} | {_measured(s)} | {s.estimate.n} | {s.rule} | {s.verdict} |"
            for s in claim.statements
        ),
        "",
        _table_row(claim.columns),
        _table_row(["---"] * len(claim.columns)),
        *map(_table_row, claim.rows),
        "",
    ]
    if claim.number in PLOTS:
        name, caption = PLOTS[claim.number]
        lines += [f"![{caption}]({name})", ""]
    return lines + [f"- {note}" for note in claim.notes] + ([""] if claim.notes else [])


def _measured(s: Statement) -> str:
    e = s.estimate
    return f"{e.mean:.{s.digits}f} [{e.low:.{s.digits}f}, {e.high:.{s.digits}f}]"


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _models(units: Sequence[Unit], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    models = {}
    for unit, content in zip(units, found, strict=True):
        if unit.kind == "lm":
            result = content["result"]
            models[unit.settings["layers"]] = {
                "layers": unit.settings["layers"],
                "matrices": result["matrix_weights"],
                "non_embedding": result["non_embedding_parameters"],
                "total": result["parameters"],
            }
    return [models[layers] for layers in sorted(models)]


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """A unit's result without the credit of every single pair: their mean instead."""
    short = dict(result)
    if "credits" in short:
        short["accuracy"] = {k: float(from_text(v).mean()) for k, v in short.pop("credits").items()}
    if "credit" in short:
        short["accuracy"] = float(from_text(short.pop("credit")).mean())
    if "held_out_losses" in short:
        short["held_out_loss"] = float(np.mean(short.pop("held_out_losses")))
    return short
