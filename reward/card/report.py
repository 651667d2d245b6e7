"""The reward-model card as a page that reads without help."""

from __future__ import annotations

from typing import Any

from reward.card.first_page import (
    curve_section,
    dependence,
    first_section,
    section,
    suite_sections,
    variance_section,
)
from rlhf.markdown import Figure, cell, number, percent, plain, points, share, table, value

_HASH = 16  # hexadecimal digits of a file's hash on the page
_GROUPS = (  # key of the accuracy, title, how to read it
    ("by_source", "source", "By source of the comparison."),
    ("by_k", "responses", "By the number of responses that were ranked together."),
    (
        "by_better_length",
        "better response is",
        "By the length of the preferred response against the other one (about equal: within 10% in words). A "
        "model that follows length is good in the first row and bad in the last.",
    ),
)
_READ = ["figure", "value", "95% interval", "how to read it"]
_FIGURES = {  # of each section: key, title, how to read it
    "calibration": {
        "slope": (
            "slope",
            "of the log-odds of being right on the gap; 1 = calibrated, below 1 = over-confident",
        ),
        "slope_before_normalisation": (
            "slope as trained",
            "before the trained scores were multiplied by {gain}",
        ),
        "ece": ("calibration error", "mean distance from the prediction; about {by_chance} by chance alone"),
        "log_loss": ("log-loss", "nats a pair; 0.693 (log 2) = says nothing"),
        "brier": ("Brier score", "squared error; 0.250 = says nothing"),
    },
    "length": {
        "spearman": ("score and length", "Spearman correlation over all responses, length in words"),
        "within_comparisons": ("within comparisons", "Pearson correlation, both centered in each comparison"),
        "longer_is_better": ("longer is better", "accuracy of that rule"),
        "model_minus_rule": ("model minus rule", "difference of the two accuracies, paired"),
        "accuracy_without_length": (
            "without length",
            "accuracy without the linear effect of length ({effect})",
        ),
    },
    "against": {
        "accuracy": ("accuracy of this model", ""),
        "other_accuracy": ("accuracy of the other", ""),
        "difference": ("difference", "this minus the other, paired"),
        "agreement": ("agreement", "pairs that both put in the same order"),
        "correlation": ("correlation of scores", "over all responses, means taken out"),
        "correlation_within": ("within comparisons", "after centering in each comparison"),
    },
}
_SHARES = {
    "longer_is_better",
    "accuracy_without_length",
    "accuracy",
    "other_accuracy",
    "agreement",
}  # in per cent


def as_markdown(card: dict[str, Any]) -> str:
    """The page.

    Args:
        card: as written to ``card.json``.
    """
    sections = [
        f"# Reward-model card: {cell(card['model']['path'])}\n\n{opening(card)}\n",
        first_section(card),
        _accuracy(card),
        _calibration(card),
        _length(card),
        _near_ties(card),
        _scores(card),
        variance_section(card["variance"]),
        *suite_sections(card.get("suites", {})),
    ]
    if card.get("curve"):
        sections.append(curve_section(card["curve"]))
    if card.get("against"):
        sections.append(_against(card))
    if card.get("out_of_distribution"):
        sections.append(_out_of_distribution(card["out_of_distribution"]))
    sections.append(_making(card))
    return "\n".join(sections)


