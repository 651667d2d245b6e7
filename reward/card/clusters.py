"""Which comparisons depend on each other: the units behind every interval of the card. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf.data.comparisons import Comparison, prompt_key
from rlhf.stats.clustered import Indices

_SUITE = re.compile(r"([A-Za-z0-9_ -]+?):(.+)", re.DOTALL)
_SUITES = ("rmbench", "rewardbench", "rewardbench2", "judgebench", "ppe")


class Clusters(NamedTuple):
    """Clusters of comparisons; those of one may depend on each other, clusters are independent."""

    of_C: Indices
    """The cluster of every comparison, numbered in the order of their first comparisons."""
    unit: str
    """What a cluster is, in the plural: "prompts", "groups", "sets of responses" or "comparisons"."""


def suite_item(group: str | None) -> tuple[str, str] | None:
    """Benchmark and item of a comparison's group, as in ``rm_bench:<item>``; None for another group.

    The benchmark comes in small letters and digits: rmbench, rewardbench, rewardbench2, judgebench, ppe.
    """
    found = _SUITE.fullmatch(group or "")
    name = re.sub("[^a-z0-9]", "", found[1].lower()) if found else ""
    return (name, found[2]) if found and name in _SUITES else None


def clusters(comparisons: Sequence[Comparison]) -> Clusters:
    """By group where one is given, else by prompt; where there is but one of those, by what else is shared.

    The group of a benchmark's item names a cell of it, so there the prompt counts. Where one prompt (or one
    group) is all there is, as in a set without prompts, comparisons that share a response, directly or
    through others, are one cluster; where that leaves more than half of them in one, as in a tournament of
    one pool, each comparison is its own, which leaves what they share out of account.
    """
    names: list[tuple[str, str]] = []
    for c in comparisons:
        grouped = c.group is not None and suite_item(c.group) is None
        names.append(("group", str(c.group)) if grouped else ("prompt", prompt_key(c.prompt)))
    if len(set(names)) > 1 or len(comparisons) < 2:
        unit = "groups" if any(kind == "group" for kind, _ in names) else "prompts"
        return Clusters(_numbered(names), unit)
    parts_C = _connected([[r.strip() for r in c.responses] for c in comparisons])
    if 2 * int(np.bincount(parts_C).max()) <= len(comparisons):
        return Clusters(parts_C, "sets of responses")
    return Clusters(np.arange(len(comparisons)), "comparisons")


def _numbered(names: Sequence[object]) -> Indices:
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], dtype=np.intp)


def _connected(texts_C: Sequence[Sequence[str]]) -> Indices:
    """Components of the comparisons, two of which are joined where they have a text in common."""
    above = list(range(len(texts_C)))

    def root(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    first: dict[str, int] = {}
    for i, texts in enumerate(texts_C):
        for text in texts:
            above[root(i)] = root(first.setdefault(text, i))
    return _numbered([root(i) for i in range(len(texts_C))])
