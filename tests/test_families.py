"""Families of models that people train, tiny and random: each role against the plain model, and the road."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, slow_but, stage
from families import FAMILIES, REFUSED, TEXT_PART, page, write_family
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

from policy.alignment_tax import preflight
from policy.evaluate import __main__ as evaluate
from policy.ppo import __main__ as ppo
from reward.training import __main__ as reward
from rlhf.collect import __main__ as collect
from rlhf.errors import UserError
from rlhf.generation.sampling import ModelParts, SamplingParams, generate
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.models.lora import fused_share
from rlhf.models.masks import left_pad
from rlhf.recipe.schema import Lora, Model

WORK = [name for name in FAMILIES if name not in REFUSED]
USUAL = ("llama", "qwen3", "gpt2", "gemma3")
SHORT = (
    *("collect.prompts=12", "collect.responses=2", "reward.reference_responses=8", "lora.layers=top_2"),
    *("ppo.steps=1", "ppo.batch_size=8", "ppo.minibatches=1", "ppo.epochs=1", "ppo.rollout_batch_size=8"),
    *("evaluate.prompts=4", "evaluate.batch_size=4"),
)
PROMPTS = [list(range(10, 31)), list(range(40, 44))]  # longer than the window of those that have one
RESPONSES = [[50, 51, 52, 53], [54, 55, 56, 57]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of all families."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_family(name, folder / name)
    return folder


@torch.no_grad()
def stirred(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.startswith("heads."):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def expected(model, prompt, response):
    """Log-probs of one response by the plain model's own logits, without padding."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(len(response)), response]


@pytest.mark.parametrize("name", slow_but(USUAL, WORK))
def test_every_role_of_a_family_says_what_the_plain_model_says(name, models, tmp_path):
    base = load_base(Model(path=str(models / name)))
    torch.manual_seed(0)
    lora = Lora(rank=4, layers="top_2")
    model = Backbone(base, lora, adapters=["policy", "reward"], heads=["reward"], trainable=["policy"])
    stirred(model)
    assert model.check_architecture() is None
    assert model.frozen_layers == 1
    ids, mask = left_pad([[*p, *r, 1] for p, r in zip(PROMPTS, RESPONSES, strict=True)], 0)
    start = len(PROMPTS[0])
    model.save_adapter("policy", tmp_path / "policy")
    kind = AutoModelForCausalLM if name not in TEXT_PART else Gemma3ForConditionalGeneration
    whole = kind.from_pretrained(models / name).eval()
    plain = {"reference": whole}
    if name not in TEXT_PART:  # an adapter carries the names of the text part
        again = load_base(Model(path=str(models / name)))
        plain["policy"] = PeftModel.from_pretrained(again, str(tmp_path / "policy")).eval()
    with torch.no_grad():
        trunk = model.trunk(ids, mask)
        for role, truth in plain.items():
            rows = zip(PROMPTS, RESPONSES, strict=True)
            right = torch.stack([expected(truth, prompt, response) for prompt, response in rows])
            for hidden in (None, trunk):
                with model.folded(role):
                    folded = model(role, ids, mask, hidden, start=start)[0]
                for got in (model(role, ids, mask, hidden, start=start)[0], folded):
                    torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-4)
        score = model("reward", ids, mask)
        torch.testing.assert_close(model("reward", ids, mask, trunk), score, rtol=1e-3, atol=1e-4)
        assert score.isfinite().all()


