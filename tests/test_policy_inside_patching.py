"""Exact patching against what must hold, and against models whose parts are known."""

import pytest
import torch
from tiny_inside import batch, effect, llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from policy.inside.patching import patched, record
from policy.inside.subject import EMBEDDINGS, Batch, Site, of_model, of_role
from rlhf.errors import UserError
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.recipe.schema import Lora


def everything(subject):
    return dict.fromkeys([EMBEDDINGS, *subject.writers])


def families():
    torch.manual_seed(0)
    shape = {"vocab_size": 12, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3, **shape)
    neox = GPTNeoXConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        initializer_range=0.3,
        **shape,
    )
    return {"llama": llama(), "gpt2": GPT2LMHeadModel(gpt2).eval(), "neox": GPTNeoXForCausalLM(neox).eval()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_all_of_another_run_is_all_of_its_effect_and_nothing_is_none(family):
    subject, rows = of_model(families()[family]), batch()
    source = record(subject, batch(seed=1))
    assert effect(subject, rows, source, {}) == 0
    assert effect(subject, rows, source, everything(subject)) == pytest.approx(1, abs=1e-5)
    assert effect(subject, rows, source, {EMBEDDINGS: None}) == pytest.approx(1, abs=1e-5)
    for layer in range(2):
        assert effect(subject, rows, source, {Site(layer, "state"): None}) == pytest.approx(1, abs=1e-5)
    one = effect(subject, rows, source, {Site(0, "neurons"): torch.tensor([3])})
    assert one not in (0, pytest.approx(1, abs=1e-3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_a_run_can_go_on_from_below_the_first_patch(family):
    subject, rows = of_model(families()[family]), batch()
    source, own = record(subject, batch(seed=1)), record(subject, rows)
    chosen = {Site(1, "neurons"): torch.tensor([3]), Site(1, "heads"): torch.tensor([0])}
    subject.sites[Site(0, "neurons")].register_forward_hook(
        lambda *_: pytest.fail("it ran") if skip else None
    )
    skip = False
    expected = patched(subject, rows, source, chosen)
    skip = True
    assert torch.equal(patched(subject, rows, source, chosen, own=own), expected)
    skip = False
    assert torch.equal(record(subject, rows).measured_B, own.measured_B)


def roles():
    """A backbone whose policy and reward are random adapters, and its reference."""
    backbone = Backbone(llama(), Lora(rank=4), adapters=["policy", "reward"], heads=["reward"])
    torch.manual_seed(5)
    for name in ("policy", "reward"):
        for parameter in backbone.parameters_of(name).values():
            nn.init.normal_(parameter, std=0.3)
    return backbone


def test_the_policy_patched_into_its_reference_and_back():
    backbone, rows = roles(), batch()
    policy, reference = of_role(backbone, "policy"), of_role(backbone, REFERENCE)
    for target, other in ((reference, policy), (policy, reference)):
        source = record(other, rows)
        assert source.measured_B.tolist() != record(target, rows).measured_B.tolist()
        assert effect(target, rows, source, {}) == 0
        assert effect(target, rows, source, everything(target)) == pytest.approx(1, abs=1e-5)
        assert effect(target, rows, source, {Site(1, "state"): None}) == pytest.approx(1, abs=1e-5)
    own, all_of_it = record(policy, rows), everything(policy)
    assert torch.equal(patched(policy, rows, own, all_of_it), own.measured_B)


def test_folding_and_a_plain_peft_model_change_nothing():
    backbone, rows = roles(), batch()
    source, chosen = record(of_role(backbone, "policy"), rows), {Site(0, "heads"): torch.tensor([1])}
    expected = patched(of_role(backbone, REFERENCE), rows, source, chosen)
    with backbone.folded("policy"):
        folded = record(of_role(backbone, "policy"), rows)
    torch.testing.assert_close(folded.measured_B, source.measured_B)
    torch.testing.assert_close(patched(of_role(backbone, REFERENCE), rows, folded, chosen), expected)
    plain = of_model(backbone.model, activate=lambda: backbone.activate("policy"))
    torch.testing.assert_close(record(plain, rows).measured_B, source.measured_B)
    for site, found in plain.maps.items():
        torch.testing.assert_close(found, source.maps[site])


def test_padding_changes_nothing():
    subject, rows = of_role(roles(), "policy"), batch()
    padded = Batch(*(nn.functional.pad(x, (2, 0)) for x in rows[:2]), rows.start + 2)
    source = record(subject, batch(seed=1))
    wide = record(subject, Batch(*(nn.functional.pad(x, (2, 0)) for x in batch(seed=1)[:2]), 6))
    chosen = {Site(0, "heads"): torch.tensor([0]), Site(1, "neurons"): torch.tensor([7, 9])}
    torch.testing.assert_close(
        patched(subject, rows, source, chosen), patched(subject, padded, wide, chosen), atol=1e-5, rtol=1e-4
    )


def test_heads_of_a_group_are_as_heads_with_keys_and_values_of_their_own():
    grouped, own = llama(), llama(num_key_value_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    own.load_state_dict(weights)
    found = []
    for subject in (of_model(grouped), of_model(own)):
        source = record(subject, batch(seed=1))
        chosen = [{Site(layer, "heads"): torch.tensor([h])} for layer in range(2) for h in range(4)]
        found.append(torch.stack([patched(subject, batch(), source, one) for one in chosen]))
    torch.testing.assert_close(*found)
    assert len(found[0].unique(dim=0)) == 8


def test_heads_add_up_to_the_attention_and_neurons_to_the_mlp():
    model, rows = llama(), batch()
    subject = of_model(model)
    outputs = {}
    for site in subject.writers:
        subject.sites[site].register_forward_hook(lambda *a, site=site: outputs.update({site: a[2]}))
    run = record(subject, rows)
    for site in subject.writers:
        parts = [
            run.kept[site][..., at] @ run.maps[site][at]
            for unit in range(subject.units(site))
            for at in [subject.columns(site, torch.tensor([unit]))]
        ]
        torch.testing.assert_close(sum(parts), outputs[site])


def test_only_the_positions_that_are_named_are_patched():
    subject, rows = of_model(llama()), batch()
    source = record(subject, batch(seed=1))
    where = torch.zeros_like(rows.mask_BT)
    same = patched(subject, rows, source, {EMBEDDINGS: None}, where)
    torch.testing.assert_close(same, record(subject, rows).measured_B)
    where[:, 2] = True
    mixed = rows.ids_BT.clone()
    mixed[:, 2] = batch(seed=1).ids_BT[:, 2]
    by_tokens = record(subject, Batch(mixed, rows.mask_BT, rows.start)).measured_B
    torch.testing.assert_close(patched(subject, rows, source, {EMBEDDINGS: None}, where), by_tokens)


def test_ablation_takes_other_rows_or_the_mean():
    subject, rows = of_model(llama()), batch()
    run = record(subject, rows)
    turned = run.resampled(torch.tensor([1, 2, 0]))
    site = Site(1, "neurons")
    assert torch.equal(turned.kept[site][0], run.kept[site][1])
    mean = run.averaged(rows.mask_BT)
    torch.testing.assert_close(mean.kept[site][1, 3], run.kept[site].flatten(0, 1).mean(0))
    assert (patched(subject, rows, mean, {site: None}) != run.measured_B).all()


def test_a_family_with_other_names_is_told_what_was_looked_for():
    model = llama()
    model.model.layers[1].mlp.out = model.model.layers[1].mlp.down_proj
    del model.model.layers[1].mlp.down_proj
    with pytest.raises(UserError, match=r"LlamaModel has none of mlp.down_proj, mlp.c_proj, .*GPT-NeoX"):
        of_model(model)
    del model.model.layers
    with pytest.raises(UserError, match="LlamaModel has none of layers, h"):
        of_model(model)
