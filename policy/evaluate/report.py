"""The summary of a run as a page that reads without help."""

from __future__ import annotations

from typing import Any

from rlhf.markdown import number, plain, table
from rlhf.report.blocks import before_after

_WIN_RATES = {"gold": "gold", "judge": "held-out reward model", "test": "test model",
              "reward": "reward model"}  # fmt: skip
_SCORES = {
    "gold": "gold score",
    "judge": "score by the held-out reward model",
    "test": "score by the test model",
    "reward": "proxy score",
}


def as_markdown(summary: dict[str, Any]) -> str:
    """The page: what was gained, what it cost, what the model writes now.

    Args:
        summary: as written to ``summary.json``.
    """
    parts = [
        f"# {summary['name']}, seed {summary['seed']}{_of(summary)}\n",
        f"Base {summary['model']}; {summary['reward']['n']} held-out prompts, the same for both sides; "
        "95% intervals, paired by prompt.\n",
        _figures(summary),
        _over_optimization(summary),
        _length_controlled(summary),
        *([_best_of_n(summary["best_of_n"])] if "best_of_n" in summary else []),
        _reward_model(summary["reward_model"]),
        _costs(summary["stages"]),
        _samples(summary["samples"]),
    ]
    return "\n".join(parts)


def _of(summary: dict[str, Any]) -> str:
    return f", policy {summary['policy']}" if "policy" in summary else ""


def _figures(summary: dict[str, Any]) -> str:
    lines = [
        f"Win rate by {label}: {plain(summary[f'{key}_win_rate'], '.3f')}."
        for key, label in _WIN_RATES.items()
        if f"{key}_win_rate" in summary
    ]
    kl, k3 = (plain(summary[key], ".2f") for key in ("kl", "kl_k3"))
    lines.append(f"KL(policy || reference), nats a response: {kl} (k1), {k3} (k3).\n")
    if "forward_kl" in summary:
        forward = plain(summary["forward_kl"], ".2f")
        lines.append(f"KL(reference || policy), on the reference's responses: {forward} nats.\n")
    return "\n".join(
        [table(["figure", "before", "after", "difference", "95% interval"], before_after(summary)), *lines]
    )


def _over_optimization(summary: dict[str, Any]) -> str:
    """The verdict of PPO's log, and the gap between both reward models on held-out prompts."""
    found = summary.get("over_optimization")
    lines = [f"Over-optimization: {found['text']}\n"] if found else []
    if gap := summary.get("gap"):
        lines.append(
            f"On the held-out prompts the reward model's score rose by {plain(gap, '.2f')} standard "
            "deviations more than the test model's.\n"
        )
    return "\n".join(lines)


def _length_controlled(summary: dict[str, Any]) -> str:
    """What of the gain is not length, a row a judge; empty for a summary of an earlier version."""
    found = {key: summary.get(f"{key}_length_controlled") for key in _WIN_RATES}
    rows = [[_WIN_RATES[key], *_controlled(row)] for key, row in found.items() if row]
    if not rows:
        return ""
    return "\n".join([_CONTROL, table(["judge", *_CONTROLLED], rows)])


_CONTROLLED = (
    "gain at equal length",
    "gain a token",
    "win rate at equal length",
    "pairs of about equal length",
    "gain there",
    "win rate there",
)
_CONTROL = (
    "At equal length: the intercept of the gain's regression on the difference in tokens, and the win rate "
    "by a logistic one; about equal: within 10% of the longer response.\n"
)


def _controlled(row: dict[str, Any]) -> list[str]:
    """The cells of :data:`_CONTROLLED`."""
    near = row["about_equal"]
    return [
        plain(row["gain_at_equal_length"], "+.3f"),
        plain(row["gain_a_token"], "+.4f"),
        plain(row["win_rate_at_equal_length"], ".3f"),
        str(near["pairs"]),
        plain(near["gain"], "+.3f"),
        plain(near["win_rate"], ".3f"),
    ]


