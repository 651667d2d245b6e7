"""The distill stage killed, stopped, and shared by two processes: it ends as one process left alone does.

After an interruption it ends bit for bit as if there had been none, whatever ZeRO shards.
"""

import gc
import json
import os
import signal

import numpy as np
import pytest
import torch
from ranks import finish, interrupt
from test_deepspeed import alone_in, assert_close
from tiny_distill import overrides, results, run, steps, write_lab

import policy.distillation.run
from policy.distillation import __main__ as distill
from policy.distillation import evaluation
from policy.distillation import trainer as distill_train
from policy.distillation.student import Student
from policy.distillation.teacher_cache import TeacherCache
from policy.distillation.trainer import DistillTrainer
from rlhf.errors import UserError
from rlhf.runs.artifacts import MANIFEST, sha256_of


def same(folder, other):
    assert steps(folder) == steps(other)
    assert results(folder) == results(other)
    for file in sorted(other.rglob("*")):
        if file.suffix in (".safetensors", ".npy"):
            assert sha256_of(folder / file.relative_to(other)) == sha256_of(file), file


RATES = {"lora": 1e-2, "full": 1e-3}


class Killed(BaseException):
    """What a kill is to the code: an end at any place."""


def dies_at(monkeypatch, where, name, number):
    """Let the n-th call of a method be the last thing that happens."""
    calls, real = [], getattr(where, name)

    def dying(*args, **options):
        calls.append(args)
        if len(calls) == number:
            raise Killed
        return real(*args, **options)

    monkeypatch.setattr(where, name, dying)
    return calls


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The folder of a run that was left alone, by method."""
    folder, kept = write_lab(tmp_path_factory.mktemp("wholes")), {}

    def of(method):
        if method not in kept:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                kept[method] = folder / run(name=method, method=method, learning_rate=RATES[method])
        return kept[method]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "where", "name", "number"),
    [
        ("lora", TeacherCache, "write", 3),
        ("lora", evaluation, "kl_and_log_probs", 1),
        ("lora", DistillTrainer, "_step", 4),
        ("lora", DistillTrainer, "_checkpoint", 3),
        ("lora", Student, "export", 1),
        ("full", DistillTrainer, "_step", 6),
    ],
)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    method, where, name, number, distill_lab, wholes, monkeypatch
):
    rate, whole = RATES[method], wholes(method)
    with monkeypatch.context() as patch:
        dies_at(patch, where, name, number)
        with pytest.raises(Killed):
            run(method=method, learning_rate=rate)
    gc.collect()
    said = []
    with monkeypatch.context() as patch:
        real = policy.distillation.run.shard_records
        patch.setattr(policy.distillation.run, "shard_records", lambda *a: (said.append(1), real(*a))[1])
        folder = run(method=method, learning_rate=rate)
    assert len(said) == (1 if where is TeacherCache else 0)
    same(folder, whole)


def test_a_polite_stop_saves_and_the_same_command_goes_on(distill_lab, monkeypatch, capsys):
    whole = run(name="whole", checkpoint_every=100)
    with monkeypatch.context() as patch:
        real = DistillTrainer._step

        def asked(self, step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, step)

        patch.setattr(DistillTrainer, "_step", asked)
        with pytest.raises(SystemExit) as caught:
            run(checkpoint_every=100)
    assert caught.value.code == 128 + signal.SIGTERM
    del caught  # with it goes the lock
    gc.collect()
    assert "distill: asked to stop (SIGTERM); saved after step 3 of" in capsys.readouterr().out
    folder = run(checkpoint_every=50)  # how often it saves may change on the way
    assert "distill: going on after step 3 of" in capsys.readouterr().out
    same(folder, whole)


def test_a_stop_while_the_teacher_speaks_keeps_its_words(distill_lab, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        real = TeacherCache.write

        def asked(self, number, records):
            real(self, number, records)
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(TeacherCache, "write", asked)
        with pytest.raises(SystemExit):
            run()
    gc.collect()
    run()
    assert "(2 of 3 were there)" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(distill_lab, monkeypatch):
    monkeypatch.setattr(distill_train, "distill_kl", lambda hidden, *_, **__: hidden.sum(-1) * torch.nan)
    with pytest.raises(
        UserError, match=r"not finite in step 1: lower distill\.learning_rate, which is 0\.01"
    ):
        run()


# ---- two processes

SECTION = {
    "batch_size": 5,  # uneven over two processes; the last batch of a pass has one sequence
    "tokens_per_micro_batch": 60,  # some processes have more micro-batches than others
    "max_grad_norm": 0.05,
    "shard_sequences": 7,
    "learning_rate": 1e-3,
}


def lab_in(folder):
    folder.mkdir()
    return write_lab(folder)


def changed(folder, **changes):
    files = {name: str(folder / f"{name}.jsonl") for name in ("texts", "questions")}
    return overrides(**SECTION | files | changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of one process, this one, by method and layers."""
    kept = {}

    def of(method, layers):
        if (method, layers) not in kept:
            folder = lab_in(tmp_path_factory.mktemp("alone") / "run")
            options = changed(folder, method=method, lora__layers=layers)
            kept[method, layers] = alone_in(folder, distill.main, *options)
        return kept[method, layers]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "method", "layers"),
    [(0, "lora", "top_2"), (2, "full", "all"), (3, "lora", "top_2")],
)
def test_two_processes_learn_what_one_process_learns(zero, method, layers, alone, tmp_path):
    here, whole = lab_in(tmp_path / "here"), alone(method, layers)
    options = changed(
        here, method=method, trunk_gigabytes=3, lora__layers=layers, distributed__zero_stage=zero
    )
    done = here / "runs" / "tiny" / "distill"
    # every curve holds a resume
    interrupt(here, "distill", lambda: list(done.glob("checkpoints/step-*")), done / MANIFEST, *options)
    said = finish(here, "distill", *options)
    assert said.count("distill: held out: KL(teacher || student)") == 1
    assert said.count("distill.trunk_gigabytes has no effect: ZeRO 3") == (zero == 3)
    assert_close(here, whole, "distill", *(() if method == "full" else ("policy",)))
    mine, expected = (results(folder / "runs/tiny/distill") for folder in (here, whole))
    assert (mine["processes"], expected["processes"]) == (2, 1)
    for name in ("kl_before", "kl_after", "full_kl_before", "full_kl_after", "kl_recovered"):
        assert mine["held_out"][name]["mean"] == pytest.approx(expected["held_out"][name]["mean"], abs=1e-5)
    assert mine["held_out"]["tokens"] == expected["held_out"]["tokens"]
    assert mine["teacher"] == expected["teacher"]
    for file in sorted((whole / "runs/tiny/distill/teacher").glob("*.npy")):
        words, wanted = np.load(done / "teacher" / file.name), np.load(file)
        assert words["index"].tolist() == wanted["index"].tolist()
        assert np.allclose(words["log_prob"], wanted["log_prob"], atol=1e-5)
    index = json.loads((done / "teacher" / "index.json").read_text())
    assert index["shards"] == {p.name: sha256_of(p) for p in (done / "teacher").glob("*.npy")}
