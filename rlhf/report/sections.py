"""The sections of a run's page: what is shown of one run or several, and the files that it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf.markdown import percent, plain
from rlhf.report import figures
from rlhf.report.blocks import Block, Section, Source, before_after
from rlhf.report.figures import Curve, Dot
from rlhf.report.gather import Run, Stage
from rlhf.report.inside import looked_into
from rlhf.report.overoptimization import overoptimized
from rlhf.runs.artifacts import MANIFEST, hash_of

CURVES = (  # metric of PPO, title, whether more is better is for the reader to say
    ("objective/score", "Score of the reward model"),
    ("objective/kl", "KL from the start, nats a response"),
    ("policy/entropy", "Entropy, nats a token"),
    ("response/length", "Response length, tokens"),
    ("value/explained_variance", "Explained variance of the value"),
    ("response/distinct_2", "Distinct-2 of a rollout"),
)
EVALUATIONS = ("evaluate", "evaluate_dpo")


def sections(runs: Sequence[Run]) -> list[Section]:
    """All sections; what cannot be made of damaged files says so."""
    makers: tuple[tuple[str, str, Callable[[Sequence[Run]], list[Block]]], ...] = (
        ("glance", "At a glance", _glance),
        ("trained", "What was trained on what", _trained),
        ("road", "The pipeline", _road),
        ("reward", "Reward model", _reward),
        ("policy", "PPO", _policy),
        ("overoptimization", "Over-optimization", overoptimized),
        ("judged", "Gold and test models against the proxy", _judged),
        ("tax", "What alignment cost", _tax),
        ("inside", "Looking inside", looked_into),
    )
    found = []
    for key, title, make in makers:
        try:
            blocks = make(runs)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"cannot be shown, some file has not what it should have ({type(error).__name__}: {error})"
            blocks = [Block(text=what)]
        if blocks or key != "inside":  # which few runs have
            found.append(Section(key, title, blocks))
    return found


def _of(runs: Sequence[Run], stage: str) -> list[tuple[int, Run, Stage]]:
    """The runs that have a stage, each with its number, which is its color."""
    return [(n, run, run.stages[stage]) for n, run in enumerate(runs) if stage in run.stages]


def _absent(runs: Sequence[Run], *stages: str) -> list[Block]:
    """A line for every run in which none of the stages has anything to show."""
    lines = []
    for run in runs:
        there = [run.stages[name] for name in stages if name in run.stages]
        if not any(stage.page or stage.metrics or stage.results for stage in there):
            notes = [f"{s.name} is {s.state}{f' ({s.note})' if s.note else ''}" for s in there]
            lines.append(Block(text=f"{run.name}: nothing here: {'; '.join(notes) or 'not in its recipe'}"))
    return lines


def _each(runs: Sequence[Run], run: Run, title: str) -> str:
    return title if len(runs) == 1 else f"{run.name}: {title}"


# ---------------------------------------------------------------- what and how long

_GLANCE = (  # stage, path, label, format; a difference is after less before
    ("reward", "held_out_accuracy", "reward model: held-out pair accuracy", ".3f"),
    ("evaluate", "gold", "gain in the gold score", "+.3f"),
    ("evaluate", "gold_length_controlled.gain_at_equal_length", "the same at equal length", "+.3f"),
    ("evaluate", "judge", "gain by the held-out reward model", "+.3f"),
    ("evaluate", "test", "gain by the test model", "+.3f"),
    ("evaluate", "reward", "gain by the proxy", "+.3f"),
    ("evaluate", "gap", "gain that the proxy alone sees, standard deviations", "+.2f"),
    ("evaluate", "response_length", "responses longer by, tokens", "+.1f"),
    ("evaluate", "kl", "KL from the start, nats a response", ".2f"),
    ("evaluate_dpo", "reward", "DPO: gain by the reward model", "+.3f"),
)


def _glance(runs: Sequence[Run]) -> list[Block]:
    rows: list[list[str]] = []
    sources: list[Source] = []
    for stage, path, label, form in _GLANCE:
        cells = {}
        for n, run, made in _of(runs, stage):
            if found := _dig(made.page or made.results, path):
                cells[n] = plain({"mean": found.get("mean", found.get("diff")), "ci95": found["ci95"]}, form)
                source = run, f"{stage}/{'manifest.json' if stage == 'reward' else 'summary.json'}"
                sources += [] if source in sources else [source]
        rows += [[label, *(cells.get(n, "-") for n in range(len(runs)))]] if cells else []
    rows += _verdicts(runs)
    return (
        [Block(head=["95% intervals", *(run.name for run in runs)], rows=rows, sources=sources)]
        if rows
        else []
    )


def _verdicts(runs: Sequence[Run]) -> list[list[str]]:
    """On how many tasks the policy is better and worse than the reference."""
    cells = {}
    for n, _, stage in _of(runs, "tax"):
        found = [f["verdict"] for _, variant, f in _differences(stage.page) if variant == "policy"]
        if found:
            cells[n] = f"{found.count('better')} better, {found.count('worse')} worse of {len(found)}"
    return [["tax: tasks", *(cells.get(n, "-") for n in range(len(runs)))]] if cells else []


_SHOWN = (  # dotted keys of the recipe
    "model.path", "model.dtype", "model.quantization", "lora.rank", "lora.alpha", "lora.layers",
    "dialogue.template", "dialogue.max_prompt_tokens", "dialogue.max_response_tokens", "data.comparisons",
    "data.prompts", "sft.data", "distill.method", "reward.objective", "reward.epochs",
    "reward.learning_rate", "reward.members", "ppo.steps", "ppo.batch_size", "ppo.epochs",
    "ppo.learning_rate", "ppo.kl_coef", "ppo.start", "dpo.beta", "evaluate.judge", "evaluate.prompts", "seed",
)  # fmt: skip


def _dig(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _said(found: Any) -> str:
    if isinstance(found, list | tuple):
        return ", ".join(map(_said, found)) or "none"
    return "-" if found is None else f"{found:g}" if isinstance(found, float) else str(found)


def _trained(runs: Sequence[Run]) -> list[Block]:
    rows = [[key, *(_said(_dig(run.recipe, key)) for run in runs)] for key in _SHOWN]
    counts = ("train", "held_out", "prompts", "held_out_prompts")
    rows += [
        [f"{name.replace('_', ' ')} ({'comparisons' if n < 2 else 'policy'})",
         *(_said(_dig(run.stages["comparisons"].results, name)) for run in runs)]
        for n, name in enumerate(counts)
    ]  # fmt: skip
    made = [[stage.manifest for stage in run.stages.values() if stage.manifest] for run in runs]
    for label, path in (
        ("machine", "machine.platform"), ("cores", "machine.cpus"), ("torch", "versions.torch"),
        ("transformers", "versions.transformers"), ("commit", "git_commit"),
    ):  # fmt: skip
        cells = [sorted({_said(_dig(manifest, path)) for manifest in manifests}) for manifests in made]
        rows.append([label, *(", ".join(found) or "-" for found in cells)])
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    marked = frozenset(n for n, row in enumerate(rows) if len(set(row[1:])) > 1)
    sources: list[Source] = []
    for run in runs:
        files = [f"{name}/{file}" for file in ("recipe.yaml", MANIFEST) for name in run.stages]
        sources += [(run, file) for file in files if (run.folder / file).is_file()][:1]
    head = ["", *(run.name for run in runs)]
    return [Block(head=head, rows=rows, marked=marked, sources=sources)]


def _road(runs: Sequence[Run]) -> list[Block]:
    blocks, lengths = [], []
    for n, run in enumerate(runs):
        rows = []
        for name, stage in run.stages.items():
            seconds, peak = (_number(stage.manifest.get(key)) for key in ("seconds", "peak_bytes"))
            rows.append([name, stage.state, _minutes(seconds), _gigabytes(peak), stage.note])
            if seconds is not None:
                lengths.append((name if len(runs) == 1 else f"{name} ({run.name})", seconds / 60, n))
        times = [_number(stage.manifest.get("seconds")) or 0.0 for stage in run.stages.values()]
        peaks = [_number(stage.manifest.get("peak_bytes")) or 0.0 for stage in run.stages.values()]
        rows.append(["all", "", _minutes(sum(times)), _gigabytes(max(peaks, default=0.0)), ""])
        sources = [(run, f"{name}/manifest.json") for name, stage in run.stages.items() if stage.manifest]
        head = ["stage", "state", "minutes", "peak memory, GB", "what is missing"]
        blocks.append(Block(_each(runs, run, "stages"), sources, head, rows))
    if lengths:
        svg = figures.bars("road", "Minutes of every stage", lengths, "minutes")
        blocks.append(Block("Minutes of every stage", [s for b in blocks for s in b.sources], svg=svg))
    return blocks


def _number(found: Any) -> float | None:
    usable = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if usable else None


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f}"


def _gigabytes(peak: float | None) -> str:
    return "" if not peak else f"{peak / 1e9:.2f}"


# ---------------------------------------------------------------- reward model


def _reward(runs: Sequence[Run]) -> list[Block]:
    carded = [(n, run, stage.page) for n, run, stage in _of(runs, "card") if stage.page]
    blocks = []
    if carded:
        shown = [_accuracies(page) for *_, page in carded]
        labels = list(dict.fromkeys(label for found in shown for label in found))
        rows = [[label, *(found.get(label, "-") for found in shown)] for label in labels]
        sources = [(run, "card/card.json") for _, run, _ in carded]
        head = ["held-out pairs, 95% intervals", *(run.name for _, run, _ in carded)]
        blocks.append(Block("Accuracy and calibration", sources, head, rows))
        bins = [(run.name, page["calibration"]["bins"]) for _, run, page in carded]
        svg = figures.reliability("calibration", "Predicted against observed preference", bins)
        blocks.append(Block("Calibration: predicted against observed", sources, svg=svg))
    for key, title in (
        ("reward/loss", "Loss in training"),
        ("reward/pair_accuracy", "Pair accuracy in training"),
    ):
        blocks += _curve(runs, "reward", key, title)
    return [*blocks, *_absent(runs, "reward", "card")]


def _accuracies(card: dict[str, Any]) -> dict[str, str]:
    """Rows of the table by label."""
    base, calibration = card["baselines"], card["calibration"]
    shares = {
        "this model": card["accuracy"]["overall"],
        "longer is better": base.get("longer_is_better"),
        "bag of words": base.get("bag_of_words"),
        "best linear probe": (card.get("probe") or {}).get("best"),
        "on pairs of like length": base.get("like_length"),
        "ceiling by the labels' noise": (card.get("ceiling") or {}).get("noise"),
    }
    rows = {label: percent(figure) for label, figure in shares.items() if figure}
    rows["expected calibration error"] = plain(calibration["ece"], ".3f")
    rows["calibration slope (1 is right)"] = plain(calibration["slope"], ".2f")
    rows["log loss"] = plain(calibration["log_loss"], ".3f")
    rows["rank correlation with length"] = plain(card["length"]["spearman"], ".2f")
    return rows


# ---------------------------------------------------------------- curves


_NO_MATTER = ("name", "seed", "rank", "chat", "export")  # to what is trained and measured, but for the seed


def seed_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one recipe that differ in seed and name alone stand together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        recipe = {key: value for key, value in run.recipe.items() if key not in _NO_MATTER}
        groups.setdefault(hash_of(recipe if run.recipe else run.name), []).append(run)
    return list(groups.values())


def _curve(runs: Sequence[Run], stage: str, key: str, title: str) -> list[Block]:
    lines, sources = [], []
    for color, group in enumerate(seed_groups(runs)):
        points = []
        for run in group:
            metrics = run.stages[stage].metrics if stage in run.stages else []
            both = [(_number(row.get("step")), _number(row.get(key))) for row in metrics]
            known = [(x, y) for x, y in both if x is not None and y is not None]
            if known:
                points.append(known)
                sources.append((run, f"{stage}/metrics.jsonl"))
        name = group[0].name + (f" and {len(points) - 1} more seeds" if len(points) > 1 else "")
        if points:
            lines.append(Curve(name, points, color))
    if not lines:
        return []
    svg = figures.curves(f"{stage}-{key.replace('/', '-')}", title, lines)
    return [Block(title, sources, svg=svg)]


def _policy(runs: Sequence[Run]) -> list[Block]:
    blocks = [block for key, title in CURVES for block in _curve(runs, "ppo", key, title)]
    for key, title in (("dpo/loss", "DPO loss"), ("dpo/accuracy", "DPO: preferred one above the other")):
        blocks += _curve(runs, "dpo", key, title)
    several = [group for group in seed_groups(runs) if len(group) > 1]
    if blocks and several:
        blocks.insert(0, Block(text="Bands are 95% intervals over the seeds of a recipe, by Student's t."))
    return [*blocks, *_absent(runs, "ppo", "dpo")]


# ---------------------------------------------------------------- evaluation


def _judged(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    for stage in EVALUATIONS:
        for n, run, made in _of(runs, stage):
            if made.page:
                blocks += _evaluated(runs, n, run, made)
    return [*blocks, *_absent(runs, *EVALUATIONS)]


def _evaluated(runs: Sequence[Run], n: int, run: Run, made: Stage) -> list[Block]:
    page, rows = made.page, before_after(made.page)
    rows += [[label, "", plain(page[key], form), "", ""] for key, label, form in (
        ("gold_win_rate", "win rate by gold", ".3f"), ("judge_win_rate", "win rate by held-out model", ".3f"),
        ("reward_win_rate", "win rate by the proxy", ".3f"), ("kl", "KL from the start, nats", ".2f"),
    ) if page.get(key)]  # fmt: skip
    sources = [(run, f"{made.name}/summary.json")]
    head = ["held-out prompts, paired", "before", "after", "difference", "95% interval"]
    title = _each(runs, run, f"before and after {'DPO' if made.name.endswith('dpo') else 'PPO'}")
    blocks = [Block(title, sources, head, rows)]
    judge = next((name for name in ("gold", "judge") if name in page), None)
    if judge and made.name == "evaluate":
        scored = [row["scores"] for row in run.responses if isinstance(row.get("scores"), dict)]
        scored = [s for s in scored if judge in s and "reward" in s]
        if scored:
            groups = [
                (side, [s["reward"][i] for s in scored], [s[judge][i] for s in scored])
                for i, side in enumerate(("before", "after"))
            ]
            svg = figures.scatter(f"proxy-{n}", "Judge against proxy", groups, "proxy", judge)
            file = [(run, f"{made.name}/responses.jsonl")]
            blocks.append(Block(_each(runs, run, f"{judge} against proxy, a dot a response"), file, svg=svg))
    if best := page.get("best_of_n"):
        blocks.append(_best_of(runs, f"best-{made.name}-{n}", run, best, sources))
    return blocks


def _best_of(runs: Sequence[Run], key: str, run: Run, best: dict[str, Any], sources: list[Source]) -> Block:
    """Best of n from the start beside the policy, by every score."""
    lines = [
        Dot(f"best of {row['n']}, {name}", row["scores"][name]["mean"], row["scores"][name]["ci95"], color)
        for color, name in enumerate(best["policy"]["scores"])
        for row in [*best["rows"], {"n": "policy", **best["policy"]}]
    ]
    lines = [line._replace(label=line.label.replace("best of policy", "policy")) for line in lines]
    svg = figures.dots(key, "Best of n and the policy", lines, zero=False, x="score")
    return Block(_each(runs, run, "best of n from the start, and the policy"), sources, svg=svg)


def _tax(runs: Sequence[Run]) -> list[Block]:
    blocks = []
    for n, run, stage in _of(runs, "tax"):
        page = stage.page
        rows: list[list[str]] = []
        for task, variant, found in _differences(page):
            gain = plain({"mean": found["gain"], "ci95": found["gain_ci95"]}, "+.3f")
            rows.append([task["task"], task["metric"], variant, gain, found["verdict"]])
        if not rows:
            continue
        sources = [(run, "tax/tax.json")]
        head = ["task", "metric", "variant", f"gain over {page['reference']} [95% interval]", "verdict"]
        blocks.append(Block(_each(runs, run, "every task, + is better"), sources, head, rows))
        small = [(t, v, f) for t, v, f in _differences(page) if f["gain"] is not None and abs(f["gain"]) <= 1]
        colors = {name: i for i, name in enumerate(dict.fromkeys(v for _, v, _ in small))}
        lines = [Dot(f"{t['task']}, {v}", f["gain"], f["gain_ci95"], colors[v]) for t, v, f in small]
        if lines:
            svg = figures.dots(f"tax-{n}", "Gain by task", lines, x=f"gain over {page['reference']}")
            title = _each(runs, run, "gains of at most 1 in their unit")
            blocks.append(Block(title, sources, svg=svg))
    return [*blocks, *_absent(runs, "tax")]


def _differences(page: dict[str, Any]) -> Iterable[tuple[dict[str, Any], str, dict[str, Any]]]:
    return ((task, v, f) for task in page.get("tasks") or [] for v, f in task["differences"].items())