def _best_of_n(found: dict[str, Any]) -> str:
    policy, names = found["policy"], list(found["policy"]["scores"])
    scores = [_SCORES[name] for name in names]
    head = ["n", "KL, nats", "win rate", *scores, f"{_SCORES[found['judge']]} less the policy's"]
    rows = [
        [
            str(row["n"]),
            f"at most {row['kl_bound']:.3f}",
            f"at most {row['win_rate_bound']:.3f}",
            *(plain(row["scores"][name], ".3f") for name in names),
            plain(row["over_policy"], "+.3f"),
        ]
        for row in found["rows"]
    ]
    measured = [policy["kl"], policy["win_rate"], *(policy["scores"][name] for name in names)]
    rows.append(["policy", *(plain(figure, ".3f") for figure in measured), ""])
    parts = [
        "## Best of n\n",
        f"{found['samples']} responses of the reference to each of {found['prompts']} prompts; out of n, "
        "the proxy (the score that PPO was trained on) chooses one. "
        f"{100 * found['tied']:.1f}% of the responses share their proxy score with another one to the same "
        "prompt.\n",
        table(head, rows),
        _reached(found),
        *_controlled_best_of_n(found),
    ]
    return "\n".join(parts)


def _controlled_best_of_n(found: dict[str, Any]) -> list[str]:
    """What best-of-n gains over the reference's own responses that is not length; by the judge."""
    rows = [
        [
            str(row["n"]),
            plain(row["length"], ".1f"),
            plain(row["length_controlled"]["gain"], "+.3f"),
            *_controlled(row["length_controlled"]),
        ]
        for row in found["rows"]
        if "length_controlled" in row
    ]
    head = ["best of", "length, tokens", "gain over the reference", *_CONTROLLED]
    return [f"By the {_SCORES[found['judge']]}, length-controlled:\n", table(head, rows)] if rows else []


def _reached(found: dict[str, Any]) -> str:
    """One sentence: at which n best-of-n is as good as the policy."""
    judge, policy = found["judge"], found["policy"]
    goal = f"the policy's {_SCORES[judge]}, {number(policy['scores'][judge]['mean'], '.3f')},"
    if found["reaches"] is None:
        return f"Best of n does not reach {goal} up to n = {found['rows'][-1]['n']}.\n"
    row = next(row for row in found["rows"] if row["n"] == found["reaches"])
    return (
        f"Best of n reaches {goal} at n = {row['n']}, with a KL of at most {row['kl_bound']:.2f} nats; the "
        f"policy's is {number(policy['kl']['mean'], '.2f')}.\n"
    )


def _reward_model(model: dict[str, Any]) -> str:
    if "held_out_accuracy" not in model:
        return ""
    line = f"Reward model: held-out pair accuracy {plain(model['held_out_accuracy'], '.3f')}"
    line += f" (training part {plain(model['train_accuracy'], '.3f')})"
    for key, label in (
        ("noise_ceiling", "noise ceiling of the labels"),
        ("probe_accuracy", "linear probe on frozen features"),
    ):
        if key in model:
            line += f"; {label} {plain(model[key], '.3f')}"
    return f"{line}; {model['train']} comparisons to train on, {model['held_out']} held out.\n"


def _costs(stages: dict[str, dict[str, float]]) -> str:
    costs = [(name, cost["seconds"], cost["peak_bytes"]) for name, cost in stages.items()]
    costs.append(("all", sum(seconds for _, seconds, _ in costs), max(peak for *_, peak in costs)))
    rows = [[name, f"{seconds / 60:.1f}", f"{peak / 1e9:.2f}"] for name, seconds, peak in costs]
    return table(["stage", "minutes", "peak memory, GB"], rows)


def _samples(samples: list[dict[str, Any]]) -> str:
    rows = []
    for sample in samples:
        before, after = next(iter(sample["scores"].values()))
        scored = [f"{_short(sample['before'])} ({before:.2f})", f"{_short(sample['after'])} ({after:.2f})"]
        rows.append([_short(sample["prompt"]), *scored])
    return table(["prompt", "before", "after"], rows)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else flat[:197] + "..."