def opening(card: dict[str, Any]) -> str:
    """What the figures say, in words: one paragraph."""
    overall, length, near = card["accuracy"]["overall"], card["length"], card["near_ties"]
    rule = length["model_minus_rule"]
    on_ties = (
        ""
        if near["accuracy"]["mean"] is None
        else (f", on which it is right {percent(near['accuracy'])} of the time")
    )
    said = [
        f"Accuracy {percent(overall)} on {overall['pairs']:,} pairs ({_count(card['prompts'], 'prompt')}), "
        + _side(
            overall, 0.5, "worse than chance", "not distinguishable from chance", "better than chance",
            unknown="too few prompts to distinguish from chance",
        )
        + ", which is 50%.",
        f"{card['data']['seen']}.",
        f"Confidence: {verdict(card['calibration'])}.",
        f"Length: preferring the longer response is {percent(length['longer_is_better'])} accurate, and the "
        + _side(rule, 0, "model is worse than", "model is not distinguishable from", "model is better than")
        + f" that rule (by {points(rule)}); without the effect of length on its scores its accuracy is "
        f"{percent(length['accuracy_without_length'])}.",
        f"Of all pairs {percent(near['share'])} are near-ties, with scores less than "
        f"{near['threshold']:.2f} apart{on_ties}.",
    ]  # fmt: skip
    if against := card.get("against"):
        difference = against["difference"]
        words = ("this model is worse", "the two are not distinguishable in accuracy", "this model is better")
        said.append(
            f"Against {cell(card['against_model']['path'])}: {_side(difference, 0, *words)} (by "
            f"{points(difference)}); they agree on {percent(against['agreement'])}."
        )
    return " ".join(said)


def _side(figure: Figure, of: float, below: str, neither: str, above: str, unknown: str | None = None) -> str:
    """The words for an interval that lies below a number, around it, or above it."""
    ends = figure["ci95"]
    if ends is None:
        return unknown or neither
    return below if ends[1] < of else above if ends[0] > of else neither


def verdict(calibration: dict[str, Any]) -> str:
    """Whether the score gaps are to be believed, in words."""
    slope = calibration["slope"]
    if slope["mean"] is None:
        return "unknown, because the scores order all pairs alike (all right, all wrong or all equal)"
    if slope["ci95"] is None:
        return "unknown from one prompt"
    word = _side(
        slope,
        0,
        "turned round, larger gaps are more often wrong",
        "the size of a score gap does not say how sure to be",
        _side(
            slope,
            1,
            "over-confident, gaps promise more than they keep",
            f"calibrated as far as {slope['pairs']:,} pairs can tell",
            "under-confident, gaps keep more than they promise",
        ),
    )
    return f"{word} (slope {plain(slope, '.2f')}, 1 is calibrated)"


def _figures(card: dict[str, Any], section: str, **facts: str) -> str:
    """The table of a section's figures; ``facts`` go into the sentences."""
    figures = card[section]
    rows = [
        [
            title,
            *(share(figures[key]) if key in _SHARES else value(figures[key], ".3f")),
            reading.format(**facts),
        ]
        for key, (title, reading) in _FIGURES[section].items()
        if key in figures
    ]
    return table(_READ, rows)


def _counted_head(card: dict[str, Any]) -> list[str]:
    return ["accuracy", "95% interval", "pairs", card["unit"]]


def _accuracy(card: dict[str, Any]) -> str:
    accuracy, head = card["accuracy"], _counted_head(card)
    parts = [
        "A pair is right where the preferred response has the higher score; equal scores count 1/2 (here "
        f"{accuracy['equal_scores']:,} pairs). Intervals are 95%; {dependence(card)}.\n",
        table(["", *head], [["all", *_counted(accuracy["overall"])]]),
    ]
    for key, title, reading in _GROUPS:
        if len(groups := accuracy[key]) > 1:
            rows = [[g["group"], *_counted(g)] for g in groups]
            parts += [f"{reading}\n", table([title, *head], rows)]
    return section("Accuracy", *parts)


def _calibration(card: dict[str, Any]) -> str:
    c = card["calibration"]
    bins = [
        [
            f"{b['low']:.2f} to {b['high']:.2f}",
            f"{b['mean_gap']:.2f}",
            f"{100 * b['predicted']:.1f}%",
            *_counted(b),
        ]
        for b in c["bins"]
    ]
    return section(
        "Calibration",
        "A gap of Δ between two scores says that the higher one is right with probability 1/(1+exp(-Δ)) (Bai "
        "2022). Pairs in bins of equal number: where the accuracy is below the prediction the model is "
        "over-confident. Scores times the slope are calibrated.\n",
        table(["score gap", "mean", "predicted", *_counted_head(card)], bins),
        _figures(
            card,
            "calibration",
            gain=number(card["model"].get("gain"), ".3f"),
            by_chance=number(c["ece"]["by_chance"], ".3f"),
        ),
    )


