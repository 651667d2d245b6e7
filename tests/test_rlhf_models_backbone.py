"""The backbone against the plain model that it wraps, run row by row without padding."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BioGptConfig, BioGptForCausalLM

from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base, quantization_config
from rlhf.models.lora import HEAD
from rlhf.models.tiny import tiny_model, write_tiny_model
from rlhf.recipe.schema import Lora, Model
from rlhf.runs.artifacts import WEIGHTS

VOCABULARY = 259
LORA = Lora(rank=4, alpha=8, layers="top_2")
ADAPTERS = ("policy", "value", "reward")
PROMPTS = [[7, 8, 9, 10, 11], [12], [13, 14, 15]]
RESPONSES = [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]]
START = 5


@torch.no_grad()
def stirred(backbone, *, seed=1, std=0.3):
    """Adapters and heads as after some training: every one changes what the base says."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name or name.startswith("heads."):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return backbone


def backbone(lora=LORA, *, base=None, seed=0, trainable=("policy", "value")):
    base = tiny_model(VOCABULARY) if base is None else base
    base = base.requires_grad_(False).eval()
    torch.manual_seed(seed)
    return Backbone(base, lora, adapters=ADAPTERS, heads=ADAPTERS[1:], trainable=trainable)


def batch(extra=0):
    """Left-padded prompts, responses, closing column; ``extra`` more columns of padding."""
    start = START + extra
    ids = torch.zeros(len(PROMPTS), start + 4 + 1, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids[row, start - len(prompt) :] = torch.tensor([*prompt, *response, 1])
        mask[row, start - len(prompt) :] = True
    return ids, mask, start


def said(model, role, extra=0, hidden=None, **options):
    ids, mask, start = batch(extra)
    if role in ("policy", "reference"):
        return torch.stack(model(role, ids, mask, hidden, start=start, **options))
    return model(role, ids, mask, hidden, **({"start": start} if role == "value" else {}))


@pytest.mark.parametrize("role", ["policy", "reference", "value", "reward"])
def test_the_trunk_and_then_the_top_give_what_the_whole_pass_gives(role):
    model = stirred(backbone())
    ids, mask, _ = batch()
    with torch.no_grad():
        hidden = model.trunk(ids, mask)
        torch.testing.assert_close(said(model, role, hidden=hidden), said(model, role), rtol=0, atol=1e-5)
        assert not torch.allclose(said(model, role, hidden=hidden * 1.1), said(model, role), atol=1e-3)


def test_the_trunk_is_the_plain_models_hidden_state_below_the_first_adapted_layer():
    model = stirred(backbone())
    ids, mask, start = batch()
    plain = tiny_model(VOCABULARY)
    with torch.no_grad():
        hidden = model.trunk(ids, mask)
        for row, prompt in enumerate(PROMPTS):
            alone = ids[row, start - len(prompt) :][None]
            expected = plain(input_ids=alone, output_hidden_states=True).hidden_states[1][0]
            torch.testing.assert_close(hidden[row, start - len(prompt) :], expected, rtol=0, atol=1e-5)
    assert backbone(Lora(rank=4, layers="all")).trunk(ids, mask) is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("role", ["reference", "policy"])
def test_log_probs_and_entropies_are_those_of_the_plain_models_logits(role, temperature, tmp_path):
    model = stirred(backbone())
    model.save_adapter("policy", tmp_path)
    plain = tiny_model(VOCABULARY)  # never wrapped
    if role == "policy":
        plain = PeftModel.from_pretrained(plain, str(tmp_path))
    with torch.no_grad():
        log_probs, entropy = said(model, role, temperature=temperature)
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            logits = plain(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            everything = torch.log_softmax(logits / temperature, dim=-1)
            expected = everything[torch.arange(4), torch.tensor(response)]
            torch.testing.assert_close(log_probs[row], expected, rtol=0, atol=1e-5)
            expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
            torch.testing.assert_close(entropy[row], expected, rtol=0, atol=1e-4)


def test_values_and_scores_are_the_head_of_the_plain_hidden_state(tmp_path):
    model = stirred(backbone())
    for role in ("value", "reward"):
        model.save_adapter(role, tmp_path / role)
        plain = PeftModel.from_pretrained(tiny_model(VOCABULARY), str(tmp_path / role))
        head = model.heads[role]
        with torch.no_grad():
            got = said(model, role)
            for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
                ids = torch.tensor([[*prompt, *response, 1]])
                hidden = plain(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
                scores = hidden @ head.weight[0] + head.bias
                expected = scores[-1] if role == "reward" else scores[len(prompt) - 1 : -2]
                torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-5)


def test_only_the_wanted_positions_are_computed_and_the_others_are_zero():
    model = stirred(backbone())
    wanted = torch.tensor([[True, True, False, False], [True] * 4, [True, False, False, False]])
    with torch.no_grad():
        torch.testing.assert_close(
            said(model, "policy", targets_mask_BR=wanted), said(model, "policy") * wanted
        )


def test_a_fresh_adapter_changes_nothing_bit_for_bit():
    model = backbone()
    assert torch.equal(said(model, "policy"), said(model, "reference"))
    assert not torch.allclose(said(stirred(model), "policy"), said(model, "reference"), atol=1e-2)


@pytest.mark.parametrize("role", ["policy", "reference", "value", "reward"])
def test_more_padding_changes_nothing(role):
    model = stirred(backbone())
    with torch.no_grad():
        torch.testing.assert_close(said(model, role, extra=6), said(model, role), rtol=0, atol=1e-5)


def test_a_score_does_not_depend_on_the_side_of_the_padding():
    model = stirred(backbone())
    ids, mask, start = batch()
    right, right_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, prompt in enumerate(PROMPTS):
        real = ids[row, start - len(prompt) :]
        right[row, : len(real)], right_mask[row, : len(real)] = real, True
    with torch.no_grad():
        torch.testing.assert_close(
            model("reward", right, right_mask), said(model, "reward"), rtol=0, atol=1e-5
        )


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_switching_roles_never_changes_what_learns():
    model = backbone()
    before = learning(model)
    assert before == {n for n, _ in model.named_parameters() if ".policy." in n or ".value." in n}
    for role in ("value", "reference", "reward", "policy", "reference"):
        model.activate(role)
        assert learning(model) == before


@pytest.mark.parametrize("role", ["policy", "value"])
def test_gradients_reach_the_adapter_and_head_of_the_role_and_nothing_else(role):
    model = stirred(backbone())
    said(model, role).sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {n for n in learning(model) if f".{role}." in n}
    assert len(reached) > 10


def test_a_backward_pass_does_not_care_which_role_is_switched_on_by_then():
    gradients = []
    for later in ("policy", "value", "reference"):
        model = stirred(backbone())
        loss = said(model, "policy")[0].sum()
        model.activate(later)
        loss.backward()
        gradients.append([p.grad for p in model.parameters_of("policy").values()])
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0], strict=True):
            assert torch.equal(got, expected)


