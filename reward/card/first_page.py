"""The parts of the card's page that a reader needs first, and those that are not on every card."""

from __future__ import annotations

from typing import Any

from rlhf.markdown import Figure, cell, number, percent, plain, points, share, table, value

_DEPENDENCE = {
    "prompts": "the pairs of one prompt are taken as dependent",
    "groups": "the pairs of one group (`group` in the data) are taken as dependent",
    "sets of responses": "all comparisons have one prompt, so those that share a response, directly or "
    "through others, are taken as dependent",
    "comparisons": "all comparisons have one prompt and most hang together by their responses, so each "
    "comparison is taken as independent, and the intervals are too narrow",
}
_CEILINGS = {
    "annotators": (
        "ceiling: annotators",
        "mean confidence of the comparisons that carry one: where it is the share of votes for the majority, "
        "how often one annotator agrees with it",
    ),
    "duplicates": (
        "ceiling: pairs judged again",
        "of two judgments of the same pair, how often they agree, in all that was read; a copied row "
        "counts as one that agrees",
    ),
    "noise": (
        "ceiling: noise of the labels",
        "what the best possible score gets, by the labeler's own formula",
    ),
}
_SUITES = {
    "rmbench": "RM-Bench",
    "rewardbench": "RewardBench",
    "rewardbench2": "RewardBench 2",
    "judgebench": "JudgeBench",
    "ppe": "PPE",
}
_CURVES = {
    "probe": "Of the linear probe on the base's frozen states (last layer, last token), not of the reward "
    "model, which would have to be trained once for every number (card.curve_of: reward): the curve says "
    "whether more comparisons would help.",
    "reward": "Of the reward model, trained by the recipe's settings on each number of comparisons.",
}
_STYLES = ("concise", "detailed", "Markdown")


def section(title: str, *parts: str) -> str:
    """A heading and its paragraphs and tables."""
    return "\n".join([f"## {title}\n", *parts])


def dependence(card: dict[str, Any]) -> str:
    """What the intervals take as dependent, without a full stop."""
    said = _DEPENDENCE[card["unit"]]
    left_out = card["pairs_left_out"]
    return said + (f"; {left_out:,} pairs of very large comparisons are left out" if left_out else "")


def first_section(card: dict[str, Any]) -> str:
    """Accuracy beside what can be had without the model, and beside how well anybody could do."""
    base, overall = card["baselines"], card["accuracy"]["overall"]
    adds = base["adds"]
    rows = [
        _row("**this model**", overall, None, "share of pairs whose preferred response has the higher score"),
        ["chance", "50.0%", "", "", _added(adds["chance"]), "a coin"],
        _row("longer is better", base["longer_is_better"], adds["longer_is_better"], "in words"),
        _row(
            "bag of words", base["bag_of_words"], adds.get("bag_of_words"),
            _bag_reading(card.get("bag_of_words")),
        ),
        *_probe_rows(card.get("probe") or {}),
        _row("**on pairs of like length**", base["like_length"], None, "lengths within 10% in words"),
    ]  # fmt: skip
    if base["like_length_bag_of_words"] is not None:
        added = adds["like_length_bag_of_words"]
        rows.append(_row("bag of words on those", base["like_length_bag_of_words"], added, ""))
    ceiling = card.get("ceiling") or {}
    rows += [
        _row(title, ceiling.get(key), None, reading)
        for key, (title, reading) in _CEILINGS.items()
        if key != "noise" or ceiling.get(key)
    ]
    return section(
        "What a reader needs first",
        f"Accuracy on {overall['pairs']:,} pairs, {_clusters(card)}; {dependence(card)}. The differences are "
        "in percentage points, this model minus the row, over the same pairs (paired).\n",
        table(["", "accuracy", "95% interval", "pairs", "the model adds", "how to read it"], rows),
    )


def _clusters(card: dict[str, Any]) -> str:
    number_of, unit = card["clusters"], card["unit"]
    return f"{number_of:,} {unit if number_of != 1 else unit.replace('sets', 'set').removesuffix('s')}"


def _row(title: str, figure: Figure | None, added: Figure | None, reading: str) -> list[str]:
    if figure is None:
        return [title, "not known", "", "", "", reading]
    pairs = f"{figure['pairs']:,}" if "pairs" in figure else ""
    return [title, *share(figure), pairs, _added(added), reading]


def _added(figure: Figure | None) -> str:
    return "" if figure is None else points(figure).removesuffix(" points")


def _bag_reading(bag: dict[str, Any] | None) -> str:
    if not bag:
        return "the training comparisons are not known"
    return f"linear in {bag['words']:,} words, fitted on {bag['pairs']:,} training pairs"


def _probe_rows(probe: dict[str, Any]) -> list[list[str]]:
    """The probes of the reward stage."""
    reading = "linear on the base's frozen states, {}"
    rows = [
        _row(
            "linear probe", probe.get("last"), probe.get("adds_last"),
            reading.format("last layer at the end") if probe.get("last") else _NO_PROBE,
        )
    ]  # fmt: skip
    if best := probe.get("best"):
        where = f"layer {best['layer']}, {best['pooling']}, chosen on the training part"
        rows.append(_row("best probe", best, probe.get("adds_best"), reading.format(where)))
    return rows


_NO_PROBE = "of this run's own model on its own held-out comparisons, with reward.probe"


