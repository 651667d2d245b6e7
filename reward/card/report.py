"""The reward-model card as a page that reads without help."""

from __future__ import annotations

from typing import Any

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


def as_markdown(card: dict[str, Any]) -> str:
    """The page.

    Args:
        card: as written to ``card.json``.
    """
    sections = [
        f"# Reward-model card: {cell(card['model']['path'])}\n\n{opening(card)}\n",
        _accuracy(card),
        _calibration(card),
        _length(card["length"]),
        _near_ties(card["near_ties"]),
        _scores(card),
    ]
    if card.get("against"):
        sections.append(_against(card))
    if card.get("out_of_distribution"):
        sections.append(_out_of_distribution(card["out_of_distribution"]))
    sections.append(_making(card))
    return "\n".join(sections)


def opening(card: dict[str, Any]) -> str:
    """What the figures say, in words: one paragraph."""
    overall, length, near = card["accuracy"]["overall"], card["length"], card["near_ties"]
    said = [
        f"Right on {percent(overall)} of {overall['pairs']:,} pairs ({_count(card['prompts'], 'prompt')}), "
        f"{_against_chance(overall)}.",
        f"{card['data']['seen']}.",
        f"Confidence: {verdict(card['calibration'])}.",
        f"Length: {_length_in_words(length)}.",
        f"Of all pairs {percent(near['share'])} are near-ties, with scores less than "
        f"{near['threshold']:.2f} apart{_on_near_ties(near['accuracy'])}.",
    ]
    if card.get("against"):
        said.append(f"Against {cell(card['against_model']['path'])}: {_who_is_better(card['against'])}.")
    return " ".join(said)


def _on_near_ties(accuracy: Figure) -> str:
    return "" if accuracy["mean"] is None else f", on which it is right {percent(accuracy)} of the time"


def _against_chance(overall: Figure) -> str:
    ends = overall["ci95"]
    if ends is None:
        return "too few prompts to tell from chance, which is 50%"
    if ends[0] > 0.5:
        return "better than chance, which is 50%"
    return "worse than chance, which is 50%" if ends[1] < 0.5 else "not to be told from chance, which is 50%"


def verdict(calibration: dict[str, Any]) -> str:
    """Whether the score gaps are to be believed, in words."""
    slope = calibration["slope"]
    if slope["mean"] is None:
        return "not to be told, because the scores order all pairs alike (all right, all wrong or all equal)"
    if slope["ci95"] is None:
        return "not to be told from one prompt"
    low, high = slope["ci95"]
    if low <= 0 <= high:
        word = "the size of a score gap does not say how sure to be"
    elif high < 0:
        word = "turned round, larger gaps are more often wrong"
    elif high < 1:
        word = "over-confident, gaps promise more than they keep"
    elif low > 1:
        word = "under-confident, gaps keep more than they promise"
    else:
        word = f"calibrated as far as {slope['pairs']:,} pairs can tell"
    return f"{word} (slope {plain(slope, '.2f')}, 1 is calibrated)"


def _length_in_words(length: dict[str, Any]) -> str:
    ends = length["model_minus_rule"]["ci95"]
    if ends is None or ends[0] <= 0 <= ends[1]:
        word = "the model is not to be told from that rule"
    else:
        word = "the model is better than that rule" if ends[0] > 0 else "the model is worse than that rule"
    return (
        f"preferring the longer response is right on {percent(length['longer_is_better'])}, and {word} (by "
        f"{points(length['model_minus_rule'])}); without the effect of length on its scores it is right on "
        f"{percent(length['accuracy_without_length'])}"
    )


def _who_is_better(against: dict[str, Any]) -> str:
    ends = against["difference"]["ci95"]
    if ends is None or ends[0] <= 0 <= ends[1]:
        word = "not to be told apart in accuracy"
    else:
        word = "this model is better" if ends[0] > 0 else "this model is worse"
    return f"{word} (by {points(against['difference'])}); they agree on {percent(against['agreement'])}"


