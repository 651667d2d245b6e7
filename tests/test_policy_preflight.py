"""What the tax stage cannot use is told before the first stage of a road runs."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, stage
from tiny_tax import PROMPT, TEXTS, lines

from policy.alignment_tax import preflight
from rlhf.errors import UserError
from rlhf.runs.stage import RUNS

LOSS = "tax.tasks.lm_loss={files: texts.jsonl, limit: 3}"
DISTILL = "distill={texts: [texts.jsonl]}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with files for a table, and no stage."""
    monkeypatch.chdir(tmp_path)
    Path("hhh.txt").write_text(PROMPT)
    lines("texts.jsonl", [{"text": text} for text in TEXTS])


def look(*overrides):
    stage(preflight.main, "hhh_prompt=hhh.txt", *overrides)


def test_the_variants_are_those_that_the_stages_will_make(capsys):
    look(LOSS, "tax.interpolate=[0.5]")
    said = capsys.readouterr().out
    assert "variants of the tax table: base, prompted, policy_0.5, policy; items: lm_loss 3\n" in said
    look(LOSS, "tax.interpolate=[]", DISTILL, "sft.data=chosen")
    assert "base, prompted, sft, distilled, policy; items" in capsys.readouterr().out
    assert not RUNS.exists(), "it writes nothing"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([LOSS, "tax.tasks.lambda.files=texts.jsonl"], r"tax\.tasks: unknown evaluation 'lambda'; did you"),
        (
            [LOSS, "tax.reference=distilled"],
            r"tax\.reference: 'distilled' is not among the variants \(base, ",
        ),
        (["tax.tasks.hhh.files=texts.jsonl"], r"texts\.jsonl:1: .*target_scores"),
        ([LOSS, "tax.tasks.toxicity.files=empty.jsonl"], r"empty\.jsonl"),
    ],
)
def test_a_mistake_of_the_last_stage_is_told(overrides, message):
    Path("empty.jsonl").touch()
    with pytest.raises(UserError, match=message) as caught:
        look(*overrides)
    assert "\n" not in str(caught.value)


def test_a_reference_that_a_stage_will_make_is_none():
    look(LOSS, DISTILL, "tax.reference=distilled")


def test_without_a_table_there_is_nothing_to_look_at(capsys):
    look("plan=off")
    assert capsys.readouterr().out == ""
    look()
    assert capsys.readouterr().out.startswith("plan: reward (")


def test_for_a_finished_table_there_is_nothing_to_look_at(capsys):
    Path("runs/tiny/tax").mkdir(parents=True)
    Path("runs/tiny/tax/manifest.json").touch()
    lines("texts.jsonl", [{"words": "none"}])
    look(LOSS, "plan=off")
    assert capsys.readouterr().out == ""


def test_a_road_begins_with_it():
    command = ["make", "--no-print-directory", "-n", "rlhf", "RECIPE=recipes/tiny.yaml", "PROCS=1"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ)
    said_of = said.stdout.replace("rlhf.training.launch ", "")
    modules = [word.split()[0] for word in said_of.split(" -m ") if word.startswith(("rlhf.", "policy."))]
    assert modules[:3] == ["rlhf.recipe", "policy.alignment_tax.preflight", "rlhf.models.prepare"]
    assert modules[-2:] == ["policy.alignment_tax", "rlhf.report"]
