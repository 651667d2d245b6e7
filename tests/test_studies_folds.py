"""Reward models judged in folds: what is held out, what is refused, and the figures over all of them."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, stage, tiny_recipe

from reward.card import baselines
from rlhf.collect import __main__ as collect
from rlhf.errors import UserError
from rlhf.models.tiny import write_tiny_model
from rlhf.runs.artifacts import read_jsonl
from studies import folds
from studies.engine.units import run

ROWS = ROOT / "recipes" / "tiny" / "comparisons.jsonl"
QUICK = ["reward.epochs=1", "reward.reference_responses=4", "reward.probe=true"]
QUICK += ["data.prompts=[]", "data.held_out_prompts=[]"]


def test_units_go_together_and_everything_is_held_out_once():
    held = folds.deal(["b", "a", "c", "a", "b", "d", "e"], 2)
    assert held == [
        [False, True, True, True, False, False, True],  # a, c and e
        [True, False, False, False, True, True, False],
    ]
    with pytest.raises(UserError, match="--folds 6: there are 5 units"):
        folds.deal(list("bacabde"), 6)


@pytest.mark.parametrize(
    ("overrides", "number", "line"),
    [
        ([f"data.comparisons={ROWS}"], 1, "--folds 1: at least 2"),
        ([], 2, "data.comparisons: folds are made of"),
        ([f"data.comparisons={ROWS}", f"data.held_out_comparisons={ROWS}"], 2, "held_out_comparisons: every"),
        ([f"data.comparisons={ROWS}", "card.model=elsewhere"], 2, "card.model: every fold"),
        ([f"data.comparisons={ROWS}", "ppo.rewards=[{judge: vader}]"], 2, "ppo.rewards: every fold"),
    ],
)
def test_what_cannot_be_judged_in_folds_is_told(overrides, number, line):
    with pytest.raises(UserError, match=line):
        folds.check(tiny_recipe(*overrides), number)


def test_a_limit_draws_what_the_comparisons_stage_draws(inside, monkeypatch):
    limited = [f"data.comparisons={ROWS}", "data.limit=20", "data.prompts=[]", "data.held_out_prompts=[]"]
    write_tiny_model(Path("models/tiny"))
    stage(collect.main, *limited)
    files = [Path(f"runs/tiny/comparisons/{part}.jsonl") for part in ("train", "held_out")]
    kept = [row for file in files for row in read_jsonl(file)]
    found = []
    monkeypatch.setattr(folds, "write_folds", lambda folder, comparisons, held: found.extend(comparisons))
    monkeypatch.setattr(folds, "units_of", lambda *_: sys.exit())
    words = ["--recipe", str(TINY), "--folds", "2", "--out", "out", "--work", "work", "--set", *limited]
    monkeypatch.setattr(sys, "argv", ["folds", *words])
    with pytest.raises(SystemExit):
        folds.main()
    assert len(found) == len(kept) == 20
    assert {c.responses for c in found} == {tuple(row["responses"]) for row in kept}


@pytest.mark.slow
def test_the_page_is_about_the_judgments_of_every_fold(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    @contextlib.contextmanager
    def here(jobs):
        yield lambda units, folder, compute: run(units, folder, compute, say=print)

    fitted = []
    fit = baselines.fit_bag_of_words
    monkeypatch.setattr(baselines, "fit_bag_of_words", lambda *a, **k: fitted.append(1) or fit(*a, **k))
    monkeypatch.setattr(folds.command, "workers", here)
    words = ["--recipe", str(TINY), "--folds", "2", "--out", "out", "--work", "work"]
    words += ["--set", f"data.comparisons={ROWS}", *QUICK]
    monkeypatch.setattr(sys, "argv", ["folds", *words])
    folds.main()
    assert len(fitted) == 2
    files = sorted((tmp_path / "runs").glob("*/card/scores.jsonl"))
    judged = [row for file in files for row in read_jsonl(file)]
    trained = [
        {str(r["prompt"]) for r in read_jsonl(f.parents[1] / "comparisons/train.jsonl")} for f in files
    ]
    assert len(files) == 2
    assert sorted(r["prompt"][-1]["content"] for r in judged) == sorted(
        r["prompt"] if isinstance(r["prompt"], str) else r["prompt"][-1]["content"] for r in read_jsonl(ROWS)
    )
    for file, seen in zip(files, trained, strict=True):
        assert not seen & {str(row["prompt"]) for row in read_jsonl(file)}
    right = [(a > b) + (a == b) / 2 for a, b in (
        sorted(row["scores"], key=dict(zip(row["scores"], row["ranks"], strict=True)).get) for row in judged
    )]  # fmt: skip
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    figure, _ = found["all"]["reward model"]
    assert figure["mean"] == pytest.approx(sum(right) / len(right))
    assert (figure["pairs"], figure["n"]) == (len(judged), len(judged))
    parts = [fold["reward model"][0] for fold in found["folds"]]
    assert sum(p["mean"] * p["pairs"] for p in parts) == pytest.approx(sum(right))
    assert found["all"]["probe, last layer"][0]["pairs"] == len(judged)
    assert "| reward model |" in (tmp_path / "out" / "study.md").read_text()
    capsys.readouterr()
    folds.main()
    assert "2 of them done before" in capsys.readouterr().out
