"""The figures of the card against loops over the comparisons, and the page that tells them."""

import json
import math

import numpy as np
import pytest

from reward.card.figures import Scored, figures, words
from reward.card.report import as_markdown, opening, verdict
from rlhf.data.comparisons import Comparison, Message

RNG = np.random.default_rng


def comparison(prompt, responses, ranks, source="s", confidence=None):
    return Comparison((Message("user", prompt),), tuple(responses), tuple(ranks), source, confidence)


def text(number):
    return " ".join(["word"] * int(number))


def many(n=40, seed=0):
    """Comparisons of 2 to 4 responses, with ties, several a prompt, from two sources, with confidences."""
    rng = RNG(seed)
    found = []
    for i in range(n):
        k = int(rng.integers(2, 5))
        ranks = rng.integers(0, 3, k)
        ranks[0] = 1 - min(ranks[1], 1)  # never all the same
        confidence = None if i % 5 == 0 else float(rng.random())
        responses = [f"{text(rng.integers(1, 60))} {i} {j}" for j in range(k)]
        found.append(comparison(f"prompt {i // 2}", responses, ranks.tolist(), "ab"[i % 3 == 0], confidence))
    return found


def scores_for(comparisons, seed=1, skill=1.0):
    """Scores that follow the labels, with noise."""
    ranks = np.array([r for c in comparisons for r in c.ranks], dtype=float)
    return -skill * ranks + RNG(seed).normal(size=ranks.size)


def looked_at(comparisons, scores, keep=lambda c, a, b: True):
    """[right, pairs] by a plain loop over pairs that ``keep`` accepts: comparison, better and worse index."""
    right = pairs = first = 0
    for c in comparisons:
        for a, rank in enumerate(c.ranks):
            for b, other in enumerate(c.ranks):
                if rank < other and keep(c, a, b):
                    gap = scores[first + a] - scores[first + b]
                    right += (gap > 0) + 0.5 * (gap == 0)
                    pairs += 1
        first += len(c.responses)
    return [right / pairs if pairs else None, pairs]


def found(comparisons, scores, **options):
    scores = np.asarray(scores, dtype=float)
    more = {"cut_R": np.zeros(scores.size, bool)} | options.pop("scored", {})
    return figures(Scored(comparisons, scores, **more), **{"bins": 5, "near_tie": 0.5, **options})


def told(figure):
    return [figure["mean"] if figure["mean"] is None else pytest.approx(figure["mean"]), figure["pairs"]]


def card(comparisons, scores, **options):
    """A whole card, as the stage writes it."""
    model = {"path": "runs/x/reward|model", "gain": 2.0, "files": {"reward_model.json": "a" * 64}}
    return {
        "name": "x",
        "seed": 3,
        "model": model,
        "against_model": {"path": "other", "files": {}},
        "data": {"files": {"f.jsonl": "b" * 64}, "seen": "Nobody knows", "reading": "read 9", "counts": {}},
        "versions": {"python": "3.11", "torch": "2"},
        **found(comparisons, scores, **options),
    }


# --- accuracy --------------------------------------------------------------------------------------------


def test_accuracy_is_that_of_a_loop_in_every_group():
    cs = many()
    scores = scores_for(cs)
    scores[:5] = 0.0  # some equal ones
    accuracy = found(cs, scores)["accuracy"]
    assert looked_at(cs, scores) == told(accuracy["overall"])
    assert accuracy["overall"]["n"] == 20  # prompts, not comparisons
    assert accuracy["equal_scores"] > 0
    for group in accuracy["by_source"]:
        assert looked_at(cs, scores, lambda c, a, b, g=group: c.source == g["group"]) == told(group)
    assert [g["group"] for g in accuracy["by_k"]] == ["2", "3", "4"]
    for group in accuracy["by_k"]:
        assert looked_at(cs, scores, lambda c, a, b, g=group: len(c.ranks) == int(g["group"])) == told(group)


def test_accuracy_by_length_is_that_of_a_loop():
    cs = many(seed=2)
    scores = scores_for(cs)

    def kind(c, a, b):
        x, y = (len(c.responses[i].split()) for i in (a, b))
        return "about equal" if abs(x - y) <= 0.1 * max(x, y) else "longer" if x > y else "shorter"

    groups = found(cs, scores)["accuracy"]["by_better_length"]
    assert [g["group"] for g in groups] == ["longer", "about equal", "shorter"]
    for group in groups:
        assert looked_at(cs, scores, lambda c, a, b, g=group: kind(c, a, b) == g["group"]) == told(group)


def test_rare_sources_are_put_together():
    names = ["often"] * 3 + [f"rare {i:02d}" for i in range(25)]
    cs = [comparison(str(i), ["a", "b"], [0, 1], source=name) for i, name in enumerate(names)]
    groups = found(cs, np.tile([1.0, 0.0], 28))["accuracy"]["by_source"]
    assert len(groups) == 20
    assert (groups[0]["group"], groups[0]["pairs"]) == ("often", 3)
    assert (groups[-1]["group"], groups[-1]["pairs"]) == ("7 other sources", 7)


