"""Edges where their effect is known: by patching whole components, in linear models, in one wired by hand."""

import pytest
import torch
from tiny_inside import HEAD, batch, linear_model, llama, wired
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from policy.inside.attribution import attribute
from policy.inside.circuit.edges import edge_scores
from policy.inside.circuit.wiring import Wiring
from policy.inside.patching import patched, record
from policy.inside.subject import EMBEDDINGS, Batch, Site, of_model
from reward.card.ood import auroc
from rlhf.errors import UserError

ONES = torch.ones(3)
SHAPE = {"vocab_size": 12, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, **SHAPE)).eval()


def neox(parallel):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **SHAPE, use_parallel_residual=parallel)).eval()


FAMILIES = {"llama": llama, "gpt2": gpt2, "neox": lambda: neox(True), "neox-serial": lambda: neox(False)}
family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def none(wiring):
    return torch.zeros(wiring.edges, dtype=torch.bool)


def chosen(wiring, wanted):
    """The edges whose writer and reader are as wanted."""
    return torch.tensor([wanted(*wiring.ends(edge)) for edge in range(wiring.edges)])


@family
def test_no_edge_is_the_run_itself_and_all_edges_are_the_other(make):
    wiring = Wiring(of_model(make()))
    (here_B, here), (there_B, there) = wiring.written(batch()), wiring.written(batch(seed=1))
    assert float((here_B - there_B).abs().min()) > 0.1
    torch.testing.assert_close(wiring.rewired(batch(), there, none(wiring)), here_B, rtol=0, atol=0)
    torch.testing.assert_close(wiring.rewired(batch(), there, ~none(wiring)), there_B, rtol=0, atol=1e-5)
    torch.testing.assert_close(wiring.rewired(batch(), here, ~none(wiring)), here_B, rtol=0, atol=1e-5)


@family
def test_all_edges_of_a_writer_are_activation_patching_and_so_are_all_edges_into_it(make):
    subject, rows = of_model(make()), batch()
    wiring, source = Wiring(subject), record(subject, batch(seed=1))
    there = wiring.written(batch(seed=1))[1]
    for layer in range(2):
        mlp = patched(subject, rows, source, {Site(layer, "neurons"): None})
        heads = patched(subject, rows, source, {Site(layer, "heads"): None})
        one = patched(subject, rows, source, {Site(layer, "heads"): torch.tensor([1])})
        for found, wanted in (
            (mlp, lambda writer, _, n=layer: writer == f"L{n}.MLP"),
            (mlp, lambda _, reader, n=layer: reader == f"L{n}.MLP"),
            (heads, lambda writer, _, n=layer: writer.startswith(f"L{n}.H")),
            (heads, lambda _, reader, n=layer: reader[:4] in (f"L{n}.Q", f"L{n}.K", f"L{n}.V")),
            (one, lambda writer, _, n=layer: writer == f"L{n}.H1"),
        ):
            again = wiring.rewired(rows, there, chosen(wiring, wanted))
            torch.testing.assert_close(again, found, rtol=0, atol=1e-5)
            assert float((again - record(subject, rows).measured_B).abs().max()) > 1e-3


@family
@pytest.mark.parametrize(("rule", "steps"), [("atp", 1), ("relp", 1), ("atp", 3)])
def test_a_writer_s_edges_add_up_to_its_own_score(make, rule, steps):
    """The chain rule: what a writer adds goes into all later readers, and nowhere else."""
    subject, rows, others = of_model(make()), batch(), batch(seed=1)
    wiring = Wiring(subject)
    scores = wiring.split(edge_scores(wiring, rows, others, ONES, rule=rule, steps=steps))
    sums = sum(nn.functional.pad(s.sum(0), (0, len(wiring.writers) - s.shape[1])) for s in scores)
    runs = record(subject, others), record(subject, rows)
    nodes = {s: x.sum(0) for s, x in attribute(subject, rows, *runs, rule=rule, steps=steps).items()}
    found = [nodes[EMBEDDINGS]]
    for layer in range(2):
        found += [nodes[Site(layer, "heads")], nodes[Site(layer, "neurons")].sum()[None]]
    found[0] = found[0] if make is not gpt2 else sums[:1]  # positions are added to what is asked there
    torch.testing.assert_close(sums, torch.cat(found), atol=2e-5, rtol=1e-4)
    assert float(sums.abs().max()) > 0.1


