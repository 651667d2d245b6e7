"""What a user can get wrong, through the real stages: status 2, one line, nothing that looks finished."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROMPTS, ROOT, TINY, one_of, stage

from policy.evaluate import __main__ as evaluate
from policy.ppo import __main__ as train
from reward.training import __main__ as reward_train
from rlhf.collect import __main__ as collect
from rlhf.errors import exit_on_user_error
from rlhf.models import prepare

OPENING = {".lock", "recipe.yaml", "fingerprint.json"}  # what a stage writes before it has done anything


def row(n, **changes):
    return {"prompt": f"question {n}", "responses": ["a", "b"], "ranks": [0, 1], "source": "me"} | changes


@pytest.fixture
def lab(road, inside):
    """A folder with the tiny model, and what the stages before PPO have made of it."""
    shutil.copytree(road / "models", inside / "models")
    for name in ("comparisons", "reward"):
        shutil.copytree(road / "runs" / "tiny" / name, inside / "runs" / "tiny" / name)
    return inside


@pytest.fixture
def fresh(road, inside):
    """A folder with the tiny model only."""
    shutil.copytree(road / "models", inside / "models")
    return inside


@pytest.fixture
def refused(capsys):
    """Run a stage that has to refuse; returns its one line."""

    def run(main, *overrides):
        capsys.readouterr()
        status = 0
        try:
            stage(lambda: exit_on_user_error(main), *overrides)
        except SystemExit as exit_:
            status = exit_.code
        gc.collect()  # a process that ends gives its lock back
        assert status == 2
        written = capsys.readouterr().err
        assert "Traceback" not in written
        (line,) = [line for line in written.splitlines() if line.startswith("error: ")]
        assert written.endswith(line + "\n")  # before it there may be progress bars
        return line.removeprefix("error: ")

    return run


def made(name):
    """Files of a stage's folder."""
    return {p.name for p in Path("runs/tiny", name).rglob("*")}


def data(folder, *rows):
    file = folder / "c.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return f"data.comparisons={file}"


def results(name):
    return json.loads(Path(f"runs/tiny/{name}/manifest.json").read_text())["results"]


# --- comparisons -----------------------------------------------------------------------------------------

