"""The distill stage interrupted: killed anywhere or asked to stop, it ends bit for bit as if left alone."""

import gc
import os
import signal

import pytest
import torch
from tiny_distill import results, run, steps, write_lab

from policy.distillation import held_out, teacher
from policy.distillation import trainer as distill_train
from policy.distillation.student import Student
from policy.distillation.teacher_cache import TeacherCache
from policy.distillation.trainer import DistillTrainer
from rlhf.errors import UserError
from rlhf.runs.artifacts import sha256_of


@pytest.fixture
def lab(inside):
    """A folder with all that the stage reads."""
    write_lab(inside)
    return inside


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
    folder, kept = tmp_path_factory.mktemp("wholes"), {}
    write_lab(folder)

    def of(method):
        if method not in kept:
            before = os.getcwd()
            os.chdir(folder)
            try:
                kept[method] = folder / run(name=method, method=method, learning_rate=RATES[method])
            finally:
                os.chdir(before)
        return kept[method]

    return of


@pytest.mark.parametrize(
    ("method", "where", "name", "number"),
    [
        ("lora", TeacherCache, "write", 3),
        ("lora", held_out, "measure", 1),
        ("lora", DistillTrainer, "_step", 4),
        ("lora", DistillTrainer, "_checkpoint", 3),
        ("lora", Student, "export", 1),
        ("full", DistillTrainer, "_step", 6),
    ],
)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    method, where, name, number, lab, wholes, monkeypatch
):
    rate, whole = RATES[method], wholes(method)
    with monkeypatch.context() as patch:
        dies_at(patch, where, name, number)
        with pytest.raises(Killed):
            run(method=method, learning_rate=rate)
    gc.collect()
    said = []
    with monkeypatch.context() as patch:
        real = teacher.shard_records
        patch.setattr(teacher, "shard_records", lambda *a: (said.append(1), real(*a))[1])
        folder = run(method=method, learning_rate=rate)
    assert len(said) == (1 if where is TeacherCache else 0)
    same(folder, whole)


def test_a_polite_stop_saves_and_the_same_command_goes_on(lab, monkeypatch, capsys):
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
    assert caught.value.code == 0
    del caught  # with it goes the lock
    gc.collect()
    assert "distill: asked to stop (SIGTERM); saved after step 3 of" in capsys.readouterr().out
    folder = run(checkpoint_every=50)  # how often it saves may change on the way
    assert "distill: going on after step 3 of" in capsys.readouterr().out
    same(folder, whole)


def test_a_stop_while_the_teacher_speaks_keeps_its_words(lab, monkeypatch, capsys):
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


def test_a_loss_that_is_not_finite_ends_the_run(lab, monkeypatch):
    monkeypatch.setattr(distill_train, "distil_kl", lambda hidden, *_, **__: hidden.sum(-1) * torch.nan)
    with pytest.raises(
        UserError, match=r"not finite in step 1: lower distill\.learning_rate, which is 0\.01"
    ):
        run()
