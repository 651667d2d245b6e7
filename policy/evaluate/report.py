"""The summary of a run as a page that reads without help."""

from __future__ import annotations

from typing import Any

from rlhf.markdown import table

_ROWS = (  # key, label, format
    ("gold", "gold score", ".3f"),
    ("judge", "held-out reward model", ".3f"),
    ("reward", "reward model (the training proxy)", ".3f"),
    ("response_length", "response length, tokens", ".1f"),
    ("eos_rate", "share that ended itself", ".3f"),
    ("entropy", "entropy, nats a token", ".2f"),
    ("distinct_1", "distinct-1", ".3f"),
    ("distinct_2", "distinct-2", ".3f"),
)


def _interval(ends: list[float] | None, form: str) -> str:
    return "unknown" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else f"{value:{form}}"


def _estimate(figure: dict[str, Any], form: str) -> str:
    return f"{_number(figure['mean'], form)} {_interval(figure['ci95'], form)}"


def as_markdown(summary: dict[str, Any]) -> str:
    """The page: what was gained, what it cost, what the model says now.

    Args:
        summary: as written to ``summary.json``.
    """
    parts = [
        f"# {summary['name']}, seed {summary['seed']}\n",
        f"Base {summary['model']}; {summary['reward']['n']} held-out prompts, the same for both sides; "
        "95% intervals, paired by prompt.\n",
        _figures(summary),
        *([_best_of_n(summary["best_of_n"])] if "best_of_n" in summary else []),
        _proxies(summary),
        _costs(summary["stages"]),
        _samples(summary["samples"]),
    ]
    return "\n".join(parts)


def _figures(summary: dict[str, Any]) -> str:
    lines = ["| figure | before | after | difference | 95% interval |", "|---|---|---|---|---|"]
    for key, label, form in _ROWS:
        if key in summary:
            f = summary[key]
            cells = [_number(f[k], form) for k in ("before", "after", "diff")]
            lines.append(f"| {label} | {' | '.join(cells)} | {_interval(f['ci95'], form)} |")
    lines.append("")
    for key, label in (("gold", "gold"), ("judge", "held-out reward model"), ("reward", "reward model")):
        if f"{key}_win_rate" in summary:
            lines.append(f"Win rate by {label}: {_estimate(summary[f'{key}_win_rate'], '.3f')}.")
    kl, k3 = (_estimate(summary[key], ".2f") for key in ("kl", "kl_k3"))
    lines.append(f"KL(policy || reference), nats a response: {kl} (k1), {k3} (k3).\n")
    return "\n".join(lines)


_JUDGES = {
    "gold": "gold score",
    "judge": "score by the held-out reward model",
    "reward": "proxy score",
}


def _best_of_n(found: dict[str, Any]) -> str:
    policy, names = found["policy"], list(found["policy"]["scores"])
    scores = [_JUDGES[name] for name in names]
    head = ["n", "KL, nats", "win rate", *scores, f"{_JUDGES[found['judge']]} less the policy's"]
    rows = [
        [
            str(row["n"]),
            f"at most {row['kl_bound']:.3f}",
            f"at most {row['win_rate_bound']:.3f}",
            *(_estimate(row["scores"][name], ".3f") for name in names),
            _estimate(row["over_policy"], "+.3f"),
        ]
        for row in found["rows"]
    ]
    measured = [_estimate(policy[key], ".3f") for key in ("kl", "win_rate")]
    rows.append(["policy", *measured, *(_estimate(policy["scores"][name], ".3f") for name in names), ""])
    parts = [
        "## Best of n\n",
        f"{found['samples']} responses of the reference to each of {found['prompts']} prompts; out of n, "
        "the proxy (the score that PPO was trained on) chooses one. "
        f"{100 * found['tied']:.1f}% of the responses share their proxy score with another one to the same "
        "prompt.\n",
        table(head, rows),
        _reached(found),
    ]
    return "\n".join(parts)


def _reached(found: dict[str, Any]) -> str:
    """One sentence: at which n best-of-n is as good as the policy."""
    judge, policy = found["judge"], found["policy"]
    goal = f"the policy's {_JUDGES[judge]}, {_number(policy['scores'][judge]['mean'], '.3f')},"
    if found["reaches"] is None:
        return f"Best of n does not reach {goal} up to n = {found['rows'][-1]['n']}.\n"
    row = next(row for row in found["rows"] if row["n"] == found["reaches"])
    return (
        f"Best of n reaches {goal} at n = {row['n']}, with a KL of at most {row['kl_bound']:.2f} nats; the "
        f"policy's is {_number(policy['kl']['mean'], '.2f')}.\n"
    )


def _proxies(summary: dict[str, Any]) -> str:
    model = summary["reward_model"]
    if "held_out_accuracy" not in model:
        return ""
    line = f"Reward model: held-out pair accuracy {_estimate(model['held_out_accuracy'], '.3f')}"
    line += f" (training part {_estimate(model['train_accuracy'], '.3f')})"
    if "noise_ceiling" in model:
        line += f"; noise ceiling of the labels {_estimate(model['noise_ceiling'], '.3f')}"
    if "probe_accuracy" in model:
        line += f"; linear probe on frozen features {_estimate(model['probe_accuracy'], '.3f')}"
    return f"{line}; {model['train']} comparisons to train on, {model['held_out']} held out.\n"


def _costs(stages: dict[str, dict[str, float]]) -> str:
    lines = ["| stage | minutes | peak memory, GB |", "|---|---|---|"]
    for name, cost in stages.items():
        lines.append(f"| {name} | {cost['seconds'] / 60:.1f} | {cost['peak_bytes'] / 1e9:.2f} |")
    total = sum(cost["seconds"] for cost in stages.values()) / 60
    peak = max(cost["peak_bytes"] for cost in stages.values()) / 1e9
    return "\n".join([*lines, f"| all | {total:.1f} | {peak:.2f} |", ""])


def _samples(samples: list[dict[str, Any]]) -> str:
    lines = ["| prompt | before | after |", "|---|---|---|"]
    for sample in samples:
        judged = next(iter(sample["scores"].values()))
        cells = [_cell(sample["prompt"])]
        cells += [
            f"{_cell(sample[side])} ({score:.2f})"
            for side, score in zip(("before", "after"), judged, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(text: str, limit: int = 200) -> str:
    """Text that stays inside one table cell."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
