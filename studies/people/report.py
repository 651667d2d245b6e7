"""The figures of the arms over seeds, and study.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.markdown import plain, table
from rlhf.stats.intervals import AT_LEAST_0, SHARE, UNBOUNDED, Estimate, student95
from studies.engine.results import Results
from studies.people.plan import ARMS, label_of

Figure = dict[str, Any]
COLUMNS = (  # of the summary: path, label, format
    ("reward.diff", "gain by the training RM", "+.3f"),
    ("judge.diff", "gain by the test RM", "+.3f"),
    ("judge_length_controlled.gain_at_equal_length", "at equal length", "+.3f"),
    ("judge_length_controlled.about_equal.gain", "pairs of about equal length", "+.3f"),
    ("judge_win_rate", "win rate by the test RM", ".3f"),
    ("judge_length_controlled.win_rate_at_equal_length", "win rate at equal length", ".3f"),
    ("kl", "KL, nats", ".2f"),
    ("response_length.diff", "length, tokens more", "+.1f"),
)
AGAINST = ("judge.diff", "judge_length_controlled.gain_at_equal_length", "kl")
"""What is told of a variant less PPO, by their paths in ``COLUMNS``."""

_KL = [path for path, *_ in COLUMNS].index("kl")


def figure_at(summary: dict[str, Any], path: str) -> Figure:
    """A figure {mean, ci95} of a summary by its dotted path; a paired one by its ``diff``."""
    *parts, last = path.split(".")
    found: Any = summary
    for part in parts:
        found = found[part]
    if last == "diff":
        return {"mean": found["diff"], "ci95": found["ci95"], "n": found["n"]}
    return dict(found[last])


def over_seeds(figures: Sequence[Figure], path: str = "") -> Figure:
    """Mean over the seeds, n of them; the wider of Student's t over them and of their own mean interval.

    A win rate's interval is cut at 0 and 1, a KL's at 0. path: the figure's, which tells them.

    The seeds share their prompts, so the interval over prompts does not shrink with their number. What is not
    known in a seed is left out; without any, all is None.
    """
    known = [f for f in figures if f["mean"] is not None]
    if not known:
        return {"mean": None, "ci95": None, "n": 0}
    means = np.array([f["mean"] for f in known])
    halves = [(f["ci95"][1] - f["ci95"][0]) / 2 for f in known if f["ci95"] is not None]
    half = float(np.mean(halves)) if halves else math.nan
    if len(known) > 1:
        student = student95(len(known) - 1) * float(means.std(ddof=1)) / math.sqrt(len(known))
        half = student if math.isnan(half) else max(half, student)
    mean = float(means.mean())
    bounds = SHARE if "win_rate" in path else AT_LEAST_0 if path == "kl" else UNBOUNDED
    return Estimate(mean, mean - half, mean + half, len(known)).cut(bounds).as_dict()


def arms(results: Results) -> list[dict[str, Any]]:
    """Label and figures of every arm, in order; best of n is the base's own."""
    found = []
    best = [s["best_of_n"] for s in results.by_seed("policy", arm="ppo") if "best_of_n" in s]
    for index in range(1, len(best[0]["rows"]) if best else 0):
        rows = [b["rows"][index] for b in best]
        found.append({"label": f"best of {rows[0]['n']}", "figures": _best_of(rows)})
    made = results.values("policy", "arm")
    for arm in (*(a for a in ARMS if a in made), *(a for a in made if a not in ARMS)):
        of_arm = results.by_seed("policy", arm=arm)
        figures = {path: over_seeds([figure_at(s, path) for s in of_arm], path) for path, *_ in COLUMNS}
        found.append({"label": label_of(arm), "figures": figures})
    return found


