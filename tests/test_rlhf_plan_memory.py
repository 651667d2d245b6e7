"""What the plan counts tensor by tensor, against torch's own saved tensors and a process's peak."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rlhf.models.backbone import Backbone
from rlhf.models.kernels.onednn import use_onednn
from rlhf.plan import memory
from rlhf.plan.memory import Setting
from rlhf.plan.shapes import PUBLISHED, from_config
from rlhf.recipe.schema import Lora

RANK, ROWS, LENGTH = 4, 3, 64
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}


def backbone(family, dtype):
    kind, config = FAMILIES[family]
    base = kind(config(**SIZES)).to(dtype).eval().requires_grad_(False)
    use_onednn(base)
    return Backbone(base, Lora(rank=RANK, alpha=8), adapters=["policy"], trainable=["policy"])


def saved_bytes(model, *, folds):
    """Bytes of all that autograd keeps of a pass of the policy, weights and their copies aside."""
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % SIZES["vocab_size"]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :5] = False
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def run():
        model.activate("policy")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return model._decode(ids, mask, part="all")

    if folds:
        with model.folded("policy"):
            out = run()
            copies = [*model.parameters(), *model._folding._buffers.values()]
    else:
        out, copies = run(), [*model.parameters()]
    own = {tensor.untyped_storage().data_ptr() for tensor in copies}
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "gpu"),
    [("float32", False), ("bfloat16", False), ("bfloat16", True)],
    ids=["folded", "beside", "peft"],
)
def test_what_autograd_keeps_of_a_layer_is_known(family, dtype, gpu):
    setting = Setting(dtype, "none", gpu)
    shape = from_config(FAMILIES[family][1](**SIZES).to_dict(), "here")
    expected = memory.kept_of_layer(shape, RANK, setting, length=LENGTH) * shape.layers * ROWS * LENGTH
    found = saved_bytes(backbone(family, getattr(torch, dtype)), folds=setting.path != "peft")
    assert expected == pytest.approx(found, rel=0.04)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b", "qwen3-0.6b", "qwen3-8b"])
def test_the_weights_of_a_published_shape_are_those_of_the_model_that_it_makes(name):
    shape = PUBLISHED[name]
    kind, config = FAMILIES["qwen3" if shape.qk_norm else "llama"]
    with torch.device("meta"):
        model = kind(
            config(
                vocab_size=shape.vocabulary,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                tie_word_embeddings=shape.tied,
            )
        )
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert shape.matrices() + shape.others() == whole
    assert {"smollm2-135m": 134515008, "llama-3.1-8b": 8030261248, "qwen3-8b": 8190735360}.get(
        name, whole
    ) == whole


TRAINS = """
import resource, sys, torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from rlhf.models.backbone import Backbone
from rlhf.models.kernels.onednn import use_onednn
from rlhf.recipe.schema import Lora
from rlhf.generation.sampling import sample, uniforms
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
config = LlamaConfig(vocab_size=20000, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
base = LlamaForCausalLM(config).eval().requires_grad_(False)
use_onednn(base)
model = Backbone(base, Lora(rank=4, alpha=8), adapters=["policy"], trainable=["policy"])
model.activate("policy")
def train(rows, width):
    ids = torch.arange(rows * width).view(rows, width) % 20000
    with model.folded("policy"):
        model("policy", ids, torch.ones_like(ids, dtype=torch.bool), start=width // 2)[0].sum().backward()
def draw(rows, width):
    prompts = [[row * 7 + i for i in range(width)] for row in range(rows)]
    numbers = uniforms(0, "x", 0, range(rows), 8)
    sample(model, "policy", prompts, numbers, eos_id=-1, pad_id=0, temperature=1.0)
work = {"train": train, "draw": draw}[sys.argv[1]]
if work is train:
    train(2, 8)
before = peak()
work(int(sys.argv[2]), int(sys.argv[3]))
print(before, peak())
"""
SHAPE = PUBLISHED["smollm2-135m"]._replace(
    layers=4, hidden=256, intermediate=1024, heads=4, kv_heads=2, head_dim=64, vocabulary=20000
)


def measured(*arguments):
    """Peak memory of a process before the large batch, and behind it; its C library keeps no heap of
    what was freed, so that these are the tensors'."""
    done = subprocess.run(
        [sys.executable, "-c", TRAINS, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={
            "PATH": "/usr/bin",
            "PYTHONPATH": str(ROOT),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        },
    )
    return map(int, done.stdout.split())


@pytest.mark.slow
def test_training_takes_what_the_plan_says(monkeypatch):
    monkeypatch.setattr(memory, "HEAP", 0.0)
    rows, width, setting = 8, 256, Setting("float32", "none", gpu=False)
    before, after = measured("train", rows, width)
    expected = memory.activations(SHAPE, 4, 4, rows * width, setting, length=width, mask=False)
    expected += (
        memory.training_logits(SHAPE, rows * width // 2, setting) * 2 / 3
    )  # two of three as the passes end
    assert after - before == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
def test_sampling_takes_what_the_plan_says(monkeypatch):
    monkeypatch.setattr(memory, "HEAP", 0.0)
    rows, width, setting = 128, 64, Setting("float32", "none", gpu=False)
    before, after = measured("draw", rows, width)
    expected = memory.kv_cache(SHAPE, rows, width + 9, setting) + memory.passing(SHAPE, rows * width, setting)
    assert after - before == pytest.approx(expected, rel=0.15)
