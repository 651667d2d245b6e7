"""Kernels asked for by name: what cannot be is told before loading; stand-ins where there is no GPU."""

import pytest
import torch

from rlhf.errors import UserError
from rlhf.models.base import load_base, load_in_float32
from rlhf.models.tiny import tiny_model
from rlhf.recipe.schema import Model

VOCABULARY = 259


@torch.no_grad()
def test_attention_is_computed_as_the_recipe_says_and_gives_the_same(tmp_path):
    tiny_model(VOCABULARY).save_pretrained(tmp_path)
    found = {}
    for kind in ("auto", "eager"):
        base = load_base(Model(path=str(tmp_path), attn_implementation=kind))
        found[base.config._attn_implementation] = base(torch.tensor([[7, 8, 9, 10, 11]])).logits
    assert list(found) == ["sdpa", "eager"]
    assert not torch.equal(found["sdpa"], found["eager"])  # other kernels
    torch.testing.assert_close(*found.values(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("gpu", "dtype", "message"),
    [
        (False, "bfloat16", "flash_attention_2 needs a GPU, and there is none here; use auto"),
        (True, "float32", "flash_attention_2 computes in half types; set model.dtype=bfloat16 or use auto"),
        (True, "bfloat16", "flash_attention_2 needs flash_attn, which is not installed; use auto"),
        (True, "bfloat16", r"model.attn_implementation: .*FlashAttention2.* installed; use auto"),
    ],
)
def test_attention_that_cannot_be_is_told_before_loading(gpu, dtype, message, tmp_path, monkeypatch):
    tiny_model(VOCABULARY).save_pretrained(tmp_path)
    monkeypatch.setattr("rlhf.models.base.check_dtype", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if "FlashAttention2" in message:  # in the words of transformers
        monkeypatch.setattr("rlhf.models.kernels.named.find_spec", lambda _: "there")
    with pytest.raises(UserError, match=message):
        load_base(Model(path=str(tmp_path), dtype=dtype, attn_implementation="flash_attention_2"))


@pytest.fixture
def liger(monkeypatch, tmp_path):
    """A stand-in for Liger on a stand-in for a GPU: what it was called with, and a base that asks for it."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("rlhf.models.kernels.named.find_spec", lambda _: "there")
    monkeypatch.setattr("rlhf.models.kernels.named._kinds_of_liger", lambda: {"llama": None})
    monkeypatch.setattr(
        "transformers.integrations.liger.apply_liger_kernel", lambda *given: calls.append(given)
    )
    tiny_model(VOCABULARY).save_pretrained(tmp_path)
    return calls, Model(path=str(tmp_path), use_liger_kernel=True)


def test_liger_changes_the_base_but_not_its_losses_and_nothing_that_is_read_in_float32(liger):
    calls, model = liger
    base = load_base(model)
    assert calls == [(base, {"cross_entropy": False, "fused_linear_cross_entropy": False})]
    load_in_float32(model)
    load_base(model.model_copy(update={"use_liger_kernel": False}))
    assert len(calls) == 1


def test_liger_that_cannot_be_is_told_in_one_line(liger, monkeypatch):
    def old(*_):
        raise TypeError("unexpected argument")

    _, model = liger
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", old)
    with pytest.raises(UserError, match=r"use_liger_kernel: .*: unexpected argument; leave it out"):
        load_base(model)
    monkeypatch.setattr("rlhf.models.kernels.named._kinds_of_liger", dict)
    with pytest.raises(UserError, match=r"Liger has no kernels for .*, which is llama"):
        load_base(model)
    monkeypatch.setattr("rlhf.models.kernels.named.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs liger-kernel: pip install liger-kernel"):
        load_base(Model(path="nowhere", use_liger_kernel=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU, and there is none here; leave it out"):
        load_base(Model(path="nowhere", use_liger_kernel=True))
