"""Estimates against exact patching where they must agree, and where it is known what matters."""

import pytest
import torch
from tiny_inside import HEAD, NEURON, batch, linear_model, llama, wired
from transformers import GPT2Config, GPT2LMHeadModel

from policy.inside.attribution import attribute, relp_rules
from policy.inside.patching import patched, record
from policy.inside.subject import EMBEDDINGS, Batch, Site, of_model

RULES = ("atp", "relp")


def exact(subject, rows, source):
    """The effect of each component alone, by a run each."""
    own_B = record(subject, rows).measured_B
    return {
        site: torch.stack(
            [
                patched(subject, rows, source, {site: torch.tensor([unit])}) - own_B
                for unit in range(subject.units(site))
            ],
            dim=-1,
        )
        for site in subject.writers
    }


def estimates(subject, rows, source, **options):
    return attribute(subject, rows, source, record(subject, rows), **options)


@pytest.mark.parametrize(("rule", "gate"), [("atp", 1.2), ("relp", 0.0)])  # RelP halves a product on purpose
def test_of_a_linear_model_estimates_are_exact(rule, gate):
    subject, rows = of_model(linear_model(gate)), batch()
    source = record(subject, batch(seed=1))
    found = estimates(subject, rows, source, rule=rule)
    for site, effects_BU in exact(subject, rows, source).items():
        torch.testing.assert_close(found[site], effects_BU, atol=1e-5, rtol=1e-4)
    whole_B1 = (source.measured_B - record(subject, rows).measured_B)[:, None]
    torch.testing.assert_close(found[EMBEDDINGS], whole_B1, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_of_a_wired_model_the_known_parts_come_first(rule):
    subject = of_model(wired())
    clean, corrupt = (torch.tensor([[5, a, 6, b], [7, a, 8, b]]) for a, b in ((3, 4), (9, 10)))
    rows, source = (Batch(ids, torch.ones_like(ids).bool()) for ids in (corrupt, clean))
    run = record(subject, source)
    for scores in (estimates(subject, rows, run, rule=rule, steps=5), exact(subject, rows, run)):
        sizes = {site.name(u): float(scores[site].sum(0)[u]) for site in subject.writers
                 for u in range(subject.units(site))}  # fmt: skip
        ranked = sorted(sizes, key=lambda name: -abs(sizes[name]))
        assert set(ranked[:2]) == {f"L1.H{HEAD}", f"L0.N{NEURON}"}  # AUROC 1
        assert min(sizes[name] for name in ranked[:2]) > 0


def other_column(model, site_layer, neuron):
    changed = llama()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.model.layers[site_layer].mlp.down_proj.weight[:, neuron] += 0.05
    return changed


@pytest.mark.parametrize("rule", RULES)
def test_a_planted_difference_in_one_column_is_the_first_of_all(rule):
    model, rows = llama(), batch()
    subject, source = of_model(model), record(of_model(other_column(model, 1, 11)), rows)
    found = estimates(subject, rows, source, rule=rule)
    sizes = {(site, u): abs(float(x)) for site in subject.writers for u, x in enumerate(found[site].sum(0))}
    assert max(sizes, key=sizes.get) == (Site(1, "neurons"), 11)
    assert sorted(sizes.values())[-2] < 1e-6  # nothing else differs in the last layer
    change = source.measured_B - record(subject, rows).measured_B
    only = patched(subject, rows, source, {Site(1, "neurons"): torch.tensor([11])})
    torch.testing.assert_close(only - record(subject, rows).measured_B, change, atol=1e-5, rtol=1e-4)


def test_of_the_same_model_every_estimate_is_zero():
    subject, rows = of_model(llama()), batch()
    found = estimates(subject, rows, record(subject, rows), rule="atp")
    assert all(float(x.abs().max()) == 0 for x in found.values())


def test_a_small_step_is_what_the_gradient_says():
    subject, rows = of_model(llama()), batch()
    source = record(subject, batch(seed=1))
    own = record(subject, rows)
    near = source._replace(kept={s: torch.lerp(own.kept[s], x, 1e-2) for s, x in source.kept.items()})
    site = Site(0, "heads")
    found = estimates(subject, rows, near, rule="atp")[site]
    torch.testing.assert_close(found, exact(subject, rows, near)[site], atol=2e-4, rtol=0.1)
    assert float(found.abs().max()) > 2e-3


def gpt2():
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 12}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=1)).eval()


@pytest.mark.parametrize("model", [llama(), gpt2()])
def test_relps_rules_change_no_output_and_leave_no_trace(model):
    subject, rows = of_model(model), batch()
    before = record(subject, rows)
    with relp_rules(subject.decoder):
        torch.testing.assert_close(record(subject, rows).measured_B, before.measured_B, rtol=0, atol=0)
    by_rule = estimates(subject, rows, record(subject, batch(seed=1)), rule="relp")
    by_slope = estimates(subject, rows, record(subject, batch(seed=1)), rule="atp")
    assert not torch.allclose(by_rule[Site(0, "neurons")], by_slope[Site(0, "neurons")])
    again = estimates(subject, rows, record(subject, batch(seed=1)), rule="atp")
    assert all(torch.equal(again[site], by_slope[site]) for site in again)


def test_relp_of_a_gated_mlp_by_hand():
    """Its input gets half of the product's derivative by each factor: x passes as (1/2 + 1/2) of the output,
    since the gate is a constant quotient times its own linear map (Jafari 2025, section 3)."""
    torch.manual_seed(0)
    mlp = llama().model.layers[0].mlp
    x = torch.randn(5, 16, requires_grad=True)
    slope = torch.randn(5, 16)
    with relp_rules(mlp):
        (mlp(x) * slope).sum().backward()
    torch.testing.assert_close((x.grad * x).sum(), (mlp(x) * slope).sum())