def test_a_role_that_does_not_learn_has_no_gradient():
    model = stirred(backbone())
    assert not said(model, "reward").requires_grad


def test_what_is_saved_loads_here_and_in_plain_peft(tmp_path):
    write_tiny_model(tmp_path / "base")
    model = stirred(backbone(base=load_base(Model(path=str(tmp_path / "base")))))
    for adapter in ("policy", "reward"):
        model.save_adapter(adapter, tmp_path / adapter)

    again = backbone(base=load_base(Model(path=str(tmp_path / "base"))), seed=7)
    for adapter in ("policy", "reward"):
        assert again.load_adapter(adapter, tmp_path / adapter) == len(model.parameters_of(adapter))
        assert torch.equal(said(again, adapter), said(model, adapter))

    ids, mask, _ = batch()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "policy")).eval()
    model.activate("policy")
    with torch.no_grad():
        got, expected = (m(input_ids=ids, attention_mask=mask.long()).logits for m in (plain, model.base))
    assert torch.equal(got, expected)
    card = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert card["base_model_name_or_path"] == str(tmp_path / "base")


def missing(tensors):
    del tensors[next(n for n in tensors if "lora_A" in n)]


def superfluous(tensors):
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)


def reshaped(tensors):
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name] = torch.zeros(8, tensors[name].shape[1])


def headless(tensors):
    for name in [n for n in tensors if n.startswith(HEAD)]:
        del tensors[name]


def empty(tensors):
    tensors.clear()


@pytest.mark.parametrize("damage", [missing, superfluous, reshaped, headless, empty])
def test_an_adapter_that_does_not_fit_is_refused(damage, tmp_path):
    model = backbone()
    model.save_adapter("reward", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"other lora settings or another base"):
        model.load_adapter("reward", tmp_path)


