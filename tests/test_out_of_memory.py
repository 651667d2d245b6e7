"""A device without room ends a stage in one line that says what to change, and nothing is lost."""

import gc
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import stage
from safetensors.torch import load_file

from policy.ppo.checks import GuardedScore
from reward.training import __main__ as reward
from rlhf.errors import LESS_MEMORY, exit_on_user_error, out_of_memory
from rlhf.evals.scoring import Scorer
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.models.packing import compare_packing
from rlhf.models.tiny import tiny_model
from rlhf.recipe.schema import Lora, Model

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 12.31 "
    "MiB is free. Including non-PyTorch memory, this process has 79.13 GiB memory in use. Of the allocated "
    "memory 77.90 GiB is allocated by PyTorch, and 650.00 MiB is reserved by PyTorch but unallocated."
)  # torch's own words, of which no GPU is needed to raise them


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA), " for 2.00 GiB on GPU 0 (79.15 GiB, 12.31 MiB free); "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "; "),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "; "),
        (MemoryError("Unable to allocate 3.64 TiB for an array"), " for 3.64 TiB; "),
    ],
)
def test_it_is_known_by_torchs_words(error, said):
    LESS_MEMORY.set("advice")
    assert out_of_memory(error) == f"out of memory: no room{said}advice"


def test_a_cpu_without_room_says_so_in_these_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_other_errors_are_not_about_memory():
    assert out_of_memory(RuntimeError("Tried to allocate nothing")) is None
    assert out_of_memory(ValueError("out of memory")) is None


def full(*_, **__):
    raise torch.OutOfMemoryError(CUDA)


@torch.no_grad()
def test_it_is_never_taken_for_a_fault_of_the_model_or_of_the_reward_function(tmp_path, monkeypatch):
    """What is tried on a few rows first, and what calls the user's own function, lets it through."""
    folder = tmp_path / "tiny"
    tiny_model(259).save_pretrained(folder)
    base = load_base(Model(path=str(folder)))
    backbone = Backbone(base, Lora(rank=2, alpha=4, layers="top_1"), adapters=["policy"])
    scoring = Scorer(base, 512)
    decode, calls = backbone._decode, []

    def full_later(*args, **options):
        calls.append(1)
        return decode(*args, **options) if len(calls) == 1 else full()

    monkeypatch.setattr(backbone, "_decode", full_later)
    monkeypatch.setattr(scoring, "_score", full)
    responses = SimpleNamespace(texts=["a"], ids_BT=torch.zeros(1, 1))
    for what in (
        lambda: GuardedScore(full, 1)(responses),
        lambda: compare_packing(full, base),
        backbone.check_architecture,
        scoring._probe,
    ):
        with pytest.raises(torch.OutOfMemoryError):
            what()


def test_a_stage_goes_on_where_it_was(road, inside, monkeypatch, capsys):
    """A GPU is full in the third step; gradient checkpointing changes no bit, so the result is the road's."""
    from reward.training.trainer import PreferenceTrainer

    shutil.copytree(road / "models", inside / "models")
    shutil.copytree(road / "runs/tiny/comparisons", inside / "runs/tiny/comparisons")
    step, calls = PreferenceTrainer.training_step, []

    def full(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError(CUDA)
        return step(self, *args, **options)

    monkeypatch.setattr(PreferenceTrainer, "training_step", full)
    with pytest.raises(SystemExit) as caught:
        stage(lambda: exit_on_user_error(reward.main))
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: out of memory: no room for 2.00 GiB on GPU 0 (79.15 GiB, 12.31 MiB free); lower "
        "reward.tokens_per_micro_batch (400 now), or set model.gradient_checkpointing=true; reward then goes "
        "on from its last checkpoint"
    )
    del caught
    gc.collect()  # a process that ends gives its lock back
    stage(reward.main, "model.gradient_checkpointing=true")
    assert "reward: going on after step 2 of" in capsys.readouterr().out
    file = Path("runs/tiny/reward/model/adapter_model.safetensors")
    found, expected = load_file(inside / file), load_file(road / file)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
