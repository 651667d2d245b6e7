"""The gold comparison: what it asks for, what both sides are judged by, the page; no training of theirs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, TINY, tiny_recipe

from benchmarks.gold import __main__ as gold
from benchmarks.gold.sides import closed, judge_both, prompts_of
from rlhf.collect.judges import JUDGES
from rlhf.errors import UserError

EOS, PAD = 1, 0


def test_an_open_response_gets_eos_and_a_closed_one_padding():
    ids = torch.tensor([[7, 8, 9, 9], [7, 8, EOS, PAD], [EOS, 8, 9, EOS]])
    assert closed(ids, 2, EOS, PAD)[:, -1].tolist() == [EOS, PAD, PAD]
    assert closed(ids, 2, EOS, PAD)[:, :-1].equal(ids)
    # an EOS of the prompt closes nothing
    assert closed(torch.tensor([[EOS, 8, 9, 9]]), 2, EOS, PAD)[0, -1] == EOS


def test_the_prompts_are_those_of_the_run(road):
    run = road / "runs" / "tiny"
    prompts = prompts_of(run, "held_out_prompts.jsonl")
    lines = (run / "comparisons" / "held_out_prompts.jsonl").read_text().splitlines()
    assert [p[-1].content for p in prompts] == [json.loads(x)["messages"][-1]["content"] for x in lines]


def test_one_policy_against_itself_differs_by_nothing_and_against_another_by_something(
    road, tmp_path, monkeypatch
):
    monkeypatch.chdir(road)
    monkeypatch.setitem(JUDGES, "vader", lambda prompts, texts: [float(len(set(text))) for text in texts])
    run = road / "runs" / "tiny"
    recipe = tiny_recipe("evaluate.prompts=8")
    found = judge_both(recipe, run, run / "ppo" / "policy")
    assert found["gold"]["diff"] == 0
    assert found["gold"]["n"] == 8
    assert found["kl"]["ours"] == found["kl"]["theirs"]
    assert found["scores"]["theirs"] == found["scores"]["policy"]
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(run / "ppo" / "policy", other)
    file = other / "adapter_model.safetensors"
    save_file({name: 30 * tensor for name, tensor in load_file(file).items()}, file)
    far = judge_both(recipe, run, other)
    assert far["kl"]["theirs"] > far["kl"]["ours"] == found["kl"]["ours"]
    assert far["scores"]["theirs"] != far["scores"]["policy"]
    assert far["scores"]["reference"] == found["scores"]["reference"]


STAND_IN = """
import json, pathlib, sys
kind, task, result = sys.argv[1:]
figures = {"theirs": {"seconds": 12.0, "step_s": [], "peak_bytes": 1},
           "judge": {"reference": {"gold": 0.1, "length": 8.0}, "kl": {"theirs": 1.0, "ours": 2.0},
                     "gold": {"before": 0.2, "after": 0.5, "diff": 0.3, "ci95": [0.1, 0.5], "n": 24},
                     "response_length": {"before": 8.0, "after": 7.0, "diff": -1.0, "ci95": [-2, 0], "n": 24},
                     "scores": {}}}[kind]
pathlib.Path(result).write_text(json.dumps(figures))
"""


def test_the_page_tells_both_sides_and_holds_no_path(road, tmp_path, monkeypatch):
    monkeypatch.chdir(road)
    (tmp_path / "child.py").write_text(STAND_IN)
    command = [sys.executable, "-S", str(tmp_path / "child.py")]
    report = gold.compare(
        str(TINY),
        PROMPTS,
        command,
        lambda: Path("/p"),
        tmp_path,
    )
    page = (tmp_path / "gold.md").read_text()
    assert "+0.300 [+0.100, +0.500]" in page
    assert report["work"]["responses"] == 6 * 16
    assert report["work"]["ours_seconds"] > 0
    assert str(tmp_path) not in page + json.dumps(report)
    assert str(TINY.parent) not in page + json.dumps(report)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.judge=reward", "gold judge"),
        ("ppo.kl_controller=adaptive", "ppo.kl_controller"),
        ("ppo.missing_eos=replace", "ppo.missing_eos"),
        ("name=never-run", "is not complete"),
    ],
)
def test_what_theirs_does_not_have_is_told(road, monkeypatch, override, message):
    monkeypatch.chdir(road)
    with pytest.raises(UserError, match=message):
        gold.check(tiny_recipe(override))
