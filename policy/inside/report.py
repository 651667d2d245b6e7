"""``inside.md`` and its plots: the figures of `make inside` in plain words."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

from policy.inside.circuit import page as circuit_page
from policy.inside.neurons.page import lens_section, neurons_section
from policy.inside.solutions.page import policies_section, prompts_section
from rlhf.markdown import number, percent, plain, share, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Figures = dict[str, Any]
_ONE = (
    "Of each head and each neuron: what it adds to the stream in one model is put in the place of what it "
    "adds in the other, on the same tokens. Shares are of the whole change and need not add up to one, since "
    "components work through each other; intervals (95%) are over prompts. `random`: as many random heads "
    "and neurons, set by set.\n"
)


def as_markdown(found: Figures) -> str:
    """The page.

    found: as written to ``inside.json``.
    """
    lines = [f"# {found['name']}: looking inside\n", f"Base {found['model']}, seed {found['seed']}.\n"]
    for key, title in (("policy", "What carries PPO's change"), ("start", "What carries the start's change")):
        if key in found:
            lines += [f"## {title}\n", _ONE, *_change(found[key], key)]
    lines += ["## What the reward model reads\n", *_reads(found["reads"])]
    if "circuit" in found:
        lines += [
            "## Along which edges it computes the difference\n",
            *circuit_page.section(found["circuit"]),
        ]
    if "neurons" in found:
        lines += neurons_section(found["neurons"]) + lens_section(found["lens"])
    if "prompts" in found:
        lines += prompts_section(found["prompts"])
    if "policies" in found:
        lines += policies_section(found["policies"])
    return "\n".join(lines)


def _change(found: Figures, key: str) -> list[str]:
    into, back, reward = found["into"], found["back"], found["reward"]
    lines = [
        f"### The log-prob of its responses\n\nThey gained {plain(found['gain'], '+.2f')} nats each on "
        f"{into['rows']} prompts{_unsure(found['gain'])}. {_in_words(into)}\n",
        _together(into, "before, patched towards after"),
        _together(back, "after, patched back to before"),
        f"![by layer]({key}.png)\n",
        _alone(into),
        "### The reward\n",
    ]
    if "rise" in found:
        rise = found["rise"]
        lines.append(f"The mean score of a response rose by {plain(rise, '+.3f')}{_unsure(rise)}.\n")
    if "skipped" in reward:
        return [*lines, f"Not looked into: {reward['skipped']}.\n"]
    first_order = f"To first order the change of log-probs makes {reward['change']:+.3f} of it."
    return [*lines, f"{first_order} {_in_words(reward)}\n", _together(reward, "before"), _alone(reward)]


def _unsure(change: Figures) -> str:
    """What is to be said of shares of a change that may be none."""
    ends = change["ci95"]
    return (
        ", not distinguishable from 0, so that shares of it say little"
        if ends and ends[0] <= 0 <= ends[1]
        else ""
    )


def _in_words(found: Figures) -> str:
    """What the components patched together say, in a sentence or two."""
    if not found["together"]:
        return "There are too few components to be compared with random ones."
    last = found["together"][-1]
    null = statistics.fmean(last["random"])
    return (
        f"The first {last['size']} of {found['components']} heads and neurons carry "
        f"{percent(last['first'])} of it, as many random ones {100 * null:.1f}%; all heads alone "
        f"{percent(found['all']['heads'])}, all neurons alone {percent(found['all']['neurons'])}."
    )


def _together(found: Figures, title: str) -> str:
    rows = [
        [str(row["size"]), *share(row["first"]), ", ".join(f"{100 * x:.1f}%" for x in row["random"])]
        for row in found["together"]
    ]
    return table([f"components ({title})", "share", "95% interval", "random"], rows)


def _alone(found: Figures) -> str:
    rows = [[row["name"], f"{100 * row['estimate']:.1f}%", *share(row["exact"])] for row in found["alone"]]
    return table(["component", "estimate", "exact", "95% interval"], rows)


def _reads(found: Figures) -> list[str]:
    if "skipped" in found:
        return [f"Not looked into: {found['skipped']}.\n"]
    rows, parts = [], []
    for name, kind in found["kinds"].items():
        if kind["pairs"]:
            sides = " / ".join(text.strip() for text in kind["example"])
            figures = [plain(kind["difference"], "+.3f"), percent(kind["expected"])]
            rows.append([name, kind["asks"], sides, str(kind["pairs"]), *figures])
        if "parts" in kind:
            parts += [f"### {name}\n", f"{_in_words(kind['parts'])}\n", _alone(kind["parts"])]
        else:
            parts += [f"### {name}\n", f"Not looked into: {kind['skipped']}.\n"]
    head = ["kind", "what differs", "first / second", "pairs", "difference of scores", "first preferred"]
    return [
        table(head, rows) if rows else "No pair has equally many tokens, and few enough.\n",
        _length(found["length"]),
        *(["![by layer](reads.png)\n"] if any("parts" in kind for kind in found["kinds"].values()) else []),
        *parts,
    ]


def _length(found: Figures) -> str:
    """What a neutral sentence does to the score, and what was left out."""
    filler = f"the neutral sentence `{found['filler']}` ({found['tokens']} tokens) behind a response"
    added = "; ".join(f"{n} of them {plain(x, '+.3f')}" for n, x in enumerate(found["added"], 1))
    why = "a response would be longer than `dialogue.max_response_tokens`"
    if not added:
        return f"Length: what {filler} does was not asked: with one {why}.\n"
    without = f" Left out: with {found['left_out'][0]} of them {why}." if found["left_out"] else ""
    return f"Length: {filler} changes its score: {added}.{without}\n"


def draw(found: Figures, folder: Path) -> None:
    """Write a PNG for each question that has an answer: estimated shares by layer, and whole layers."""
    for key in ("policy", "start"):
        if key in found:
            panels = {"log-prob": found[key]["into"], "reward": found[key]["reward"]}
            _plot(panels, folder / f"{key}.png", f"{found['name']}: {key}, share of the change by layer")
    kinds = found["reads"].get("kinds", {})
    panels = {name: kind.get("parts", {"skipped": ""}) for name, kind in kinds.items()}
    _plot(panels, folder / "reads.png", f"{found['name']}: reward model, share of the difference by layer")
    circuit_page.draw(found.get("circuit", {}), folder)


def _plot(panels: dict[str, Figures], file: Path, title: str) -> None:
    shown = {name: panel for name, panel in panels.items() if "skipped" not in panel}
    if not shown:
        return
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.5 * len(shown), 3.2), squeeze=False, layout="constrained"
    )
    for ax, (name, panel) in zip(axes[0], shown.items(), strict=True):
        for offset, (kind, shares) in zip((-0.2, 0.2), panel["by_layer"].items(), strict=True):
            places = [layer + offset for layer in range(len(shares))]
            ax.bar(places, shares, width=0.4, label=f"{kind}, estimated")
        states = [(layer, value["mean"]) for layer, value in panel["states"] if value["mean"] is not None]
        ax.plot(*zip(*states, strict=True), "k.-", linewidth=0.8, label="whole layer, exact")
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_title(f"{name}: {number(panel['change'], '+.3g')}", fontsize=9)
        ax.set_xlabel("layer", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