def _accuracy(card: dict[str, Any]) -> str:
    accuracy = card["accuracy"]
    parts = [
        "## Accuracy\n",
        "A pair is right where the preferred response has the higher score; equal scores count 1/2 (here "
        f"{accuracy['equal_scores']:,} pairs). Intervals are 95% and take the pairs of one prompt as "
        "dependent.\n",
        table(
            ["", "accuracy", "95% interval", "pairs", "prompts"], [["all", *_counted(accuracy["overall"])]]
        ),
    ]
    for key, title, reading in _GROUPS:
        groups = accuracy[key]
        if len(groups) > 1:
            rows = [[g["group"], *_counted(g)] for g in groups]
            parts += [reading + "\n", table([title, "accuracy", "95% interval", "pairs", "prompts"], rows)]
    return "\n".join(parts)


def _calibration(card: dict[str, Any]) -> str:
    c = card["calibration"]
    rows = [
        [
            f"{b['low']:.2f} to {b['high']:.2f}",
            f"{b['mean_gap']:.2f}",
            f"{100 * b['predicted']:.1f}%",
            *_counted(b),
        ]
        for b in c["bins"]
    ]
    head = ["score gap", "mean", "predicted", "accuracy", "95% interval", "pairs", "prompts"]
    parts = [
        "## Calibration\n",
        "A gap of Δ between two scores says that the higher one is right with probability 1/(1+exp(-Δ)) (Bai "
        "2022). Pairs in bins of equal number: where the accuracy is below the prediction the model is "
        "over-confident.\n",
        table(head, rows),
        table(
            ["figure", "value", "95% interval", "how to read it"],
            [
                [
                    "slope",
                    *value(c["slope"], ".3f"),
                    "of the log-odds of being right on the gap; 1 = calibrated, below 1 = over-confident; "
                    "scores times this number are calibrated",
                ],
                *_slope_before(card),
                [
                    "calibration error",
                    *value(c["ece"], ".3f"),
                    f"mean distance from the prediction; a calibrated model would show about "
                    f"{number(c['ece']['by_chance'], '.3f')} by chance",
                ],
                ["log-loss", *value(c["log_loss"], ".3f"), "nats a pair; 0.693 (log 2) = says nothing"],
                ["Brier score", *value(c["brier"], ".3f"), "squared error; 0.250 = says nothing"],
            ],
        ),
    ]
    return "\n".join(parts)


def _slope_before(card: dict[str, Any]) -> list[list[str]]:
    figure = card["calibration"].get("slope_before_normalisation")
    if figure is None:
        return []
    gain = card["model"].get("gain")
    return [
        [
            "slope as trained",
            *value(figure, ".3f"),
            f"the same before normalisation, which multiplied the trained scores by {number(gain, '.3f')}",
        ]
    ]


def _length(length: dict[str, Any]) -> str:
    rows = [
        [
            "score and length",
            *value(length["spearman"], ".3f"),
            "Spearman correlation over all responses, length in words",
        ],
        [
            "within comparisons",
            *value(length["within_comparisons"], ".3f"),
            "Pearson correlation after both are centred in each comparison",
        ],
        ["longer is better", *share(length["longer_is_better"]), "accuracy of that rule"],
        [
            "model minus rule",
            *value(length["model_minus_rule"], ".3f"),
            "difference of the two accuracies, paired",
        ],
        [
            "without length",
            *share(length["accuracy_without_length"]),
            "accuracy when the linear effect of length within comparisons "
            f"({number(length['effect_per_100_words'], '.3f')} a 100 words) is taken out of the scores",
        ],
    ]
    return "\n".join(
        [
            "## Length\n",
            "A reward model that pays for length teaches a policy to ramble.\n",
            table(["figure", "value", "95% interval", "how to read it"], rows),
        ]
    )


def _near_ties(near: dict[str, Any]) -> str:
    rows = [
        ["share of pairs", *_counted(near["share"])],
        ["accuracy on near-ties", *_counted(near["accuracy"])],
        ["accuracy on the others", *_counted(near["accuracy_of_others"])],
    ]
    return "\n".join(
        [
            "## Near-ties\n",
            f"Pairs whose scores differ by less than {near['threshold']:.3f} ({near['near_tie']:g} of the "
            f"{near['of']}): the model has no opinion, and its accuracy there should be near 50%.\n",
            table(["figure", "value", "95% interval", "pairs", "prompts"], rows),
        ]
    )