@pytest.mark.parametrize("name", slow_but(USUAL, WORK))
def test_a_family_is_decoded_greedily_as_by_itself(name, models):
    base = load_base(Model(path=str(models / name)))
    uniforms = torch.zeros(2, 12)
    params = SamplingParams(temperature=0, eos_ids=frozenset([1]))
    got = generate(ModelParts.of(base), PROMPTS, uniforms, params)
    for prompt, ids, length in zip(PROMPTS, got.response_ids_BR, got.lengths_B, strict=True):
        row = list(prompt)
        for _ in range(int(length)):
            inputs = torch.tensor([row])
            logits = base(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
            row.append(int(logits[0, -1].argmax()))
        assert ids[:length].tolist() == row[len(prompt) :]


@pytest.mark.parametrize("name", slow_but(USUAL, WORK))
def test_a_family_goes_the_whole_road(name, models, inside, capsys):
    for main in (collect.main, reward.main, ppo.main, evaluate.main):
        stage(main, f"model.path={models / name}", "model.source=hub", *SHORT)
    assert ("get no adapter" in capsys.readouterr().out) == (name in ("qwen2_moe", "mixtral"))
    summary = json.loads(Path("runs/tiny/evaluate/summary.json").read_text())
    assert summary


@pytest.mark.parametrize("name", ["gpt2", "gemma3_vision", "granite"])
def test_every_role_is_tried_before_the_first_stage_and_once(name, models, inside, capsys, monkeypatch):
    words = [f"model.path={models / name}", "model.source=hub", "lora.layers=top_2"]
    stage(preflight.main, *words)
    line = f"preflight: every role runs on {models / name}\n"
    assert line in capsys.readouterr().out
    monkeypatch.setattr("policy.alignment_tax.probe.probe", lambda recipe: 1 / 0)
    stage(preflight.main, *words)
    assert line in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):  # another adapter is another question
        stage(preflight.main, *words, "lora.rank=3")


@pytest.mark.parametrize(
    "part", ["policy.alignment_tax.probe.sample", "policy.alignment_tax.probe.new_reward_model"]
)
def test_what_a_role_cannot_do_is_one_line_before_the_first_stage(part, models, inside, monkeypatch):
    monkeypatch.setattr(part, lambda *_, **__: [].pop())
    with pytest.raises(
        UserError, match=r"^model\.path: .*llama cannot be trained here: .* \(pop from"
    ) as caught:
        stage(preflight.main, f"model.path={models / 'llama'}", "model.source=hub")
    assert "\n" not in str(caught.value)
    assert not list(Path("runs").rglob("*.json"))


def test_the_page_says_what_runs_and_what_is_refused(models):
    text = page(models)
    assert (ROOT / "docs/models.md").read_text(encoding="utf-8") == text, "run python tests/families.py"
    assert text.count("| runs |") == len(WORK) >= 20
    assert text.count("| refused |") == len(REFUSED)


def test_experts_in_one_piece_are_counted(models):
    """Of a layer's 10,912 weights in matrices 6,144 are experts'."""
    base = load_base(Model(path=str(models / "qwen2_moe")))
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert fused_share(base, 1) == (6144 / 10_912, names)
    assert fused_share(base, 3) == (0, [])
    assert fused_share(load_base(Model(path=str(models / "gpt2"))), 0) == (0, [])


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_trained_is_refused_before_anything_is_made(name, models, inside):
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        stage(collect.main, f"model.path={models / name}", "model.source=hub", *SHORT)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def gradients(folder, layers, *, checkpointing):
    """Of a policy's adapter."""
    torch.manual_seed(0)
    base = load_base(Model(path=str(folder), gradient_checkpointing=checkpointing))
    backbone = Backbone(base, Lora(rank=2, layers=layers), adapters=["policy"], trainable=["policy"])
    ids, mask = left_pad(PROMPTS, 0)
    trunk = stirred(backbone).trunk(ids, mask)
    backbone("policy", ids, mask, trunk, start=15)[0].sum().backward()
    return [p.grad for p in backbone.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", slow_but(USUAL, WORK))
def test_a_family_has_the_same_gradients_under_checkpointing(name, models):
    for layers in ("all", "top_2"):
        plain, less = (gradients(models / name, layers, checkpointing=on) for on in (False, True))
        assert plain
        assert all(torch.equal(*pair) for pair in zip(plain, less, strict=True))