def test_words_stand_between_white_space():
    assert words("Two  words,\nthree") == 3
    assert words("") == 0


# --- the other figures -----------------------------------------------------------------------------------


def test_the_slope_before_normalization_is_that_of_the_scores_as_trained():
    cs = many()
    scores = scores_for(cs)
    normalized = found(cs, scores, scored={"normalized": True, "gain": 2.5})["calibration"]
    trained = found(cs, scores / 2.5)["calibration"]
    before = normalized["slope_before_normalisation"]
    assert before["mean"] == pytest.approx(trained["slope"]["mean"])
    assert before["ci95"] == pytest.approx(trained["slope"]["ci95"])
    assert "slope_before_normalisation" not in trained


def test_losses_and_bins_cover_all_pairs():
    cs = many()
    calibration = found(cs, scores_for(cs), bins=4)["calibration"]
    pairs = looked_at(cs, scores_for(cs))[1]
    assert len(calibration["bins"]) == 4
    assert sum(b["pairs"] for b in calibration["bins"]) == pairs
    assert all(calibration[k]["pairs"] == pairs for k in ("slope", "ece", "log_loss", "brier"))
    silent = found(cs, np.zeros_like(scores_for(cs)))["calibration"]
    assert silent["log_loss"]["mean"] == pytest.approx(math.log(2))
    assert silent["brier"]["mean"] == pytest.approx(0.25)
    assert silent["slope"]["mean"] is None


def test_a_model_that_counts_words_is_seen_through():
    cs = many()
    lengths = np.array([len(r.split()) for c in cs for r in c.responses], dtype=float)
    length = found(cs, 0.01 * lengths + 5)["length"]
    assert length["spearman"]["mean"] == pytest.approx(1.0)
    assert length["within_comparisons"]["mean"] == pytest.approx(1.0)
    assert length["effect_per_100_words"] == pytest.approx(1.0)
    assert length["model_minus_rule"]["mean"] == 0.0
    assert length["longer_is_better"]["mean"] == pytest.approx(looked_at(cs, lengths)[0])


def test_without_length_the_labels_shine_through():
    cs = many(seed=4)
    lengths = np.array([len(r.split()) for c in cs for r in c.responses], dtype=float)
    honest = scores_for(cs, skill=3.0)
    length = found(cs, honest + 10 * lengths)["length"]
    assert found(cs, honest + 10 * lengths)["accuracy"]["overall"]["mean"] < 0.7
    assert length["accuracy_without_length"]["mean"] > 0.85


@pytest.mark.parametrize("normalized", [True, False])
def test_near_ties_are_in_units_of_a_normalized_score(normalized):
    cs = many()
    scores = 10 * scores_for(cs)
    near = found(cs, scores, scored={"normalized": normalized})["near_ties"]
    threshold = 0.5 if normalized else 0.5 * scores.std(ddof=1)
    assert near["threshold"] == pytest.approx(threshold)
    first = {id(c): n for c, n in zip(cs, np.cumsum([0, *[len(c.ranks) for c in cs]]), strict=False)}

    def is_near(c, a, b):
        return abs(scores[first[id(c)] + a] - scores[first[id(c)] + b]) < threshold

    assert looked_at(cs, scores, is_near) == told(near["accuracy"])
    assert looked_at(cs, scores, lambda *x: not is_near(*x)) == told(near["accuracy_of_others"])
    assert near["share"]["mean"] == pytest.approx(near["accuracy"]["pairs"] / near["share"]["pairs"])