def test_an_adapter_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such adapter"):
        backbone().load_adapter("policy", tmp_path)


def test_a_head_without_bias_is_read_and_its_offset_set_apart(tmp_path):
    model = stirred(backbone())
    model.save_adapter("reward", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[f"{HEAD}.bias"]
    save_file(tensors, tmp_path / WEIGHTS)
    model.load_adapter("reward", tmp_path)
    assert float(model.heads["reward"].bias.detach()) == 0
    before = said(model, "reward")
    model.set_offset("reward", 2.5)
    torch.testing.assert_close(said(model, "reward"), before + 2.5)


@pytest.mark.parametrize(("layers", "adapted"), [("all", {0, 1, 2}), ("top_2", {1, 2}), ("top_1", {2})])
def test_only_the_last_k_layers_are_adapted(layers, adapted):
    model = backbone(Lora(rank=4, layers=layers))
    names = list(model.parameters_of("policy"))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == adapted
    assert len(names) == 7 * 2 * len(adapted)  # q k v o gate up down, A and B
    assert model.frozen_layers == (0 if layers == "all" else 3 - len(adapted))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(layers="top_4"), "top_4 of a model with 3 layers"),
        (Lora(targets=["q_proj", "query"]), "'query'.*it has down_proj"),
        (Lora(targets=[]), "no linear modules"),
    ],
)
def test_lora_settings_that_the_base_cannot_have_are_refused(lora, message):
    with pytest.raises(UserError, match=message):
        backbone(lora)


def test_named_targets_alone_are_adapted():
    names = backbone(Lora(targets=["q_proj", "v_proj"], layers="all")).parameters_of("policy")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}


def test_a_base_that_is_not_there_names_the_target_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="make model"):
        load_base(Model(path=str(tmp_path / "nothing")))


def test_the_check_passes_a_llama_and_keeps_its_trunk():
    model = stirred(backbone())
    assert model.check_architecture() is None
    assert model.frozen_layers == 1


def test_an_architecture_that_cannot_be_split_loses_the_trunk_only():
    config = BioGptConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                          intermediate_size=64, max_position_embeddings=64)  # fmt: skip
    model = backbone(base=BioGptForCausalLM(config))
    assert "no trunk cache" in model.check_architecture()
    assert model.frozen_layers == 0
    assert "cannot be split" in model.no_trunk
    assert said(model, "policy").isfinite().all()


def dequantized(base):
    """A plain model with the weights that the quantized one stands for."""
    functional = pytest.importorskip("bitsandbytes.functional")
    plain = tiny_model(VOCABULARY)
    for name, module in base.named_modules():
        if type(module).__name__ == "Linear4bit":
            whole = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            whole = module.weight.data * module.weight.SCB[:, None] / 127
        else:
            continue
        plain.get_submodule(name).weight.data.copy_(whole)
    return plain


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_learns_through_float32_adapters(kind, tmp_path):
    """Also after a pass without gradients, at which bitsandbytes prepares some CPUs for inference only."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed here")
    write_tiny_model(tmp_path)
    base = load_base(Model(path=str(tmp_path), quantization=kind))
    plain = dequantized(base)
    changed = [n for n, p in tiny_model(VOCABULARY).named_parameters() if not p.equal(plain.get_parameter(n))]
    assert len(changed) == 7 * 3
    gradients, log_probs = [], []
    for model in (stirred(backbone(base=base)), stirred(backbone(base=plain))):
        with torch.no_grad():
            log_probs.append(said(model, "policy")[0])
        (said(model, "policy")[0].sum() + said(model, "value").sum()).backward()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in named.values()} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in named.values()]))
    # int8 rounds the activations too
    torch.testing.assert_close(*log_probs, rtol=0, atol=1e-3 if kind == "nf4" else 0.5)
    assert float(torch.cosine_similarity(*gradients, dim=0)) > (0.999 if kind == "nf4" else 0.95)


def test_a_process_loads_onto_its_own_gpu(tmp_path, monkeypatch):
    """bitsandbytes puts a base onto the current GPU; a stand-in, as there is none here."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="no model at"):
        load_base(Model(path=str(tmp_path)))
    assert current == [torch.device("cuda", 1)]


def test_nf4_is_multiplied_in_the_type_of_the_base():
    for dtype in ("float32", "bfloat16"):
        assert quantization_config("nf4", dtype).bnb_4bit_compute_dtype == getattr(torch, dtype)
