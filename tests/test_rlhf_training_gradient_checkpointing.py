"""Gradient checkpointing: less is kept, and every gradient and every stage stays what it was, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, stage
from safetensors.torch import load_file
from tiny_ppo import TOKENIZER

from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.base import load_base
from rlhf.models.packing import SHARED, Row, inputs_of, pack, with_hidden_states
from rlhf.models.tiny import write_tiny_model
from rlhf.recipe.schema import Lora, Model

RECIPE = ROOT / "recipes" / "tiny_assistant.yaml"
SMALL = (
    "data.limit=16",
    "dialogue.max_prompt_tokens=112",
    "dialogue.max_response_tokens=8",
    "sft.epochs=1",
    "distill.start=null",
    "distill.max_tokens=128",
    "distill.sequences=8",
    "distill.full_kl_sequences=0",
    "reward.start=null",
    "reward.batch_size=4",
    "reward.members=2",
    "ppo.start=null",
    "dpo={batch_size: 4, learning_rate: 1e-3}",
    "pmp={sources: [{files: recipes/tiny/comparisons.jsonl}], limit: 16, batch_size: 4, learning_rate: 1e-3}",
)


def backbone_in(folder, layers, *, checkpointing, dtype="float32"):
    """A tiny base under two adapters, both far from zero."""
    if not folder.exists():
        write_tiny_model(folder, seed=0)
    torch.manual_seed(0)
    base = with_hidden_states(
        load_base(Model(path=str(folder), dtype=dtype, gradient_checkpointing=checkpointing))
    )
    names = {"adapters": ["policy", "value"], "heads": ["value"], "trainable": ["policy", "value"]}
    backbone = Backbone(base, Lora(rank=4, layers=layers), **names)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return backbone


def gradients(backbone, folded):
    """Of both adapters, of one loss over both; the reference is switched on before the backward pass."""
    ids = torch.arange(24).reshape(2, 12) % len(TOKENIZER)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    states = backbone.trunk(ids, mask)
    with backbone.folded("policy") if folded else torch.enable_grad():
        log_probs, _ = backbone("policy", ids, mask, states, start=5, temperature=0.7)
        loss = log_probs.sum() + backbone("value", ids, mask, states, start=5).square().sum()
        backbone.activate(REFERENCE)
        loss.backward()
    found = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in found if "lora_" in name} == {"policy", "value"}
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("layers", ["all", "top_2"])
def test_gradients_are_equal_bit_for_bit(layers, folded, dtype, tmp_path):
    plain, less = (
        gradients(backbone_in(tmp_path / "m", layers, checkpointing=c, dtype=dtype), folded)
        for c in (False, True)
    )
    assert plain.keys() == less.keys()
    assert all(torch.equal(plain[name], less[name]) for name in plain)


def kept_bytes(backbone):
    """What autograd keeps of a pass of packed sequences, and the gradients."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    rows = [Row(list(range(1, 9)), [True] * 8), Row(list(range(3, 8)), [True] * 5)]
    batch = pack(rows, [[0, 1]], 0, [[5, 6, 7]])
    assert int(batch.segments_NT.max()) > SHARED + 1
    backbone.activate("policy")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = backbone.base(**inputs_of(backbone.model, batch), part="all").square().sum()
    loss.backward()
    return sum(kept), {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


def test_packed_rows_are_the_same_and_little_is_kept(tmp_path):
    plain, less = (kept_bytes(backbone_in(tmp_path / "m", "all", checkpointing=c)) for c in (False, True))
    assert all(torch.equal(plain[1][name], less[1][name]) for name in plain[1])
    assert less[0] < plain[0] / 5


def test_only_layers_that_train_run_again(tmp_path):
    backbone = backbone_in(tmp_path / "m", "top_1", checkpointing=True)
    runs = [0] * len(backbone.decoder.layers)
    for index, layer in enumerate(backbone.decoder.layers):
        count = lambda *_, index=index: runs.__setitem__(index, runs[index] + 1)  # noqa: E731
        layer.self_attn.register_forward_hook(count)
    ids = torch.arange(10).reshape(1, 10)
    backbone("policy", ids, ids >= 0, start=5)[0].sum().backward()
    assert runs == [1] * (len(runs) - 1) + [2]
    with torch.no_grad():
        backbone("policy", ids, ids >= 0, start=5)
    assert runs == [2] * (len(runs) - 1) + [3]


def test_a_pass_with_a_cache_runs_once_with_gradients_on(tmp_path):
    backbone = backbone_in(tmp_path / "m", "all", checkpointing=True)
    backbone.activate("policy")
    ids = torch.arange(10).reshape(1, 10)
    whole = backbone.base(input_ids=ids, use_cache=False).logits
    first = backbone.base(input_ids=ids[:, :6], use_cache=True)
    rest = backbone.base(input_ids=ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    rest.logits.sum().backward()
    assert rest.past_key_values.get_seq_length() == 10
    assert torch.allclose(rest.logits, whole[:, 6:], atol=1e-5)


# --- the stages ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder in which the stages before those that train have run."""
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    folder = tmp_path_factory.mktemp("lab")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module in (prepare, collect):
            stage(module.main, *SMALL, recipe=RECIPE)
    return folder


def weights_in(folder):
    """Every tensor that a stage has learned."""
    files = [file for file in folder.rglob("*.safetensors") if "checkpoints" not in file.parts]
    return {(str(f.relative_to(folder)), n): t for f in files for n, t in load_file(f).items()}


@pytest.mark.parametrize("name", ["sft", "distill", "distill full", "pmp", "reward", "ppo", "dpo"])
def test_every_stage_learns_the_same(name, lab, monkeypatch):
    import policy.distillation.__main__ as distill
    import policy.dpo.__main__ as dpo
    import policy.ppo.__main__ as ppo
    import policy.sft.__main__ as sft
    import reward.pretraining.__main__ as pmp
    import reward.training.__main__ as reward
    from rlhf.training import gradient_checkpointing

    monkeypatch.chdir(lab)
    mains = {"sft": sft, "distill": distill, "pmp": pmp, "reward": reward, "ppo": ppo, "dpo": dpo}
    name, *full = name.split()
    options = [*SMALL, *(["distill.method=full"] if full else [])]
    if name == "ppo" and not Path("runs/tiny-assistant/reward/manifest.json").exists():
        stage(reward.main, *(o for o in options if "pmp=" not in o), recipe=RECIPE)
    if name in ("reward", "ppo"):  # which would start from it
        options = [option for option in options if not option.startswith("pmp=")]
    again, run = [], gradient_checkpointing.checkpoint
    monkeypatch.setattr(
        gradient_checkpointing, "checkpoint", lambda *a, **o: (again.append(1), run(*a, **o))[1]
    )
    found = []
    for checkpointing in ("false", "true"):
        folder = Path("runs/tiny-assistant") / name
        shutil.rmtree(folder, ignore_errors=True)
        assert not again
        stage(mains[name].main, *options, f"model.gradient_checkpointing={checkpointing}", recipe=RECIPE)
        found.append(weights_in(folder))
    assert again, "no layer was checkpointed"
    plain, less = found
    assert plain
    assert plain.keys() == less.keys()
    assert all(torch.equal(plain[key], less[key]) for key in plain)