def test_scores_are_described_with_the_mean_taken_out():
    cs = many()
    scores = scores_for(cs) + 50
    cut = np.zeros(scores.size, dtype=bool)
    cut[: scores.size // 4] = True
    got = found(cs, scores, scored={"cut_R": cut})["scores"]
    assert got["mean"]["mean"] == pytest.approx(scores.mean())
    assert got["sd"]["mean"] == pytest.approx(scores.std(ddof=1))
    assert got["quantiles_of_centred"]["0.5"] == pytest.approx(np.median(scores) - scores.mean())
    assert got["quantiles_of_centred"]["0.99"] < 10
    assert got["cut"]["mean"] == pytest.approx(cut.mean())


def test_a_second_model_is_compared_on_the_same_pairs():
    cs = many(seed=5)
    mine, other = scores_for(cs, 1, 2.0), scores_for(cs, 2, 0.5)
    got = found(cs, mine, against_R=other)["against"]
    assert [got["accuracy"]["mean"], got["accuracy"]["pairs"]] == looked_at(cs, mine)
    assert got["other_accuracy"]["mean"] == pytest.approx(looked_at(cs, other)[0])
    assert got["difference"]["mean"] == pytest.approx(looked_at(cs, mine)[0] - looked_at(cs, other)[0])
    assert got["correlation"]["mean"] == pytest.approx(np.corrcoef(mine, other)[0, 1])
    shifted = found(cs, mine, against_R=other + 9)["against"]
    assert shifted["difference"] == got["difference"]
    assert shifted["correlation"]["ci95"] == pytest.approx(got["correlation"]["ci95"])
    assert found(cs, mine)["against"] is None


def test_two_models_are_compared_pair_by_pair():
    cs = [comparison(str(i), ["a", "b"], [0, 1]) for i in range(6)]
    mine, other = (
        np.ravel([[gap, 0.0] for gap in gaps]) for gaps in ([2, 1, -1, 3, 0, 0], [1, -1, 1, 2, -1, 1])
    )
    got = found(cs, mine, against_R=other)["against"]
    assert [got[k]["mean"] for k in ("accuracy", "other_accuracy", "difference", "agreement")] == (
        pytest.approx([4 / 6, 4 / 6, 0, 3 / 6])
    )
    assert (got["only_first"], got["only_second"], got["p_value"]) == (1, 1, 1.0)


# --- the page --------------------------------------------------------------------------------------------


def check_page(made):
    """Every table is whole, nothing is NaN, and the JSON is strict."""
    json.dumps(made, allow_nan=False)
    page = as_markdown(made)
    assert "0.5 of the normalized score)" in page or "of the standard deviation)" in page
    assert "normalised score" not in page
    assert "nan" not in page.lower().split()
    widths = [line.replace("\\|", "").count("|") for line in page.splitlines() if line.startswith("|")]
    tables = [
        [line.replace("\\|", "").count("|") for line in block.splitlines()]
        for block in page.split("\n\n")
        if block.startswith("|")
    ]
    assert widths
    assert all(len(set(table)) == 1 for table in tables)
    return page


def test_the_page_says_the_figures():
    cs = many(60)
    scores = scores_for(cs)
    made = card(cs, scores, against_R=scores_for(cs, 9), scored={"normalized": True, "gain": 2.0})
    page = check_page(made)
    overall = made["accuracy"]["overall"]
    low, high = (100 * x for x in overall["ci95"])
    assert (
        f"Accuracy {100 * overall['mean']:.1f}% [{low:.1f}, {high:.1f}] on {overall['pairs']:,} pairs" in page
    )
    assert "(30 prompts), better than chance, which is 50%." in page
    assert "Nobody knows." in page
    assert "runs/x/reward\\|model" in page
    assert "## Against other" in page
    assert "slope as trained" in page
    assert "aaaaaaaaaaaaaaaa)" in page
    assert "## Out of distribution" not in page
    for b in made["calibration"]["bins"]:
        assert (
            f"| {b['low']:.2f} to {b['high']:.2f} | {b['mean_gap']:.2f} | {100 * b['predicted']:.1f}% |"
            in page
        )


def test_figures_out_of_distribution_get_a_section_of_their_own():
    made = card(many(), scores_for(many()))
    figure = {"mean": 0.8512, "ci95": [0.8, 0.9], "n": 40}
    made["out_of_distribution"] = {"inside": 20, "shrinkage": 0.25, "simplified_mahalanobis": figure}
    page = check_page(made)
    assert "| simplified mahalanobis | 0.851 | [0.800, 0.900] |" in page
    assert "| inside | 20 |  |" in page
    assert "| shrinkage | 0.250 |  |" in page


@pytest.mark.parametrize("scores", [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
def test_one_comparison_makes_a_page(scores):
    page = check_page(card([comparison("p", ["a", "b"], [0, 1])], scores, against_R=np.array([1.0, 0.0])))
    assert "unknown, because the scores" in page or "unknown from one prompt" in page


def test_a_constant_model_makes_a_page():
    cs = many()
    page = check_page(card(cs, np.full(len(scores_for(cs)), 3.0)))
    assert "Accuracy 50.0%" in page
    assert "not distinguishable from chance" in page


@pytest.mark.parametrize(
    ("ci95", "word"),
    [
        ([0.2, 0.6], "over-confident"),
        ([1.2, 1.6], "under-confident"),
        ([0.8, 1.2], "calibrated as far as 100 pairs"),
        ([-0.1, 0.3], "does not say how sure"),
        ([-0.5, -0.1], "turned round"),
        ([-0.5, 1.4], "does not say how sure"),
    ],
)
def test_the_verdict_on_calibration_follows_the_interval_of_the_slope(ci95, word):
    said = verdict({"slope": {"mean": sum(ci95) / 2, "ci95": ci95, "n": 50, "pairs": 100}})
    assert word in said
    assert f"[{ci95[0]:.2f}, {ci95[1]:.2f}]" in said


def test_the_opening_tells_bad_models_from_good_ones():
    cs = many(60)
    scores = scores_for(cs, skill=2.0)
    assert "worse than chance" in opening(card(cs, -scores))
    good = opening(card(cs, scores, against_R=-scores))
    assert "better than chance" in good
    assert "Against other: this model is better (by +" in good
    assert "the model is better than that rule" in good
    assert "Against other: this model is worse (by -" in opening(card(cs, -scores, against_R=scores))