BAD_ROWS = {  # one of a file and one of a row; tests/test_rlhf_data_rows.py has all kinds
    "malformed": ('{"prompt": "q", ', "not valid JSON"),
    "one response": (row(9, responses=["a"], ranks=[0]), "fewer than 2 responses"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_comparison_stops_with_its_line_or_is_skipped_and_counted(fresh, refused, capsys, kind):
    bad, reason = BAD_ROWS[kind]
    spec = data(fresh, *map(row, range(4)), bad, *map(row, range(4, 8)))
    line = refused(collect.main, spec)
    assert line.startswith(f"{fresh}/c.jsonl:5: {reason}")
    assert "set data.on_bad_rows=skip" in line
    assert made("comparisons") == OPENING
    stage(collect.main, spec, "data.on_bad_rows=skip")  # as the message advises, with the same name
    counts = results("comparisons")["counts"]["comparisons"]
    assert (counts["read"], counts["kept"], sum(counts["dropped"].values())) == (9, 8, 1)
    assert reason in next(iter(counts["dropped"])) or next(iter(counts["dropped"])) in reason
    assert "dropped 1" in capsys.readouterr().out


def test_a_long_prompt_stops_the_run_with_the_remedies(fresh, refused):
    spec = data(fresh, *map(row, range(8)), row(8, prompt="word " * 40))
    line = refused(collect.main, spec)
    assert "dialogue.max_prompt_tokens is 96" in line
    assert "the prompt has 200 tokens" in line  # the tiny tokenizer has one token a byte
    assert "dialogue.on_long_prompts=skip or truncate" in line
    assert made("comparisons") == OPENING


def test_a_long_prompt_is_skipped_and_counted(fresh):
    spec = data(fresh, *map(row, range(8)), row(8, prompt="word " * 40))
    stage(collect.main, spec, "dialogue.on_long_prompts=skip")
    counts = results("comparisons")["counts"]["comparisons"]
    assert counts["kept"] == 8
    assert counts["dropped"] == {"prompt longer than dialogue.max_prompt_tokens": 1}


def test_a_long_prompt_loses_its_beginning(fresh):
    from conftest import tiny_recipe

    from rlhf.data.comparisons import Message
    from rlhf.tokenization.dialogue import load_dialogue

    spec = data(fresh, *map(row, range(8)), row(8, prompt="first " + "word " * 40 + "last"))
    stage(collect.main, spec, "dialogue.on_long_prompts=truncate")
    assert results("comparisons")["counts"]["comparisons"]["kept"] == 9
    dialogue = load_dialogue(tiny_recipe("dialogue.on_long_prompts=truncate"))
    ids = dialogue.encode_prompt([Message("user", "first " + "word " * 40 + "last")])
    assert dialogue.tokenizer.decode(ids) == ("first " + "word " * 40 + "last")[-96:]


def test_data_of_which_nothing_is_left_is_refused_with_the_counts(fresh, refused):
    short = "dialogue.max_prompt_tokens=4"
    line = refused(collect.main, data(fresh, *map(row, range(8))), short, "dialogue.on_long_prompts=skip")
    assert line.startswith("data.prompts: nothing usable in ")
    assert "900 prompt longer than dialogue.max_prompt_tokens" in line
    none = ("data.prompts=[]", "data.held_out_prompts=[]", short, "dialogue.on_long_prompts=skip")
    line = refused(collect.main, data(fresh, *map(row, range(8))), *none)
    assert line.startswith("data.comparisons: nothing usable in ")
    assert "8 prompt longer than dialogue.max_prompt_tokens" in line
    assert made("comparisons") == OPENING


def test_prompts_to_evaluate_on_that_were_trained_on_are_refused(fresh, refused):
    same = PROMPTS[0].replace("data.", "data.held_out_")
    line = refused(collect.main, data(fresh, *map(row, range(8))), PROMPTS[0], same)
    assert line.startswith("data.held_out_prompts: every one is also a training prompt")


# --- the model -------------------------------------------------------------------------------------------


def other_model(folder, change):
    """A copy of the tiny model whose tokenizer is changed."""
    from rlhf.tokenization.dialogue import load_tokenizer

    shutil.copytree(folder / "models" / "tiny", folder / "models" / "other")
    tokenizer = load_tokenizer(folder / "models" / "tiny")
    change(tokenizer)
    for file in (folder / "models" / "other").glob("*t*ken*"):
        file.unlink()
    (folder / "models" / "other" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(str(folder / "models" / "other"))
    return "model.path=models/other"


def test_a_tokenizer_without_eos_is_refused(fresh, refused):
    path = other_model(fresh, lambda tokenizer: setattr(tokenizer, "eos_token", None))
    line = refused(collect.main, path)
    assert "the tokenizer of models/other has no EOS token" in line
    assert made("comparisons") == OPENING


def test_a_tokenizer_without_a_chat_template_is_refused_unless_the_text_is_plain(fresh, refused):
    path = other_model(fresh, lambda tokenizer: setattr(tokenizer, "chat_template", None))
    spec = data(fresh, *map(row, range(8)))
    line = refused(collect.main, path, spec, "dialogue.template=chat")
    assert "the tokenizer of models/other has no chat template; set dialogue.template=plain" in line
    stage(collect.main, path, spec, "dialogue.template=plain")
    assert results("comparisons")["train"] > 0


def test_a_chat_template_that_refuses_a_prompt_is_told_in_one_line(fresh, refused):
    template = "{{ raise_exception('System role not supported') }}"
    path = other_model(fresh, lambda tokenizer: setattr(tokenizer, "chat_template", template))
    line = refused(collect.main, path, "dialogue.template=chat")
    assert "the chat template of models/other refuses the turns (System role not supported)" in line


def test_a_row_that_the_chat_template_refuses_is_named_or_counted(fresh, refused):
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    path = other_model(fresh, lambda t: setattr(t, "chat_template", refuses + t.chat_template))
    system = {"role": "system", "content": "Be brief."}
    turns = row(5, prompt=[system, {"role": "user", "content": "Why?"}])
    spec = data(fresh, *map(row, range(5)), turns, *map(row, range(6, 9)))
    given = (path, spec, "dialogue.template=chat", "data.prompts=[]", "data.held_out_prompts=[]")
    line = refused(collect.main, *given)
    assert ".jsonl:6: the chat template of models/other refuses the turns (System role not supported)" in line
    stage(collect.main, *given, "data.on_bad_rows=skip")
    dropped = results("comparisons")["counts"]["comparisons"]["dropped"]
    assert dropped == {"the chat template of models/other refuses the turns (System role not supported)": 1}


def test_a_model_that_was_not_made_names_the_target_without_asking_the_hub(inside, refused, monkeypatch):
    import socket

    def no_network(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert refused(collect.main) == (
        "model.path: models/tiny is not there; run `make model RECIPE=...` first"
    )


def test_a_folder_that_is_no_model_of_ours_is_left_alone(inside, refused):
    (inside / "models" / "tiny").mkdir(parents=True)
    (inside / "models" / "tiny" / "mine.txt").write_text("x")
    assert "was not made by `make model`" in refused(prepare.main)
    assert [p.name for p in (inside / "models").rglob("*")] == ["tiny", "mine.txt"]


def test_a_damaged_model_is_noticed(fresh, refused):
    file = fresh / "models" / "tiny" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors is damaged" in refused(prepare.main)


# --- parents and sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reward", "ppo", "evaluate"])
def test_a_stage_before_its_time_ends_with_status_2_and_one_line(inside, name):
    module = {"reward": "reward.training", "ppo": "policy.ppo", "evaluate": "policy.evaluate"}[name]
    done = subprocess.run(
        [sys.executable, "-m", module, str(TINY), *PROMPTS],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {name} needs the comparisons stage")
    assert "run `make comparisons RECIPE=...` with the same recipe first" in done.stderr
    assert list(inside.iterdir()) == []


def test_ppo_needs_the_reward_stage_and_evaluate_the_ppo_stage(lab, refused):
    assert "evaluate needs the ppo stage" in refused(evaluate.main)
    shutil.rmtree(lab / "runs" / "tiny" / "reward")
    assert "`make reward RECIPE=...`" in refused(train.main)
    assert made("ppo") == made("evaluate") == set()


@pytest.mark.parametrize(
    ("main", "key"),
    [(reward_train.main, "reward.batch_size"), (train.main, "ppo.batch_size / ppo.minibatches")],
)
def test_batches_that_do_not_divide_over_the_processes_are_refused(lab, refused, monkeypatch, main, key):
    for name, value in one_of(3).items():
        monkeypatch.setenv(name, value)
    line = refused(main)
    assert line.startswith(f"{key} = 8 does not divide over 3 processes")
    assert line.endswith("for example 9")
    assert made("ppo") == set()


def test_more_processes_than_rows_are_refused_before_the_base_is_loaded(lab, refused, monkeypatch):
    shutil.rmtree(lab / "runs" / "tiny" / "reward")
    for name, value in one_of(64).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("reward.model.model.load_base", None)
    line = refused(reward_train.main, "reward.batch_size=64", "ppo.batch_size=128")
    assert line == "reward: 64 processes and only 38 rows to train on: use PROCS=38 or more data"


# --- a reward model that does not fit --------------------------------------------------------------------


def other_reward(folder, **card):
    """A copy of the run's reward model with another card."""
    shutil.copytree(folder / "runs" / "tiny" / "reward" / "model", folder / "mine")
    file = folder / "mine" / "reward_model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | card))
    return "ppo.reward_model=mine"


SHORT = ("ppo.steps=1", "ppo.epochs=1")


def test_a_reward_model_of_another_base_needs_retokenize_and_works_with_it(lab, refused):
    from rlhf.models.tiny import write_tiny_model

    write_tiny_model(lab / "models" / "other", seed=1)
    mine = other_reward(lab, base="models/other")
    line = refused(train.main, mine, *SHORT)
    assert "mine does not fit (its base is models/other, this recipe's is models/tiny)" in line
    assert "set ppo.retokenize=true" in line
    assert made("ppo") == OPENING
    stage(train.main, mine, *SHORT, "ppo.retokenize=true")
    assert results("ppo")["steps"] == 1


def test_a_reward_model_of_another_tokenizer_needs_retokenize(lab, refused):
    line = refused(train.main, other_reward(lab, contract="0" * 64), *SHORT)
    assert "mine does not fit (its tokenizer or template differs from this recipe's)" in line
    assert made("ppo") == OPENING


def test_a_folder_without_a_reward_model_is_refused(lab, refused):
    (lab / "mine").mkdir()
    assert "mine holds no reward model (reward_model.json is missing)" in refused(
        train.main, "ppo.reward_model=mine", *SHORT
    )


# --- a reward model that starts from another -------------------------------------------------------------


@pytest.fixture
def trained(lab):
    """The run's reward model moved out of the run, whose reward stage is to be done again."""
    shutil.move(lab / "runs" / "tiny" / "reward" / "model", lab / "mine")
    shutil.rmtree(lab / "runs" / "tiny" / "reward")
    return lab / "mine"


def test_a_start_without_an_adapter_is_refused_and_the_mended_recipe_is_not(trained, refused, capsys):
    Path("mien").mkdir()
    line = refused(reward_train.main, "reward.start=mien")
    assert line.startswith("reward.start: mien/adapter_model.safetensors is not there; name the folder")
    assert made("reward") == OPENING  # not even the probe, which another recipe could not use
    stage(reward_train.main, "reward.start=mine", "reward.probe=false")
    assert "reward: starts from mine" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["shape", "missing", "alpha"])
def test_a_start_that_does_not_fit_is_refused(trained, refused, change):
    from safetensors.torch import load_file, save_file

    file, config = trained / "adapter_model.safetensors", trained / "adapter_config.json"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    if change == "alpha":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 32}))
    else:
        more = {name: tensors[name][:2].clone()} if change == "shape" else {}
        save_file({n: t for n, t in tensors.items() if n != name} | more, file)
    line = refused(reward_train.main, "reward.start=mine")
    assert line.startswith("reward.start: mine/adapter_model.safetensors does not fit this recipe")
    assert line.endswith("it was made with other lora settings or another base, or other layers of it")
    assert made("reward") == OPENING


def test_a_token_behind_eos_that_the_tokenizer_does_not_have_is_refused(fresh, refused):
    line = refused(collect.main, "dialogue.end_of_context='<|nothing|>'")
    assert line.startswith("dialogue.end_of_context: '<|nothing|>' is not in the tokenizer; name another")
    assert made("comparisons") == OPENING


# --- a full disk -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_fills_up_while_ppo_saves_costs_nothing_but_the_steps_since(
    lab, road, refused, monkeypatch, capsys
):
    first = lab / "runs" / "tiny" / "ppo" / "checkpoints" / "step-0000002"
    real = os.fsync

    def fsync(descriptor):
        if (first.parent / ".staging-0000004" / "policy").exists():  # in the middle of the second one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        line = refused(train.main)
    assert line.startswith("the disk is full")
    assert "the last complete checkpoint is untouched" in line
    assert [p.name for p in first.parent.iterdir()] == ["step-0000002"]
    assert "manifest.json" not in {p.name for p in first.parents[1].iterdir()}
    capsys.readouterr()
    stage(train.main)
    assert "ppo: going on after step 2 of 6" in capsys.readouterr().out
    for adapter in ("policy", "value"):
        weights = f"runs/tiny/ppo/{adapter}/adapter_model.safetensors"
        assert (lab / weights).read_bytes() == (road / weights).read_bytes(), "as if nothing had happened"
