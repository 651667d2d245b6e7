"""The card stage as a user meets it: any model, any file, no run needed, and the run's own."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import stage, tiny_recipe
from tiny_classifiers import llama

from reward.card import __main__ as evaluate
from reward.card import scorers
from reward.card.figures import Scored, figures
from reward.card.report import as_markdown
from reward.card.scorers import load_scorer
from rlhf.collect import __main__ as collect
from rlhf.data.comparisons import Comparison, Message, prompt_key, write_native
from rlhf.data.readers import read_comparisons
from rlhf.errors import UserError
from rlhf.models import prepare
from rlhf.recipe.load import is_path, load

FOLDER = Path("runs/judge/card")
RECIPE = """
name: judge
model: {path: models/tiny, source: random}
dialogue: {template: plain, max_prompt_tokens: 200, max_response_tokens: 100}
data: {comparisons: data.jsonl, held_out: 0.25}
card: {model: model, comparisons: data.jsonl, bins: 4}
"""


def some(n=30, seed=0):
    rng = np.random.default_rng(seed)

    def say(words):
        return " ".join("".join(chr(97 + c) for c in rng.integers(0, 26, 4)) for _ in range(words))

    return [
        Comparison(
            (Message("user", f"{say(3)} {i // 2}"),) if i % 2 == 0 else (Message("user", f"{say(2)}"),),
            tuple(say(int(rng.integers(1, 9))) for _ in range(2 + i % 2)),
            ((0, 1), (1, 0, 1))[i % 2],
            "ab"[i % 3 == 0],
            float(rng.random()),
        )
        for i in range(n)
    ]


@pytest.fixture
def desk(inside):
    """A folder with a recipe, comparisons and a classifier, and no run."""
    Path("r.yaml").write_text(RECIPE)
    write_native("data.jsonl", some())
    llama("model", seed=1)
    return inside


def judge(*overrides):
    stage(evaluate.main, *overrides, recipe="r.yaml")
    return read_card()


def read_card(folder=FOLDER):
    return json.loads((folder / "card.json").read_text())


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        stage(evaluate.main, *overrides, recipe="r.yaml")
    message = str(caught.value)
    del caught
    gc.collect()  # the error holds the run, which holds the lock
    assert not (FOLDER / "card.json").exists()
    assert not (FOLDER / "manifest.json").exists()
    return message


def expected_scores(comparisons, model="model"):
    scorer = load_scorer(model, load("r.yaml"))
    prompts = [c.prompt for c in comparisons for _ in c.responses]
    return scorer.score(prompts, [r for c in comparisons for r in c.responses])


def test_any_model_is_judged_on_any_file_without_a_run(desk, capsys):
    card = judge()
    scores = expected_scores(some())
    expected = figures(Scored(some(), scores, np.zeros(scores.size, bool)), bins=4, near_tie=0.5)
    assert json.loads(json.dumps(expected)) == {k: card[k] for k in expected}
    page = (FOLDER / "card.md").read_text()
    assert page == as_markdown(card)
    assert page in capsys.readouterr().out
    assert "is for its makers to say" in page
    assert set(card["model"]["files"]) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert list(card["data"]["files"]) == ["data.jsonl"]
    assert len(card["data"]["files"]["data.jsonl"]) == 64
    assert (card["data"]["counts"]["read"], card["data"]["counts"]["kept"]) == (30, 30)
    assert sorted(p.name for p in Path("runs/judge").iterdir()) == ["card"]
    assert not (FOLDER / "parts").exists()


def test_the_scores_lie_beside_their_comparisons(desk):
    judge()
    rows = [json.loads(line) for line in (FOLDER / "scores.jsonl").read_text().splitlines()]
    assert [s for row in rows for s in row["scores"]] == pytest.approx(expected_scores(some()), abs=1e-5)
    assert "against" not in rows[0]
    again, _ = read_comparisons([str(FOLDER / "scores.jsonl")], on_bad_rows="stop")
    assert again == some()


def test_a_second_model_is_put_beside_the_first(desk):
    llama("other", seed=2)
    card = judge("card.against=other")
    assert card["against_model"]["path"] == "other"
    rows = [json.loads(line) for line in (FOLDER / "scores.jsonl").read_text().splitlines()]
    other = expected_scores(some(), "other")
    assert [s for row in rows for s in row["against"]] == pytest.approx(other, abs=1e-5)
    assert -1 < card["against"]["correlation"]["mean"] < 0.999
    assert "## Against other" in (FOLDER / "card.md").read_text()
    shutil.rmtree("runs")
    against = judge("card.against=model")["against"]
    assert [against[k]["mean"] for k in ("difference", "agreement")] == [0, 1]
    assert against["p_value"] == 1


def test_a_finished_card_is_printed_again_and_nothing_is_loaded(desk, capsys, monkeypatch):
    judge()
    capsys.readouterr()
    monkeypatch.setattr(scorers, "load_scorer", None)
    judge()
    out = capsys.readouterr().out
    assert "card: done already" in out.splitlines()[0]
    assert (FOLDER / "card.md").read_text() in out


def test_an_interrupted_card_goes_on_and_is_the_same(desk, monkeypatch):
    monkeypatch.setattr(evaluate, "COMPARISONS_AT_ONCE", 7)
    calls = []
    plain = scorers.ClassifierScorer.score

    def failing(self, prompts, responses):
        calls.append(len(responses))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, prompts, responses)

    monkeypatch.setattr(scorers.ClassifierScorer, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        judge()
    assert len(list((FOLDER / "parts").iterdir())) == 2
    judge()
    assert len(calls) == 3 + 3  # five parts, two of them done
    results = {name: (FOLDER / name).read_bytes() for name in ("card.json", "card.md", "scores.jsonl")}
    shutil.rmtree("runs")
    judge()
    assert results == {name: (FOLDER / name).read_bytes() for name in results}
    shutil.rmtree("runs")
    monkeypatch.setattr(evaluate, "COMPARISONS_AT_ONCE", 1)  # the size of a part changes no score
    slope = judge()["calibration"]["slope"]["mean"]
    assert slope == pytest.approx(json.loads(results["card.json"])["calibration"]["slope"]["mean"], rel=1e-4)


def test_a_model_that_changed_in_its_place_is_noticed(desk):
    judge()
    llama("model", seed=9)
    with pytest.raises(UserError, match=r"data file model\.safetensors"):
        judge()


def test_a_limit_is_drawn_by_the_seed(desk):
    def prompts(*overrides):
        judge("card.limit=10", *overrides)
        lines = (FOLDER / "scores.jsonl").read_text().splitlines()
        shutil.rmtree("runs")
        return [json.loads(line)["prompt"] for line in lines]

    first, second = prompts(), prompts("seed=1")
    assert len(first) == len(second) == 10
    assert first != second
    assert first != [json.loads(line)["prompt"] for line in Path("data.jsonl").read_text().splitlines()[:10]]


def test_fields_of_the_section_change_the_card(desk):
    card = judge("card.bins=3", "card.near_tie=2.5")
    assert len(card["calibration"]["bins"]) == 3
    assert card["near_ties"]["threshold"] == pytest.approx(2.5 * card["scores"]["sd"]["mean"])


def test_bad_rows_stop_or_are_counted(desk):
    with Path("data.jsonl").open("a") as file:
        file.write('{"prompt": "q", "responses": ["a"], "ranks": [0]}\n')
    assert "data.jsonl:31" in refusal()
    card = judge("data.on_bad_rows=skip")
    assert card["data"]["counts"]["dropped"] == {"fewer than 2 responses": 1}


def test_prompts_that_the_run_was_trained_on_are_left_out_and_counted(desk):
    trained = Path("runs/judge/comparisons/train.jsonl")
    write_native(trained, some()[:9])
    card = judge()
    keys = {prompt_key(c.prompt) for c in some()[:9]}
    left = [c for c in some() if prompt_key(c.prompt) not in keys]
    assert card["comparisons"] == len(left) == 21
    assert card["data"]["counts"]["dropped"] == {"also among the training prompts of a run": 9}
    assert "9 also among the training prompts of a run" in (FOLDER / "card.md").read_text()


def test_the_training_prompts_of_the_model_s_own_run_count_too(desk):
    shutil.copytree("model", "runs/other/reward/model")
    write_native("runs/other/comparisons/train.jsonl", some()[:4])
    card = judge("card.model=runs/other/reward/model")
    assert card["comparisons"] == 26
    assert "No prompt of these comparisons is among the training comparisons" in card["data"]["seen"]


def test_nothing_unseen_is_an_error(desk):
    write_native("runs/judge/comparisons/train.jsonl", some())
    message = refusal()
    assert message.startswith(
        "card.comparisons: nothing usable in data.jsonl: read 30, kept 0, dropped 30 (30 also"
    )


def test_the_run_s_held_out_comparisons_are_taken_where_no_file_is_named(desk):
    assert refusal("card.comparisons=[]").startswith("card needs the comparisons stage")
    stage(prepare.main, recipe="r.yaml")
    stage(collect.main, recipe="r.yaml")
    card = judge("card.comparisons=[]")
    held_out = Path("runs/judge/comparisons/held_out.jsonl").read_text().splitlines()
    assert card["comparisons"] == len(held_out) > 3
    assert card["data"]["counts"]["dropped"] == {}


def test_the_run_s_own_model_needs_its_stage(desk):
    assert refusal("card.model=null").startswith("card needs the reward stage")
    assert not FOLDER.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("card.model=./none", "override 'card.model=./none': card.model: ./none is not a folder"),
        ("card.against=runs/x/reward/model", "card.against: runs/x/reward/model is not a folder"),
        ("card.model=model/none", "card.model: model/none is not a folder"),
        ("card.model=''", "card.model: '' is not a folder"),
        ("card.comparisons=no/*.jsonl", "card.comparisons: no file matches no/*.jsonl; check the path"),
        ("card.outliers=none.txt", "card.outliers: no file matches none.txt; check the path"),
        ("card.model=r.yaml", "card.model: r.yaml is not a folder"),
    ],
)
def test_a_wrong_path_is_told_with_the_recipe(desk, override, message):
    assert message in refusal(override)
    assert not FOLDER.exists()


def test_hub_ids_cannot_be_checked_beforehand(desk):
    recipe = load(
        "r.yaml", ["card.model=OpenAssistant/reward", "card.comparisons=hub:name", "card.against=gpt2"]
    )
    assert recipe.card.model == "OpenAssistant/reward"
    assert not is_path("gpt2")
    assert all(map(is_path, ("~/model", "/model", "../model", "model", "runs/x/model")))


def test_a_model_with_two_labels_is_refused_and_nothing_is_written(desk, monkeypatch):
    llama("two", labels=2)
    assert "card.model: two has 2 labels" in refusal("card.model=two")
    monkeypatch.setattr(scorers, "load_scorer", None)  # told before the first model is loaded
    assert "card.against: two has 2 labels" in refusal("card.against=two")


def test_the_card_of_a_run_s_own_model_agrees_with_its_stage(road, inside):
    shutil.copytree(road / "runs", "runs")
    shutil.copytree(road / "models", "models")
    stage(evaluate.main)
    card, manifest = (
        read_card(Path("runs/tiny/card")),
        json.loads(Path("runs/tiny/reward/manifest.json").read_text()),
    )
    held_out = manifest["results"]["held_out_accuracy"]
    assert card["accuracy"]["overall"]["mean"] == pytest.approx(held_out["mean"], abs=1e-6)
    assert card["near_ties"]["threshold"] == tiny_recipe().card.near_tie
    assert card["model"]["gain"] == pytest.approx(manifest["results"]["gain"])
    assert card["calibration"]["slope_before_normalisation"]["pairs"] == card["pairs"]
    assert card["scores"]["cut"]["mean"] is not None
    assert "No prompt of these comparisons is among" in (Path("runs/tiny/card") / "card.md").read_text()


def test_responses_that_are_equal_after_the_cut_are_not_judged(road, inside, capsys):
    shutil.copytree(road / "runs", "runs")
    shutil.copytree(road / "models", "models")
    held_out = Path("runs/tiny/comparisons/held_out.jsonl").read_text(encoding="utf-8")
    same = {"prompt": "new", "responses": ["a" * 50 + "b", "a" * 50 + "c"], "ranks": [0, 1]}
    Path("held.jsonl").write_text(held_out + json.dumps(same) + "\n", encoding="utf-8")
    stage(evaluate.main, "card.comparisons=held.jsonl")
    results = json.loads(Path("runs/tiny/reward/manifest.json").read_text())["results"]
    accuracy = read_card(Path("runs/tiny/card"))["accuracy"]["overall"]["mean"]
    assert accuracy == pytest.approx(results["held_out_accuracy"]["mean"], abs=1e-6)
    assert "card: 1 of 11 comparisons left out: their responses are equal after" in capsys.readouterr().out
