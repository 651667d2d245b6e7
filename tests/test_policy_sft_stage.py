"""The sft stage through its main: what it reads, leaves and refuses, killed, and on two processes."""

import gc
import json
import shutil
from pathlib import Path

import pytest
from conftest import stage
from ranks import Forked, Launched, finish
from sft_cases import FAST, begun
from test_deepspeed import alone_in, assert_close, copy_of, curve

from benchmarks.faults.killed_process import Start
from policy.sft import __main__ as sft
from rlhf.errors import exit_on_user_error
from rlhf.runs.artifacts import MANIFEST, sha256_of

CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"n{n}"}]}
    for n in range(24)
]


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """A folder with the tiny model and the comparisons of a run."""
    return begun(tmp_path_factory.mktemp("beginning"))


@pytest.fixture
def lab(beginning, inside):
    """A copy of that folder, to work in."""
    for name in ("models", "runs"):
        shutil.copytree(beginning / name, inside / name)
    return inside


def chats(folder, rows=CHATS):
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "sft.data=chats.jsonl"


def results(name="tiny"):
    return json.loads(Path(f"runs/{name}/sft/manifest.json").read_text())["results"]


def refused(capsys, *overrides):
    capsys.readouterr()
    status = 0
    try:
        stage(lambda: exit_on_user_error(sft.main), *overrides)
    except SystemExit as exit_:
        status = exit_.code
    gc.collect()  # a process that ends gives its lock back
    assert status == 2
    written = capsys.readouterr().err
    (line,) = [line for line in written.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in written
    return line.removeprefix("error: ")


def test_a_recipe_without_the_section_has_no_such_stage(lab, capsys):
    stage(sft.main)
    assert "sft: not in this recipe" in capsys.readouterr().out
    assert not Path("runs/tiny/sft").exists()


def test_the_best_responses_of_the_run_are_learned_and_measured_on_held_out_ones(lab, capsys):
    stage(sft.main, *FAST, "sft.epochs=4")
    found = results()
    counts = {
        part: len(Path(f"runs/tiny/comparisons/{part}.jsonl").read_text().splitlines())
        for part in ("train", "held_out")
    }
    assert (found["train"], found["held_out"]) == (counts["train"], counts["held_out"])
    assert found["packed"] is True
    before, after, change = (found[f"held_out_{x}"] for x in ("loss_before", "loss", "change"))
    assert after["mean"] < before["mean"]
    assert change["ci95"][1] < 0
    assert found["perplexity"]["mean"] < found["perplexity_before"]["mean"]
    said = capsys.readouterr().out
    assert f"sft: {counts['train']} demonstrations to learn, {counts['held_out']} held out" in said
    assert f"-> {after['mean']:.3f} [" in said
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        file.name for file in Path("runs/tiny/sft/policy").iterdir()
    }
    stage(sft.main, *FAST, "sft.epochs=4")
    assert "sft: done already" in capsys.readouterr().out


def test_chats_are_split_by_prompt_and_need_no_comparisons(lab):
    shutil.rmtree("runs")
    stage(sft.main, chats(lab, [*CHATS, CHATS[0], {**CHATS[1], "extra": 1}]), *FAST)
    found = results()
    assert found["train"] + found["held_out"] == 24
    assert found["counts"]["dropped"] == {"duplicate demonstration": 2}
    manifest = json.loads(Path("runs/tiny/sft/manifest.json").read_text())
    assert list(manifest["fingerprint"]["inputs"]) == ["chats.jsonl"]
    assert manifest["parents"] == {}


def test_what_is_learned_and_what_it_is_measured_on_can_be_fewer(lab):
    stage(sft.main, *FAST, "sft.limit=16", "sft.eval_samples=3")
    found = results()
    assert (found["train"], found["held_out"]) == (16, 3)


def test_loss_on_all_learns_more_tokens(lab):
    stage(sft.main, chats(lab), *FAST, "name=a")
    stage(sft.main, "sft.data=chats.jsonl", *FAST, "sft.loss_on=all", "name=b")
    assert results("a")["learned_tokens"] < results("b")["learned_tokens"]


# --- what a user can get wrong ---------------------------------------------------------------------------


