"""`evaluate`, `card` and `tax` in two processes: the same bits as in one, written once."""

import json
import shutil
from pathlib import Path

import pytest
import ranks
from conftest import one_of, stage
from test_deepspeed import alone_in, copy_of
from test_reward_card_stage import some
from tiny_tax import SHORT, TASKS

from policy.alignment_tax import __main__ as tax
from policy.alignment_tax import run as tax_work
from policy.alignment_tax.run import share
from policy.evaluate import __main__ as evaluate
from reward.card import __main__ as card
from rlhf.data.comparisons import write_native
from rlhf.runs import lock

EVALUATE = ("evaluate.batch_size=5", "evaluate.best_of=4", "evaluate.best_of_prompts=6")
CARD = ("card.comparisons=some.jsonl", "card.against=runs/tiny/reward/model")
TAX = (*SHORT, *TASKS.values(), "tax.variants=[base,prompted,sft,policy]", "tax.score=true")


def result(folder, name, figures, *more):
    """The figures of a finished stage without what it cost, and its other files."""
    done = folder / "runs" / "tiny" / name
    found = json.loads((done / figures).read_text())
    for cost in ("stages", "cost"):
        found.pop(cost, None)
    return found, [(done / file).read_text() for file in more]


def test_two_processes_evaluate_what_one_does(road, tmp_path):
    stages = ("comparisons", "reward", "ppo")
    alone, here = (copy_of(road, tmp_path / name, *stages) for name in ("alone", "here"))
    alone_in(alone, evaluate.main, *EVALUATE)
    said = ranks.finish(here, "evaluate", *EVALUATE)
    files = "evaluate", "summary.json", "responses.jsonl"
    assert result(here, *files) == result(alone, *files)
    assert said.count("evaluate: runs/tiny/evaluate\n") == 1
    assert said.count("| prompt | before | after |") == 1, "a page of one process"
    again = ranks.finish(here, "evaluate", *EVALUATE)
    assert again.count("evaluate: done already") == 1
    assert again.count("| prompt | before | after |") == 1


def test_two_processes_make_the_card_of_one(road, tmp_path):
    alone, here = (copy_of(road, tmp_path / name, "comparisons", "reward") for name in ("alone", "here"))
    for folder in (alone, here):
        write_native(folder / "some.jsonl", some(150))  # three chunks, so the processes have unequal parts
    alone_in(alone, card.main, *CARD)
    said = ranks.finish(here, "card", *CARD)
    files = "card", "card.json", "scores.jsonl", "card.md"
    assert result(here, *files) == result(alone, *files)
    assert said.count("card: runs/tiny/card\n") == 1


def test_two_processes_make_the_tax_table_of_one(tax_lab, tmp_path):
    alone, here = (Path(shutil.copytree(tax_lab, tmp_path / name)) for name in ("alone", "here"))
    alone_in(alone, tax.main, *TAX)
    said = ranks.finish(here, "tax", *TAX, "tax.cache=kept")
    files = "tax", "tax.json", "items.jsonl", "responses.jsonl"
    assert result(here, *files) == result(alone, *files)
    assert said.count("tax: 5 variants") == 1
    both = (here / "tax-0.log").read_text(), (here / "tax-1.log").read_text()
    assert "tax:" in both[0]
    assert "tax:" not in both[1]


def test_a_process_of_the_tax_table_does_its_own_variants_alone(here, monkeypatch):
    def left():
        raise SystemExit(0)

    for name, value in {**one_of(2), "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    (here / "runs" / "tiny" / "tax").mkdir()
    (here / "runs" / "tiny" / "tax" / lock.FILE).write_text("2@1")  # the first process is there
    monkeypatch.setattr(tax_work, "join", lambda section: None)
    monkeypatch.setattr(tax_work, "leave", left)
    with pytest.raises(SystemExit):
        stage(tax.main, *TAX, "tax.cache=kept")
    kept = {tuple(file.name.split("--")[:2]) for file in Path("kept").iterdir()}
    assert {variant for variant, _ in kept} == {"prompted", "policy_0.5"}, "every other one"
    assert {task for _, task in kept} == {"hhh", "lm_loss", "toxicity", "score"}


@pytest.mark.parametrize(("variants", "world"), [(1, 1), (5, 2), (2, 5), (3, 3), (1, 4), (4, 3)])
def test_every_pair_of_the_table_is_one_process_s(variants, world):
    names, tasks = [f"v{i}" for i in range(variants)], [f"t{i}" for i in range(4)]
    parts = [share(names, tasks, rank, world) for rank in range(world)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == variants * 4
    if world <= variants:
        assert all(len({v for v, _ in part}) <= -(-variants // world) for part in parts), "few models to load"
    else:
        assert max(len(part) for part in parts) <= 4
        assert sum(1 for part in parts if part) > variants