def variance_section(variance: dict[str, Any]) -> str:
    """Within a prompt against between prompts."""
    rows = [
        ["within a prompt", *value(variance["within"], ".3f"), "what a policy gradient sees"],
        ["between prompts", *value(variance["between"], ".3f"), "moves no policy"],
        ["share within", *value(variance["share"], ".3f"), "within / (within + between)"],
    ]
    return section(
        "Variance of the score",
        "However accurate a reward, a policy learns slowly where it hardly varies within a prompt (Razin "
        "2025, arXiv 2503.15477). Their variance is over a policy's own responses, this one over the "
        f"{variance['within']['responses']:,} different responses that people compared.\n",
        table(["variance", "value", "95% interval", "how to read it"], rows),
    )


def curve_section(curve: dict[str, Any]) -> str:
    """Accuracy by the number of training comparisons."""
    rows = [
        [
            f"{x['comparisons']:,}",
            *share(x),
            f"{x['pairs']:,}",
            f"{100 * x['fitted']:.1f}%" if x["fitted"] else "",
        ]
        for x in curve["points"]
    ]
    fit = curve["fit"]
    said = (
        "One number says nothing of a slope."
        if fit is None
        else f"Straight line in log N (Bai 2022, section 3.2): {100 * fit['per_doubling']:+.1f} points with "
        f"every doubling; a guide within the numbers below, not beyond them."
    )
    return section(
        "Learning curve",
        f"{_CURVES[curve['of']]} The smaller sets are parts of the larger. {said}\n",
        table(["training comparisons", "accuracy", "95% interval", "pairs", "on the line"], rows),
    )


def suite_sections(suites: dict[str, Any]) -> list[str]:
    """A section for each benchmark."""
    return [_suite(_SUITES[name], name, suites[name]) for name in suites]


def _suite(title: str, name: str, suite: dict[str, Any]) -> str:
    if name == "rmbench":
        return _rm_bench(title, suite)
    rows = [[cell(g["group"]), *share(g), f"{g['pairs']:,}"] for g in suite["subsets"]]
    head = ["subset", "right", "95% interval", "items"]
    read = "An item is right where the chosen response's score is above all others"
    if name == "rewardbench2":
        read += "; chance is 25% with four responses"
    parts = [f"{read}.\n", table(head, rows)] if rows else []
    if sections := suite.get("sections"):
        parts.append("Sections, in the benchmark's own weights of the subsets:\n")
        cells = [[s["group"], *share(s), ", ".join(s["missing"]) or "none"] for s in sections]
        parts.append(table(["section", "score", "95% interval", "subsets that are missing"], cells))
    if (ties := suite.get("ties")) and ties["score"] is None:
        parts.append("Ties: unknown until prompts with many right answers and with one are there.\n")
    elif ties:
        parts.append(
            f"Ties: score {ties['score']:.3f} = 0.3 x {ties['tied']:.3f} (all right answers above all wrong "
            f"ones) + 0.3 x {ties['ref']:.3f} (the same with one right answer) "
            f"+ 0.2 x {ties['preferred']:.3f} + 0.2 x {ties['preferred_hard']:.3f} (right and wrong further "
            f"apart than the right ones) + 0.01 x {ties['margin']:.3f}, over {ties['prompts']:,} prompts.\n"
        )
    overall = suite["overall"]
    missing = "subsets, ties of both kinds among them," if name == "rewardbench2" else "sections"
    told = f"unknown until all {missing} are there" if overall is None else percent(overall)
    means = {"rewardbench": "mean of the sections", "rewardbench2": "mean of the subsets"}
    parts.append(f"Overall ({means.get(name, 'all items')}): {told}.\n")
    return section(title, *parts)


def _rm_bench(title: str, suite: dict[str, Any]) -> str:
    levels = ("easy", "normal", "hard", "mean")
    rows = [
        [cell(s["group"]), *(plain(_hundred(s[level]), ".1f") for level in levels), f"{s['pairs']:,}"]
        for s in _distinct(suite)
    ]
    if overall := suite["overall"]:
        rows.append(["**all**", *(plain(_hundred(overall[level]), ".1f") for level in levels), ""])
    parts = [
        "Per cent right. Hard: the chosen response is plainer than the rejected one; easy: it is the more "
        "elaborate one; normal: both have one style. All: the domains that are there weigh alike, the two of "
        "safety as one.\n",
        table(["subset", *levels, "pairs"], rows),
    ]
    for s in _distinct(suite):
        cells = [
            [style, *(number(None if x is None else 100 * x, ".1f") for x in row)]
            for style, row in zip(_STYLES, s["matrix"], strict=True)
        ]
        heads = [f"rejected: {style}" for style in _STYLES]
        parts += [f"{cell(s['group'])}, chosen response by row:\n", table(["chosen", *heads], cells)]
    return section(title, *parts)


def _distinct(suite: dict[str, Any]) -> list[dict[str, Any]]:
    """Subsets and domains, one row each where both have a name."""
    names = {d["group"] for d in suite["domains"]}
    return [*(s for s in suite["subsets"] if s["group"] not in names), *suite["domains"]]


def _hundred(figure: Figure) -> Figure:
    mean, ends = figure["mean"], figure["ci95"]
    return {
        "mean": None if mean is None else 100 * mean,
        "ci95": None if ends is None else [100 * end for end in ends],
    }