@pytest.mark.parametrize(("rule", "gate"), [("atp", 1.2), ("relp", 0.0)])
def test_of_a_linear_model_every_edge_is_exact(rule, gate):
    model = linear_model(gate)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()
    wiring, rows, others = Wiring(of_model(model)), batch(), batch(seed=1)
    scores = edge_scores(wiring, rows, others, ONES, rule=rule)
    (own_B, _), (_, there) = wiring.written(rows), wiring.written(others)
    singles = torch.eye(wiring.edges, dtype=torch.bool)
    exact = torch.stack([(wiring.rewired(rows, there, one) - own_B).sum() for one in singles])
    torch.testing.assert_close(scores, exact, atol=1e-5, rtol=1e-4)
    assert float(scores.abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_a_small_step_along_an_edge_is_what_the_gradient_says(kind):
    wiring, rows, others = Wiring(of_model(FAMILIES[kind]())), batch(), batch(seed=1)
    scores = edge_scores(wiring, rows, others, ONES, rule="atp")
    (own_B, here), (_, there) = wiring.written(rows), wiring.written(others)
    near = torch.lerp(here, there, 0.001)
    for edge in scores.abs().argsort(descending=True)[:20]:
        one = none(wiring)
        one[edge] = True
        step = float((wiring.rewired(rows, near, one) - own_B).sum()) / 0.001
        assert step == pytest.approx(float(scores[edge]), rel=0.05, abs=2e-3), wiring.ends(int(edge))


def wired_pair():
    clean, corrupt = (torch.tensor([[5, a, 6, b], [7, a, 8, b]]) for a, b in ((3, 4), (9, 10)))
    return [Batch(ids, torch.ones_like(ids).bool()) for ids in (corrupt, clean)]


KNOWN = {("embeddings", "L0.MLP"), ("L0.MLP", "output"), ("embeddings", "L1.V1"), (f"L1.H{HEAD}", "output")}


@pytest.mark.parametrize("rule", ["atp", "relp"])
def test_of_a_wired_model_the_known_edges_come_first(rule):
    wiring = Wiring(of_model(wired()))
    rows, source = wired_pair()
    scores = edge_scores(wiring, rows, source, torch.ones(2), rule=rule, steps=5).abs()
    known = chosen(wiring, lambda writer, reader: (writer, reader) in KNOWN)
    assert int(known.sum()) == 4
    assert auroc(scores[~known], scores[known]).mean == 1


def test_grouped_keys_are_the_same_model_with_each_key_repeated():
    grouped = llama()
    repeated = llama(num_key_value_heads=4)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    found = []
    for model in (grouped, repeated):
        wiring = Wiring(of_model(model))
        found.append(wiring.split(edge_scores(wiring, batch(), batch(seed=1), ONES, rule="atp")))
    for one, two in zip(*found, strict=True):
        added = two if len(one) == len(two) else two.unflatten(0, (2, 2)).sum(1)
        torch.testing.assert_close(one, added, atol=1e-5, rtol=1e-4)


def test_equal_rows_have_no_edges_and_positions_add_up():
    wiring = Wiring(of_model(llama()))
    assert float(edge_scores(wiring, batch(), batch(), ONES, rule="atp").abs().max()) == 0
    weights = torch.tensor([1.0, -0.5, 0.0])
    scores = edge_scores(wiring, batch(), batch(seed=1), weights, rule="atp")
    apart = edge_scores(wiring, batch(), batch(seed=1), weights, rule="atp", by_position=True)
    assert apart.shape == (wiring.edges, 7)
    torch.testing.assert_close(apart.sum(1), scores, atol=1e-5, rtol=1e-4)
    alone = [
        edge_scores(wiring, batch().rows(row), batch(seed=1).rows(row), ONES[:1], rule="atp")
        for row in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(alone[0] - 0.5 * alone[1], scores, atol=1e-5, rtol=1e-4)


def test_the_edges_of_a_layer_begin_where_they_should():
    wiring = Wiring(of_model(llama()))
    assert wiring.edges == (4 + 2 + 2) * 1 + 5 + (4 + 2 + 2) * 6 + 10 + 11
    names = {wiring.ends(edge) for edge in range(wiring.edges)}
    assert len(names) == wiring.edges
    assert ("L0.H3", "L0.MLP") in names
    assert not {("L0.MLP", "L0.MLP"), ("L0.H0", "L0.Q1"), ("L1.H0", "L1.V0")} & names
    parallel = Wiring(of_model(neox(True)))
    assert ("L0.H3", "L0.MLP") not in {parallel.ends(edge) for edge in range(parallel.edges)}
    with pytest.raises(IndexError):
        wiring.ends(wiring.edges)


def test_a_family_with_other_norms_is_told():
    model = llama()
    model.model.layers[0].before = model.model.layers[0].input_layernorm
    del model.model.layers[0].input_layernorm
    with pytest.raises(UserError, match="has none of input_layernorm, ln_1"):
        Wiring(of_model(model))
