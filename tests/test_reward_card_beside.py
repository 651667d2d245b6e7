"""What the card stage reads of the run and the files beside the model: words, probe, ceilings, curve."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import stage, tiny_recipe
from test_reward_card_stage import FOLDER, RECIPE, judge, read_card, refusal, some
from tiny_classifiers import llama

from reward.card import __main__ as evaluate
from reward.card import beside, curve, scorers
from reward.card.baselines import fit_bag_of_words
from reward.card.figures import Scored, figures
from rlhf.data.comparisons import Comparison, Counts, Message, prompt_key, write_native
from rlhf.data.readers import read_comparisons
from rlhf.data.readers.native import read_native
from rlhf.recipe.load import load
from rlhf.runs.artifacts import read_jsonl


@pytest.fixture
def desk(inside):
    """A folder with a recipe, comparisons and a classifier, and no run."""
    Path("r.yaml").write_text(RECIPE)
    write_native("data.jsonl", some())
    llama("model", seed=1)
    return inside


def test_a_bag_of_words_is_fitted_on_the_training_comparisons(desk):
    trained = [replace(c, prompt=(Message("user", f"new {i}"),)) for i, c in enumerate(some(12, seed=5))]
    write_native("runs/judge/comparisons/train.jsonl", trained)
    card = judge("card.model=model")
    assert card["bag_of_words"] is None  # the model is not of this run
    shutil.rmtree("runs/judge/card")
    shutil.copytree("model", "runs/other/reward/model")
    write_native("runs/other/comparisons/train.jsonl", trained)
    card = judge("card.model=runs/other/reward/model")
    bag = fit_bag_of_words(trained, seed=load("r.yaml").seed)
    scores = bag.scores([r for c in some() for r in c.responses])
    plain = figures(Scored(some(), scores, np.zeros(scores.size, bool)), bins=4, near_tie=0.5)
    assert card["baselines"]["bag_of_words"] == plain["accuracy"]["overall"]
    assert card["bag_of_words"]["comparisons"] == 12
    assert card["bag_of_words"]["pairs"] == bag.pairs
    assert "bag of words | " in (FOLDER / "card.md").read_text()


def test_pairs_that_were_judged_again_are_found_in_the_files(desk):
    again = some()[0]
    turned = replace(again, ranks=again.ranks[::-1])
    write_native("data.jsonl", [*some(), again, turned])
    card = judge()
    assert card["ceiling"]["duplicates"]["mean"] == pytest.approx(1 / 3)
    assert card["ceiling"]["annotators"]["mean"] == pytest.approx(
        np.mean([c.confidence for c in [*some(), turned]])
    )
    assert card["probe"] is None
    assert card["ceiling"]["noise"] is None


def test_the_files_of_the_card_have_columns_of_their_own(desk):
    rows = [{"ask": f"q {i}", "good": "a b", "bad": "c"} for i in range(4)]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    own = "card.comparisons=own.jsonl"
    message = refusal(own, "card.columns={prompt: asks, chosen: good, rejected: bad}")
    assert message == "own.jsonl:1: no column 'asks', nearest: ask; mend card.columns"
    assert "are named by card.columns={prompt: " in refusal(own)
    card = judge(own, "card.columns={prompt: ask, chosen: good, rejected: bad}")
    assert (card["pairs"], card["ceiling"]["duplicates"]["mean"]) == (4, 1.0)


@pytest.mark.parametrize("rows", ["stop", "skip"])
def test_a_file_without_a_pair_of_different_ranks_is_refused(desk, rows):
    Path("data.jsonl").write_text('{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}\n' * 3)
    message = refusal(f"data.on_bad_rows={rows}")
    assert "all responses are tied" in message
    assert "\n" not in message


def test_ten_thousand_responses_to_one_prompt_are_judged_on_some_of_their_pairs(desk, monkeypatch):
    monkeypatch.setattr(
        scorers.ClassifierScorer, "score", lambda self, prompts, responses: np.arange(len(responses)) * -1.0
    )
    pool = Comparison(
        (Message("user", "q"),), tuple(f"r{i}" for i in range(10_000)), tuple(range(10_000)), "s"
    )
    write_native("data.jsonl", [pool])
    card = judge()
    assert (card["pairs"], card["pairs_left_out"]) == (10_000, 49_985_000)
    assert "49,985,000 pairs of very large comparisons are left out" in (FOLDER / "card.md").read_text()


def test_a_response_in_many_comparisons_is_scored_once(desk, monkeypatch):
    seen = []

    def score(self, prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return np.array([float(len(r)) for r in responses])

    monkeypatch.setattr(scorers.ClassifierScorer, "score", score)
    monkeypatch.setattr(evaluate, "COMPARISONS_AT_ONCE", 2)
    texts = ["a", "bb", "ccc", "dddd"]
    pool = [
        Comparison((Message("user", prompt),), (a, b), (0, 1), "s")
        for prompt in "pq"
        for a, b in itertools.combinations(texts, 2)
    ]
    write_native("data.jsonl", pool)
    judge()
    assert len(seen) == len(set(seen)) == 8
    rows = [json.loads(line) for line in (FOLDER / "scores.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in rows] == [[len(r) for r in c.responses] for c in pool]


def test_a_curve_needs_the_run_s_training_comparisons(desk):
    assert refusal("card.curve=[4,8]").startswith(
        "card.curve: runs/judge/comparisons/train.jsonl is not there"
    )
    write_native("runs/judge/comparisons/train.jsonl", some()[:7])
    assert "card.curve: 8 of 7 training comparisons; ask for 7 at most" in refusal("card.curve=[4,8]")


def test_what_the_model_adds_to_the_probes_is_paired(road, inside, monkeypatch):
    shutil.copytree(road / "runs", "runs")
    shutil.copytree(road / "models", "models")
    held_out = held_out_of("tiny")
    best = [[-float(rank) for rank in c.ranks] for c in held_out]  # always right, but that one is not known
    best[0] = [None] * len(best[0])
    rows = [
        {"prompt": prompt_key(c.prompt), "responses": c.responses, "last": [0.0] * len(c.ranks), "best": x}
        for c, x in zip(held_out, best, strict=True)
    ]
    monkeypatch.setattr(beside, "read_jsonl", lambda file: rows)
    monkeypatch.setattr(evaluate, "best_probe", lambda recipe: {"layer": 1, "pooling": "mean"})
    stage(evaluate.main)
    card = read_card(Path("runs/tiny/card"))
    probe, overall = card["probe"], card["accuracy"]["overall"]
    assert probe["last"]["mean"] == 0.5
    assert probe["adds_last"]["mean"] == pytest.approx(overall["mean"] - 0.5)
    assert probe["adds_last"]["ci95"] == pytest.approx(card["baselines"]["adds"]["chance"]["ci95"])
    assert probe["best"]["mean"] == 1
    assert probe["best"]["pairs"] == probe["adds_best"]["pairs"] < overall["pairs"] == probe["last"]["pairs"]
    assert probe["adds_best"]["mean"] <= 0
    assert "layer 1, mean" in (Path("runs/tiny/card") / "card.md").read_text()


def test_the_reward_stage_keeps_what_its_probes_give_the_held_out_responses(road):
    folder = road / "runs/tiny"
    rows = read_jsonl(folder / "reward/probe_scores.jsonl")
    held_out = read_native(folder / "comparisons/held_out.jsonl", "stop", Counts())
    assert [row["prompt"] for row in rows] == [prompt_key(c.prompt) for c in held_out]
    assert [tuple(row["responses"]) for row in rows] == [c.responses for c in held_out]
    results = json.loads((folder / "reward/manifest.json").read_text())["results"]
    won = [
        np.sign(row["last"][i] - row["last"][j]) / 2 + 0.5
        for row, c in zip(rows, held_out, strict=True)
        for i, j in itertools.permutations(range(len(c.ranks)), 2)
        if c.ranks[i] < c.ranks[j] and None not in (row["last"][i], row["last"][j])
    ]
    assert np.mean(won) == pytest.approx(results["probe_accuracy"]["mean"], abs=0.02)


def test_a_curve_of_reward_models_trains_each_once(road, inside, capsys):
    shutil.copytree(road / "runs", "runs")
    shutil.copytree(road / "models", "models")
    options = ("card.curve=[8,4]", "card.curve_of=reward")
    stage(evaluate.main, *options)
    out = capsys.readouterr().out
    assert "card: card.curve_of=reward: trains a reward model on 4, 8 comparisons; about 0 min" in out
    found = read_card(Path("runs/tiny/card"))
    points = found["curve"]["points"]
    assert [p["comparisons"] for p in points] == [4, 8]
    assert {p["pairs"] for p in points} == {found["pairs"]}
    small = Path("runs/tiny/curve-4")
    assert json.loads((small / "manifest.json").read_text())["fingerprint"]["recipe"]["reward"]["limit"] == 4
    scorer = scorers.load_scorer(str(small / "model"), tiny_recipe())
    held_out = held_out_of("tiny")
    alone = scored(held_out, scorer)
    assert points[0]["mean"] == pytest.approx(alone["accuracy"]["overall"]["mean"])
    assert "Of the reward model, trained" in (Path("runs/tiny/card") / "card.md").read_text()
    shutil.rmtree("runs/tiny/card")
    stage(evaluate.main, *options)
    assert "curve-4: done already" in capsys.readouterr().out
    assert read_card(Path("runs/tiny/card"))["curve"] == found["curve"]


def scored(comparisons, scorer):
    texts = [(c.prompt, r) for c in comparisons for r in c.responses]
    scores = scorer.score([p for p, _ in texts], [r for _, r in texts])
    return figures(Scored(comparisons, scores, np.zeros(scores.size, bool)), bins=4, near_tie=0.5)


def test_the_card_of_a_run_stands_beside_its_words_and_its_curve(road, inside, monkeypatch):
    shutil.copytree(road / "runs", "runs")
    shutil.copytree(road / "models", "models")
    stage(evaluate.main, "card.curve=[4,8,16]")
    card = read_card(Path("runs/tiny/card"))
    assert card["bag_of_words"]["comparisons"] > 0
    points = card["curve"]["points"]
    assert [p["comparisons"] for p in points] == [4, 8, 16]
    assert {p["pairs"] for p in points} == {card["pairs"]}
    line = np.polyfit([2, 3, 4], [p["mean"] for p in points], 1)
    assert card["curve"]["fit"]["per_doubling"] == pytest.approx(line[0])
    assert [p["fitted"] for p in points] == pytest.approx(np.polyval(line, [2, 3, 4]))
    page = (Path("runs/tiny/card") / "card.md").read_text()
    assert "## Learning curve" in page
    again = curve.learning_curve(tiny_recipe("card.curve=[8]"), Unremembered(), held_out_of("tiny"))
    assert again["fit"] is None
    assert 0 <= again["points"][0]["mean"] <= 1
    asked = []
    plain = curve.load_dialogue
    monkeypatch.setattr(curve, "load_dialogue", lambda *given: asked.append(given[1]) or plain(*given))
    longer = tiny_recipe("card.curve=[8]", "reward.max_response_tokens=12")
    curve.learning_curve(longer, Unremembered(), held_out_of("tiny"))
    assert asked == [12]  # it reads what the reward model reads


class Unremembered:
    """A run that computes everything anew."""

    def remember(self, name, compute):
        return compute()


def held_out_of(name):
    return read_comparisons([f"runs/{name}/comparisons/held_out.jsonl"], on_bad_rows="stop")[0]