def against_ppo(results: Results, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Every variant less PPO as the recipe has it, paired by seed: label and figures, seconds of PPO too."""
    plain_ppo = results.by_seed("policy", arm="ppo")
    found = []
    for variant in variants:
        varied = results.by_seed("policy", arm=variant)
        pairs = list(zip(varied, plain_ppo, strict=True))
        figures = {path: over_seeds([_less(v, p, path) for v, p in pairs]) for path in AGAINST}
        figures["time"] = over_seeds([_exact(v["train_seconds"] / p["train_seconds"]) for v, p in pairs])
        found.append({"label": label_of(variant), "figures": figures})
    return found


def _less(one: dict[str, Any], other: dict[str, Any], path: str) -> Figure:
    """The difference of a figure in two summaries; unknown where one of them is."""
    means = [figure_at(summary, path)["mean"] for summary in (one, other)]
    return _exact(None if None in means else means[0] - means[1])


def _exact(value: float | None) -> Figure:
    """A seed's own figure."""
    return {"mean": value, "ci95": None, "n": 1}


def base_length(results: Results) -> Figure:
    """Tokens of the base's responses, over the seeds."""
    found = [s["response_length"]["before"] for s in results.by_seed("policy", arm="ppo")]
    return over_seeds([_exact(x) for x in found])


def _best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """The figures that best of n has; its KL is a bound."""
    controlled = [{"judge_length_controlled": row["length_controlled"]} for row in rows]
    found = {
        path: over_seeds([figure_at(c, path) for c in controlled], path)
        for path, *_ in COLUMNS
        if path.startswith("judge_length_controlled")
    }
    gains = [row["length_controlled"]["gain"] for row in rows]
    bound = {"mean": rows[0]["kl_bound"], "ci95": None, "n": len(rows)}
    return found | {"judge.diff": over_seeds(gains), "kl": bound}


def page(content: dict[str, Any]) -> str:
    """The study as one Markdown page, from study.json."""
    seeds, accuracy = content["plan"]["seeds"], content["reward_models"]
    rows = []
    for arm in content["arms"]:
        found, bound = arm["figures"], "at most " if arm["label"].startswith("best of") else ""
        cells = [plain(found[path], form) if path in found else "" for path, _, form in COLUMNS]
        if bound:
            cells[_KL] = f"{bound}{found['kl']['mean']:.2f}"
        rows.append([arm["label"], *cells])
    samples = [[s["prompt"], s["before"], s["after"]] for s in content["samples"]]
    train, test = (plain(accuracy[half], ".3f") for half in ("train", "test"))
    machine, time = content["machine"], content["time"]
    parts = [
        "# Learning from people: policies at equal samples",
        f"Made by `{content['command']}`; every figure is in `study.json` beside this page.",
        f"The training comparisons are split in halves of {content['halves']['train']} and "
        f"{content['halves']['test']}, no group or prompt in both. Policies learn from the first half or "
        "from its reward model (the training RM), and are judged by the reward model of the second (the test "
        f"RM). Held-out pairs in the right order: {train} and {test}. Differences are after less before, the "
        "base, on the same held-out prompts, which the base answers in "
        f"{plain(content['base_length'], '.1f')} tokens. PPO, RLOO and trl's trainers have as many "
        "responses and optimizer steps, the same rates and KL "
        "coefficient; DPO has the comparisons, best of n only the base.",
        f"Intervals: 95%, the wider of Student's t over {len(seeds)} seed{'s' * (len(seeds) > 1)} of the "
        "policy and of the mean interval over prompts, cut at "
        "0 and 1 for a win rate, at 0 for a KL. Data and reward models are the same in all seeds.",
        table(["", *(label for _, label, _ in COLUMNS)], rows),
        *_against(content["against"], len(seeds)),
        "## Samples",
        f"PPO, seed {seeds[0]}.",
        table(["prompt", "before", "after"], samples),
        "## How it was made",
        f"{time['units']} units, {time['unit_seconds'] / 60:.1f} min of unit time, one thread each, "
        f"{time['jobs']} at a time, on {machine['cpu']} with {machine['cores']} cores.",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _against(variants: Sequence[dict[str, Any]], seeds: int) -> list[str]:
    """The table of the variants; nothing without any."""
    if not variants:
        return []
    columns = [
        (path, f"{label}, more", f"+{form.strip('+')}") for path, label, form in COLUMNS if path in AGAINST
    ]
    columns.append(("time", "seconds of training, ratio", ".2f"))
    rows = [[v["label"], *(plain(v["figures"][path], form) for path, _, form in columns)] for v in variants]
    return [
        "## Settings of PPO",
        "Each less PPO as the recipe has it, different in what it names alone, paired by seed; "
        + ("Student's t over the seeds." if seeds > 1 else "one seed, no interval."),
        table(["", *(label for _, label, _ in columns)], rows),
    ]
