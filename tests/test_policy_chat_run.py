"""Talking to the tiny run: what its models say, their scores, what is saved, Ctrl-C, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PROMPTS, ROOT, TINY, tiny_recipe

from policy.chat import __main__ as command
from policy.chat.terminal import Interrupts
from rlhf.data.comparisons import Message
from rlhf.data.readers import read_comparisons
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.rank.store import Store


def start(road, tmp_path, *overrides, **options):
    """The program in a folder that holds the finished run."""
    if not (tmp_path / "runs").exists():
        os.symlink(road / "models", tmp_path / "models")
        (tmp_path / "runs/tiny").mkdir(parents=True)
        for made in (road / "runs/tiny").iterdir():
            os.symlink(made, tmp_path / "runs/tiny" / made.name)
    return subprocess.Popen(
        [sys.executable, "-m", "policy.chat", str(TINY), *PROMPTS, *overrides],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_a_piped_conversation_with_the_tiny_run(road, tmp_path):
    talked = (
        "The movie was\n\n/again\n2\nThe food was\n/seed 3\n1\n"
        + "=\n/again\n=\n"
        + "x" * 5000
        + "\n/system y\n"
    )
    process = start(road, tmp_path, f"chat.models=[base, ppo, {road}/runs/tiny/ppo/policy]")
    out, err = process.communicate(talked, timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.count("[1] base: ") == out.count("[2] ppo: ") == 5
    assert out.count("(score ") == 15
    assert "tensors of runs/tiny/reward/model" in out
    assert re.search(r"not asked: the prompt has 500\d tokens, and the model reads \d+ before", out)
    assert out.splitlines()[-1] == "comparisons saved: 3"
    assert not any(c in out for c in "\x1b\x07\r")
    file = tmp_path / "runs/tiny/rank/comparisons.jsonl"
    kept, counts = read_comparisons([str(file)], on_bad_rows="stop")
    assert [(c.prompt[0].content, c.ranks, c.source) for c in kept] == [
        ("The movie was", (1, 0), "chat"),
        ("The food was", (0, 1), "chat"),
    ]
    assert (counts.read, counts.kept, counts.unused) == (3, 2, {})  # a tie of all stops no training
    rows = Store(file).rows()
    assert {(row["annotator"], *row["writers"][:2]) for row in rows} == {("chat", "base", "ppo")}
    assert len({row["item"] for row in rows}) == 3
    # the same adapter says the same under the same random numbers
    assert all(one == two != base for base, one, two in (row["responses"] for row in rows))


def test_a_score_and_a_text_are_those_that_each_model_gives_alone(road, monkeypatch):
    from policy.chat.models import RunModels
    from policy.ppo.setup import load_scorer
    from rlhf.generation import sampling
    from rlhf.models.masks import right_pad

    monkeypatch.chdir(road)
    recipe = tiny_recipe("chat.temperature=0.7")
    models = RunModels(recipe, command.places_of(recipe), Interrupts())
    prompt = (Message("user", "The movie was"),)
    dialogue = models.dialogue
    alone = Backbone(load_base(recipe.model), recipe.lora, adapters=["policy", "reward"], heads=["reward"])
    alone.load_adapter("policy", road / "runs/tiny/ppo/policy")
    load_scorer(alone, "reward", road / "runs/tiny/reward/model")
    pieces = []
    for model, role in enumerate(("reference", "policy")):
        found = models.answer(model, prompt, seed=3, turn=2, sample=1, say=pieces.append)
        uniform = sampling.uniforms(3, "chat", 2, [1], dialogue.max_response_tokens)
        drawn = sampling.sample(
            alone, role, [dialogue.encode_prompt(prompt)], uniform,
            eos_id=dialogue.end_ids, pad_id=dialogue.pad_id, temperature=0.7,
        )  # fmt: skip
        ids = drawn.response_ids_BR[0].tolist()
        assert found.text == dialogue.decode(ids)
        whole = dialogue.close(dialogue.encode_prompt(prompt), ids[: found.tokens])
        with torch.no_grad():
            assert found.score == pytest.approx(
                float(alone("reward", *right_pad([whole], dialogue.pad_id))), abs=1e-5
            )
        assert "".join(pieces).endswith(found.text)
    assert len(pieces) > 4  # token by token


@pytest.mark.slow
def test_without_a_reward_model_there_are_no_scores(road, tmp_path):
    process = start(road, tmp_path, "chat.models=[base]")
    (tmp_path / "runs/tiny/reward").unlink()
    out, err = process.communicate("hello\n", timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "no scores: runs/tiny/reward is not complete (`make reward RECIPE=...`)" in out
    assert "[1] base: " in out
    assert "score " not in out


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(road, tmp_path):
    process = start(road, tmp_path, "chat.models=[base]", "chat.max_tokens=400", "chat.temperature=3")
    assert process.stdin
    process.stdin.write("hello\n")
    process.stdin.flush()
    while process.stdout.read(1) not in ("[", ""):  # the answer begins
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("/quit\n", timeout=120)
    assert (process.returncode, err) == (0, "")
    assert int(re.search(r"(\d+) tokens?, stopped\)", out)[1]) < 400
    assert "comparisons saved: 0" in out


# --- bad input -------------------------------------------------------------------------------------------


def refused(road, tmp_path, *overrides):
    began = time.monotonic()
    process = start(road, tmp_path, *overrides)
    out, err = process.communicate("", timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "Traceback" not in err
    return err, time.monotonic() - began


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("chat.models=[dpo]", "chat.models: runs/tiny/dpo is not complete: run `make dpo RECIPE=...`"),
        ("chat.models=[nothing/here]", "name the folder of a saved adapter, or base or ppo"),
        ("chat.models=[base, base]", "a model stands twice; name each once"),
        ("chat.model=[base]", "did you mean"),
        ("chat.temperature=-1", "chat.temperature"),
        ("chat.max_tokens=0", "chat.max_tokens"),
        ("name=other", "chat: runs/other has no policy yet: run `make ppo RECIPE=...`"),
    ],
)
def test_a_mistake_is_one_line_before_torch_is_loaded(override, said, road, tmp_path):
    err, seconds = refused(road, tmp_path, override)
    assert said in err
    assert seconds < 5


def test_an_adapter_of_other_settings_or_a_damaged_one_is_refused(road, tmp_path):
    err, _ = refused(road, tmp_path, "lora.rank=8")
    assert "lora.rank 4 there, 8 here" in err
    folder = tmp_path / "runs/tiny/ppo"
    copied = tmp_path / "ppo"
    subprocess.run(["cp", "-r", f"{folder}/", copied], check=True)
    folder.unlink()
    copied.rename(folder)
    with (folder / "policy/adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    err, _ = refused(road, tmp_path)
    assert "is damaged" in err


@pytest.mark.slow
def test_an_answer_longer_than_the_window_is_refused(road, tmp_path):
    process = start(road, tmp_path, "chat.max_tokens=100000")
    _, err = process.communicate("", timeout=60)
    assert process.returncode == 2
    assert "chat.max_tokens: 100000 leave nothing of the" in err


def test_the_section_of_the_recipe_decides_what_is_said(road, monkeypatch):
    from policy.chat.models import RunModels

    monkeypatch.chdir(road)

    def said(*overrides, seed=0):
        recipe = tiny_recipe(*overrides)
        models = RunModels(recipe, command.places_of(recipe), Interrupts())
        prompt = (Message("user", "The movie was"),)
        return [models.answer(n, prompt, seed=seed, turn=0, sample=0, say=str) for n in range(2)]

    first = said()
    assert said() == first
    assert said("chat.temperature=0") != first
    assert {a.tokens for a in said("chat.max_tokens=3")} == {3}
    assert said("chat.models=[ppo, base]") == first[::-1]
    assert said(seed=1) != first
    assert json.dumps(tiny_recipe("chat.seed=4").chat.seed) == "4"
