"""Compiled blocks against plain ones; ``aot_eager`` traces as inductor does, without making kernels."""

import contextlib
import shutil

import pytest
import torch

from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base, load_in_float32
from rlhf.models.kernels import compiled
from rlhf.models.kernels.compiled import is_compiled
from rlhf.models.kernels.named import check_kernels
from rlhf.models.tiny import tiny_model
from rlhf.recipe.load import load
from rlhf.recipe.schema import Lora, Model

VOCABULARY = 259


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_model(VOCABULARY).save_pretrained(place)
    return place


def backbone(folder, **options):
    base = load_base(Model(path=str(folder), **options), layers=2)
    torch.manual_seed(0)
    model = Backbone(base, Lora(rank=4, alpha=8), adapters=["policy"], trainable=["policy"])
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.05
    return model


def passes(model, rows, width):
    """Log-probs of policy without and with gradients and of the reference, and the policy's gradients."""
    ids = torch.arange(rows * width).view(rows, width) * 7 % VOCABULARY
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :2] = False
    model.zero_grad()
    with model.folded("policy"):
        with torch.no_grad():
            old = model("policy", ids, mask, start=width // 2)[0]
        new = model("policy", ids, mask, start=width // 2)[0]
        new.sum().backward()
    with torch.no_grad():
        reference = model("reference", ids, mask, start=width // 2)[0]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [old, new.detach(), reference], torch.cat([g.flatten() for g in grads])


@pytest.mark.slow
def test_compiled_blocks_give_what_plain_ones_give(folder, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    plain, fast = backbone(folder), backbone(folder, compile=True)
    kept = backbone(folder, compile=True, gradient_checkpointing=True)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    assert [is_compiled(m) for m in (plain, fast, kept)] == [False, True, True]
    for rows, width in ((4, 16), (3, 20)):
        expected, slope = passes(plain, rows, width)
        found, own = passes(fast, rows, width)
        assert torch.equal(found[0], found[1]), "the first ratio is 1"
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own, slope, atol=1e-4, rtol=1e-4)
        again, same = passes(kept, rows, width)
        assert all(map(torch.equal, again, found))
        assert torch.equal(same, own)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@torch.no_grad()
def test_real_kernels_give_the_same_and_passes_with_a_cache_run_as_ever(folder):
    base = load_base(Model(path=str(folder)), layers=1)
    fast = load_base(Model(path=str(folder), compile=True), layers=1)
    ids = torch.tensor([[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]])
    plain, found = (model(ids, use_cache=False).logits for model in (base, fast))
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert not is_compiled(load_in_float32(Model(path=str(folder), compile=True)))
    for block in fast.get_decoder().layers:
        block.forward.compiled = None
    torch.testing.assert_close(
        fast(ids, use_cache=True).logits, base(ids, use_cache=True).logits, atol=1e-5, rtol=1e-5
    )


def test_what_cannot_be_compiled_is_told_in_one_line(folder, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such header")

    monkeypatch.setattr(compiled, "BACKEND", fails)
    base = load_base(Model(path=str(folder), compile=True), layers=1)
    with pytest.raises(
        UserError, match=r"model.compile: LlamaDecoderLayer: .*; set model.compile=false$"
    ) as told:
        base(torch.tensor([[7, 8]]), use_cache=False)
    assert "\n" not in str(told.value)
    monkeypatch.setenv("CXX", "nowhere++")
    with pytest.raises(UserError, match=r"needs nowhere\+\+, a C\+\+ compiler"):
        load_base(Model(path="nowhere", compile=True))
    for elsewhere in (False, True):
        refused = pytest.raises(UserError, match="needs triton on a GPU")
        with contextlib.nullcontext() if elsewhere else refused:
            check_kernels(Model(path="x", compile=True), gpu=True, elsewhere=elsewhere)


@pytest.mark.parametrize(
    "option",
    ["model.dtype=bfloat16", "model.dtype=auto", "model.quantization=nf4", "distributed.zero_stage=3"],
)
def test_what_compiling_excludes_is_refused(option):
    with pytest.raises(UserError, match=r"compile .*set (model|distributed)\..*, or model.compile=false"):
        load("recipes/tiny.yaml", ["model.compile=true", option])
