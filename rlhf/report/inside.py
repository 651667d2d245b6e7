"""What `make inside` found, on a run's page: how few components carry PPO's change, what the reward reads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rlhf.markdown import percent, plain
from rlhf.report import figures
from rlhf.report.blocks import Block, Source
from rlhf.report.figures import Dot
from rlhf.report.gather import Run

STAGE = "inside"
_CHANGES = {"policy": "what PPO changed", "start": "what its start had changed"}


def looked_into(runs: Sequence[Run]) -> list[Block]:
    """The section of the page; empty where no run was looked into."""
    blocks = []
    for n, run in enumerate(runs):
        stage = run.stages.get(STAGE)
        if stage is None or not stage.page:
            continue
        name = "" if len(runs) == 1 else f"{run.name}: "
        sources = [(run, f"{STAGE}/inside.json"), (run, f"{STAGE}/inside.md")]
        for key, what in _CHANGES.items():
            if key in stage.page:
                blocks += _carried(f"{STAGE}-{key}-{n}", f"{name}{what}", stage.page[key], sources)
        blocks += _read(f"{STAGE}-reads-{n}", name, stage.page["reads"], sources)
        blocks += _neurons(name, stage.page.get("neurons", {}), sources)
        blocks += _lens(name, stage.page.get("lens", {}), sources)
    return blocks


def _carried(key: str, what: str, found: dict[str, Any], sources: Sequence[Source]) -> list[Block]:
    """Shares of the change of the responses' log-prob by components patched together, and random ones."""
    lines = []
    for side, direction in (("into", "into the model before"), ("back", "back to the model before")):
        for row in found[side]["together"]:
            if row["first"]["mean"] is None:
                continue
            label = f"{row['size']:,} {direction}"
            lines.append(Dot(label, 100 * row["first"]["mean"], _percents(row["first"]["ci95"]), 0))
            null = [100 * x for x in row["random"]]
            lines.append(Dot(f"{label}, random", statistics.fmean(null), [min(null), max(null)], 1))
    if not lines:
        return []
    title = f"{what}: share of the log-prob's change by the first heads and neurons, and as many random ones"
    svg = figures.dots(key, title, lines, x="% of the change")
    return [Block(title, sources, svg=svg)]


def _read(key: str, name: str, found: dict[str, Any], sources: Sequence[Source]) -> list[Block]:
    """By how much the scores of minimal pairs differ, and what a neutral sentence adds."""
    if "skipped" in found:
        return [Block(text=f"{name}the reward model was not looked into: {found['skipped']}")]
    kinds = {kind: row for kind, row in found["kinds"].items() if row["pairs"]}
    rows = [
        [kind, " / ".join(text.strip() for text in row["example"]), plain(row["difference"], "+.3f"),
         percent(row["expected"])]
        for kind, row in kinds.items()
    ]  # fmt: skip
    head = ["pairs", "first / second", "difference of scores", "first preferred"]
    lines = [
        Dot(kind, row["difference"]["mean"], row["difference"]["ci95"], 0) for kind, row in kinds.items()
    ]
    lines += [
        Dot(f"{times} neutral sentence{'s' if times > 1 else ''} behind", added["mean"], added["ci95"], 1)
        for times, added in enumerate(found["length"]["added"], 1)
    ]
    if not lines:
        return [Block(text=f"{name}no pair of responses for the reward model has equally many tokens")]
    title = f"{name}what the reward model reads: differences of its scores, standard deviations"
    svg = figures.dots(key, title, lines, x="difference of scores")
    table = [Block(title, sources, head, rows)] if rows else []
    return [*table, Block(sources=sources, svg=svg)]


def _neurons(name: str, found: dict[str, Any], sources: Sequence[Source]) -> list[Block]:
    """The neurons that moved most, with a line each."""
    if not found.get("top"):
        return []
    patched = found["patched"]
    null = ", ".join(f"{100 * x:.1f}%" for x in patched["random"])
    title = (
        f"{name}the {len(found['top'])} neurons that PPO moved most; patched into the model before, they "
        f"carry {percent(patched['first'])} of the change of the log-prob, as many random ones {null}"
    )
    rows = [[row["name"], f"{row['change']:.2f}", row["description"]] for row in found["top"]]
    return [Block(title, sources, ["neuron", "change, deviations", "its tokens"], rows)]


def _lens(name: str, found: dict[str, Any], sources: Sequence[Source]) -> list[Block]:
    """What the mean difference of the last layer's states on plain texts says, policy by policy."""
    told = {policy: one for policy, one in found.get("policies", {}).items() if one["layers"]}
    rows = [
        [policy, percent(one["strength"]), percent(one["share"]), percent(one["random"]),
         " ".join(one["layers"][-1]["tokens"])]
        for policy, one in told.items()
    ]  # fmt: skip
    title = f"{name}what is left in plain texts: the mean difference of the states, read as tokens"
    head = [
        "policy",
        "norm of a state",
        "first tokens that training raised",
        "random",
        "last layer's first tokens",
    ]
    return [Block(title, sources, head, rows)] if rows else []


def _percents(ends: Sequence[float] | None) -> list[float] | None:
    return [100 * end for end in ends] if ends else None