def _length(card: dict[str, Any]) -> str:
    effect = number(card["length"]["effect_per_100_words"], ".3f")
    return section(
        "Length",
        "A reward model that pays for length teaches a policy to ramble.\n",
        _figures(card, "length", effect=f"{effect} a 100 words, within comparisons"),
    )


def _near_ties(card: dict[str, Any]) -> str:
    near = card["near_ties"]
    titles = {
        "share of pairs": "share",
        "accuracy on near-ties": "accuracy",
        "accuracy on the others": "accuracy_of_others",
    }
    return section(
        "Near-ties",
        f"Pairs whose scores differ by less than {near['threshold']:.3f} ({near['near_tie']:g} of the "
        f"{near['of'].replace('normalised score', 'normalized score')}): the model has no opinion, and "
        "its accuracy there should be near 50%.\n",
        table(
            ["figure", "value", *_counted_head(card)[1:]],
            [[title, *_counted(near[key])] for title, key in titles.items()],
        ),
    )


def _scores(card: dict[str, Any]) -> str:
    scores = card["scores"]
    quantiles = scores["quantiles_of_centred"]
    return section(
        "Scores",
        f"{card['responses']:,} responses, mean {plain(scores['mean'], '.3f')}, standard deviation "
        f"{plain(scores['sd'], '.3f')}. Quantiles with the mean taken out, because scores of two models can "
        "be compared only so:\n",
        table([f"{100 * float(q):g}%" for q in quantiles], [[f"{v:.3f}" for v in quantiles.values()]]),
        "Longer than what the model reads, so that it saw only a part of the text: "
        f"{percent(scores['cut'])} of the responses.\n",
    )


def _against(card: dict[str, Any]) -> str:
    a = card["against"]
    return section(
        f"Against {cell(card['against_model']['path'])}",
        "Both models scored the same responses.\n",
        _figures(card, "against"),
        f"Only this model is right on {_count(a['only_first'], 'pair')}, only the other on "
        f"{a['only_second']:,}: McNemar's exact p = {a['p_value']:.3g}. The test takes pairs as "
        "independent; with several pairs a prompt trust the interval of the difference instead.\n",
    )


def _out_of_distribution(found: dict[str, Any]) -> str:
    """Figures by name: {mean, ci95, n}, numbers or words, in their order."""
    rows = []
    for name, x in found.items():
        cells = (number(x, ".3f") if isinstance(x, float) else str(x), "")
        rows.append([name.replace("_", " "), *(value(x, ".3f") if isinstance(x, dict) else cells)])
    return section(
        "Out of distribution",
        "How well the model's activations tell prompts that are unlike its own from those that are: "
        "areas under the ROC curve, 0.5 = not at all, 1 = without a mistake (Bai 2022, section 5.4).\n",
        table(_READ[:3], rows),
    )


def _making(card: dict[str, Any]) -> str:
    data = card["data"]
    rows = [
        [title, "; ".join([*_facts(card[key]), _hashes(card[key]["files"])])]
        for title, key in (("model", "model"), ("against", "against_model"))
        if card.get(key)
    ]
    rows += [
        ["comparisons", f"{_count(card['comparisons'], 'comparison')}; {data['reading']}"],
        ["files", _hashes(data["files"])],
        ["drawn with seed", str(card["seed"])],
        ["versions", ", ".join(f"{k} {v}" for k, v in card["versions"].items())],
    ]
    return section("How this page was made", table(["", ""], rows))


def _facts(model: dict[str, Any]) -> list[str]:
    return [f"{k}: {v}" for k, v in model.items() if k != "files" and v is not None]


def _hashes(files: dict[str, str]) -> str:
    return ", ".join(f"{k} ({v[:_HASH]})" for k, v in files.items())


def _counted(figure: Figure) -> list[str]:
    """Accuracy, interval, pairs, prompts."""
    return [*share(figure), f"{figure['pairs']:,}", f"{figure['n']:,}"]


def _count(items: int, noun: str) -> str:
    return f"{items:,} {noun}{'' if items == 1 else 's'}"