def test_a_bad_chat_stops_with_its_line_or_is_skipped_and_counted(lab, capsys):
    rows = [*CHATS[:3], {"messages": [{"role": "user", "content": "and?"}]}, *CHATS[3:]]
    spec = chats(lab, rows)
    line = refused(capsys, spec, *FAST)
    assert line.startswith("chats.jsonl:4: the conversation does not end in an assistant turn")
    stage(sft.main, spec, *FAST, "data.on_bad_rows=skip")
    assert results()["counts"]["dropped"] == {"the conversation does not end in an assistant turn": 1}


def test_a_long_prompt_stops_is_skipped_or_is_cut(lab, capsys):
    long = {"prompt": "word " * 40, "completion": "yes"}
    spec = chats(lab, [*CHATS, long])
    line = refused(capsys, spec, *FAST)
    assert "the prompt has 200 tokens, dialogue.max_prompt_tokens is 96" in line
    assert "dialogue.on_long_prompts=skip or truncate" in line
    stage(sft.main, spec, *FAST, "dialogue.on_long_prompts=skip", "name=a")
    stage(sft.main, spec, *FAST, "dialogue.on_long_prompts=truncate", "name=b")
    assert [results(name)["train"] + results(name)["held_out"] for name in ("a", "b")] == [24, 25]


def test_what_cannot_work_is_refused_in_one_line(lab, capsys):
    stage(sft.main, *FAST)
    assert "sft.loss_on: 'response' -> 'all'" in refused(capsys, *FAST, "sft.loss_on=all")
    shutil.rmtree("runs")
    assert "run `make comparisons RECIPE=...`" in refused(capsys, *FAST)
    line = refused(capsys, *FAST, "sft.start=mine")
    assert line.startswith("sft.start: mine/adapter_model.safetensors is not there")
    assert not Path("runs").exists()


# --- interrupted, and shared by processes ----------------------------------------------------------------


def start(folder):
    return Start(folder, (*FAST, "sft.epochs=2"), name="sft")


def left(folder):
    """Everything of a finished stage that must not depend on interruptions."""
    done = folder / "runs/tiny/sft"
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    files = {p.name: sha256_of(p) for p in sorted((done / "policy").iterdir())}
    return lines, files, json.loads((done / "manifest.json").read_text())["results"]


@pytest.mark.slow
def test_a_stage_that_was_killed_twice_ends_bit_for_bit_as_if_it_had_not_been(tmp_path):
    lab = begun(tmp_path / "here")
    alone = shutil.copytree(lab, tmp_path / "alone")
    whole = start(alone)
    assert whole.wait() == 0, whole.output()
    steps = len(left(alone)[0])
    for number, goal in enumerate((2, steps - 2)):
        killed = start(lab)
        assert killed.kill_when((lab / f"runs/tiny/sft/checkpoints/step-{goal:07d}").exists)
        assert ("sft: going on after step" in killed.output()) == bool(number)
        assert not (lab / "runs/tiny/sft/manifest.json").exists()
    last = start(lab)
    assert last.wait() == 0, last.output()
    assert f"sft: going on after step {steps - 2}" in last.output()
    assert left(lab) == left(alone)
    assert not (lab / "runs/tiny/sft/checkpoints").exists()


SFT = (
    "sft.batch_size=38",  # all demonstrations, so that no batch is padded
    "sft.epochs=3",
    "sft.warmup_ratio=0",
    "sft.learning_rate=1e-2",
    "sft.max_grad_norm=0.3",
    "sft.tokens_per_micro_batch=380",
)


@pytest.fixture(scope="module")
def alone(road, tmp_path_factory):
    """One process, this one."""
    folder = copy_of(road, tmp_path_factory.mktemp("alone") / "run", "comparisons")
    return alone_in(folder, sft.main, *SFT)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_learn_what_one_process_learns(zero, alone, road, tmp_path):
    assert min(row["sft/grad_norm"] for row in curve(alone, "sft")) > 0.3  # the clip is at work
    here = copy_of(road, tmp_path / "here", "comparisons")
    start = Launched if zero == 2 else Forked  # once under the real launcher
    finish(here, "sft", *SFT, f"distributed.zero_stage={zero}", start=start)
    assert_close(here, alone, "sft", "policy")
    mine, expected = (
        json.loads((folder / "runs/tiny/sft" / MANIFEST).read_text())["results"] for folder in (here, alone)
    )
    assert (mine["processes"], expected["processes"]) == (2, 1)
    for name in ("held_out_loss_before", "held_out_loss"):
        assert mine[name]["mean"] == pytest.approx(expected[name]["mean"], abs=1e-5)