def _scores(card: dict[str, Any]) -> str:
    scores = card["scores"]
    quantiles = scores["quantiles_of_centred"]
    cut = scores["cut"]
    lines = [
        "## Scores\n",
        f"{card['responses']:,} responses, mean {plain(scores['mean'], '.3f')}, standard deviation "
        f"{plain(scores['sd'], '.3f')}. Quantiles with the mean taken out, because scores of two models can "
        "be compared only so:\n",
        table([f"{100 * float(q):g}%" for q in quantiles], [[f"{v:.3f}" for v in quantiles.values()]]),
    ]
    if cut is None:
        lines.append("How many texts were too long for the model and cut is not known.\n")
    else:
        lines.append(
            "Longer than what the model reads, so that it saw only a part of the text: "
            f"{percent(cut)} of the responses.\n"
        )
    return "\n".join(lines)


def _against(card: dict[str, Any]) -> str:
    a = card["against"]
    rows = [
        ["accuracy of this model", *share(a["accuracy"]), ""],
        ["accuracy of the other", *share(a["other_accuracy"]), ""],
        ["difference", *value(a["difference"], ".3f"), "this minus the other, paired"],
        ["agreement", *share(a["agreement"]), "pairs that both put in the same order"],
        ["correlation of scores", *value(a["correlation"], ".3f"), "over all responses, means taken out"],
        ["within comparisons", *value(a["correlation_within"], ".3f"), "after centring in each comparison"],
    ]
    return "\n".join(
        [
            f"## Against {cell(card['against_model']['path'])}\n",
            "Both models scored the same responses.\n",
            table(["figure", "value", "95% interval", "how to read it"], rows),
            f"Only this model is right on {_count(a['only_first'], 'pair')}, only the other on "
            f"{a['only_second']:,}: McNemar's exact p = {a['p_value']:.3g}. The test takes pairs as "
            "independent; with several pairs a prompt trust the interval of the difference instead.\n",
        ]
    )


def _out_of_distribution(found: dict[str, Any]) -> str:
    """Figures by name: {mean, ci95, n}, numbers or words, in their order."""
    rows = []
    for name, x in found.items():
        if isinstance(x, dict):
            rows.append([name.replace("_", " "), *value(x, ".3f")])
        else:
            rows.append([name.replace("_", " "), number(x, ".3f") if isinstance(x, float) else str(x), ""])
    return "\n".join(
        [
            "## Out of distribution\n",
            "How well the model's activations tell prompts that are unlike its own from those that are: "
            "areas under the ROC curve, 0.5 = not at all, 1 = without a mistake (Bai 2022, section 5.4).\n",
            table(["figure", "value", "95% interval"], rows),
        ]
    )


def _making(card: dict[str, Any]) -> str:
    rows = [["model", *_facts(card["model"])]]
    if card.get("against_model"):
        rows.append(["against", *_facts(card["against_model"])])
    data = card["data"]
    rows.append(["comparisons", f"{_count(card['comparisons'], 'comparison')}; {data['reading']}"])
    rows.append(["files", _hashes(data["files"])])
    rows.append(["drawn with seed", str(card["seed"])])
    rows.append(["versions", ", ".join(f"{k} {v}" for k, v in card["versions"].items())])
    return "\n".join(["## How this page was made\n", table(["", ""], rows)])


def _facts(model: dict[str, Any]) -> list[str]:
    facts = [f"{k}: {v}" for k, v in model.items() if k != "files" and v is not None]
    return ["; ".join([*facts, _hashes(model["files"])])]


def _hashes(files: dict[str, str]) -> str:
    return ", ".join(f"{k} ({v[:_HASH]})" for k, v in files.items())


def _counted(figure: Figure) -> list[str]:
    """Accuracy, interval, pairs, prompts."""
    return [*share(figure), f"{figure['pairs']:,}", f"{figure['n']:,}"]


def _count(items: int, noun: str) -> str:
    return f"{items:,} {noun}{'' if items == 1 else 's'}"
