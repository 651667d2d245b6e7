"""Circuits on their own, against MIB's definitions by hand and a circuit that is known; the picture."""

import numpy as np
import pytest
import torch
from lxml import etree
from test_policy_inside_circuit_edges import KNOWN, chosen, none, wired_pair
from tiny_inside import batch, llama, wired

from policy.inside.circuit.drawing import as_svg
from policy.inside.circuit.edges import edge_scores
from policy.inside.circuit.faithfulness import PERCENTS, areas, curve, find_circuit, measured, runs_of, sizes
from policy.inside.circuit.wiring import Wiring
from policy.inside.subject import of_model
from rlhf.errors import UserError


def test_areas_by_hand():
    line = [percent / 100 for percent in PERCENTS]  # f = k: a triangle less its tip
    assert areas(line) == pytest.approx(((1 - 0.001**2) / 2, (1 - 0.001) ** 2 / 2))
    assert areas([1.0] * 10) == pytest.approx((0.999, 0))
    assert areas([1.5] * 10) == pytest.approx((1.5 * 0.999, 0.5 * 0.999))  # more than all: CMD alone sees it
    step = [0.0] * 9 + [1.0]
    assert areas(step) == pytest.approx((0.25, 0.499 + 0.25))
    assert sizes(80_000) == [80, 160, 400, 800, 1600, 4000, 8000, 16_000, 40_000, 80_000]
    assert sizes(82) == [0, 0, 0, 0, 1, 4, 8, 16, 41, 82]


def test_the_known_circuit_alone_gives_all_and_without_it_nothing_is_left():
    wiring = Wiring(of_model(wired()))
    rows, source = wired_pair()
    known = chosen(wiring, lambda writer, reader: (writer, reader) in KNOWN)
    order = torch.cat([known.nonzero()[:, 0], (~known).nonzero()[:, 0]])
    found = curve(wiring, [(source, rows)], order)
    assert sizes(wiring.edges)[5] == 4  # 5% are the known ones
    assert found[5] == pytest.approx(1, abs=0.05)
    assert found[9] == pytest.approx(1, abs=1e-6)
    assert found[:4] == [0, 0, 0, 0]  # no edge at all
    assert curve(wiring, [(source, rows)], order.flip(0))[8] == pytest.approx(0, abs=0.05)


def test_f_is_of_the_clean_run_with_all_other_edges_corrupted():
    wiring, clean, corrupt = Wiring(of_model(llama())), batch(), batch(seed=1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(wiring.edges))
    found = curve(wiring, [(clean.rows(slice(0, 2)), corrupt.rows(slice(0, 2))),
                           (clean.rows(slice(2, 3)), corrupt.rows(slice(2, 3)))], order)  # fmt: skip
    (own, _), (others, there) = wiring.written(clean), wiring.written(corrupt)
    rest = ~none(wiring)
    rest[order[:41]] = False
    half = wiring.rewired(clean, there, rest)
    assert found[8] == pytest.approx(float((half - others).sum() / (own - others).sum()), abs=1e-4)
    assert abs(found[8] - 1) > 0.01


def acdc(wiring, rows, source, threshold):
    """Conmy 2023 (arXiv 2304.14997): from the last reader back, drop an edge where the number then changes by
    less than the threshold."""
    circuit, last = ~none(wiring), None
    for edge in reversed(range(wiring.edges)):
        last = measured(wiring, [(source, rows)], [~circuit]).sum() if last is None else last
        circuit[edge] = False
        without = measured(wiring, [(source, rows)], [~circuit]).sum()
        if abs(float(without - last)) < threshold:
            last = without
        else:
            circuit[edge] = True
    return circuit


def test_acdc_and_the_estimate_find_the_same_circuit_of_the_toy():
    wiring = Wiring(of_model(wired()))
    rows, source = wired_pair()
    known = chosen(wiring, lambda writer, reader: (writer, reader) in KNOWN)
    assert torch.equal(acdc(wiring, rows, source, 0.3), known)
    scores = edge_scores(wiring, rows, source, torch.ones(2), rule="atp", steps=5).abs()
    assert set(scores.topk(4).indices.tolist()) == set(known.nonzero()[:, 0].tolist())


def test_what_is_found_of_the_toy():
    wiring, ticks = Wiring(of_model(wired())), []
    pairs = [tuple(side.rows(slice(n, n + 1)) for side in wired_pair()) for n in range(2)]
    found = find_circuit(wiring, pairs, rule="atp", steps=5, seed=0, tick=lambda: ticks.append(1))
    assert len(ticks) == runs_of(pairs, wiring.edges)
    assert {tuple(row["edge"]) for row in found["alone"][:4]} == KNOWN
    for row in found["alone"][:4]:  # one of two equal parts, behind a norm that divides by their length
        assert row["exact"]["mean"] == pytest.approx(2**-0.5, abs=0.02)
    assert min(share for *_, share in found["drawn"]) < 0  # ranked by size, whatever the sign
    assert found["curves"]["first"][5] == pytest.approx(1, abs=0.05)
    assert found["curves"]["random"][5] < 0.5
    assert found["areas"]["first"] == pytest.approx(areas(found["curves"]["first"]))
    assert found["areas"]["first"][0] > found["areas"]["random"][0]
    assert found["areas"]["first"][1] < found["areas"]["random"][1]
    again = find_circuit(wiring, pairs, rule="atp", steps=5, seed=0)
    assert again | {"seconds": 0} == found | {"seconds": 0}
    assert find_circuit(wiring, pairs, rule="atp", steps=5, seed=1)["curves"] != found["curves"]


def test_pairs_without_a_difference_and_models_with_other_streams_are_told():
    wiring = Wiring(of_model(llama()))
    with pytest.raises(UserError, match="a circuit of 3 pairs whose measures do not differ"):
        find_circuit(wiring, [(batch(), batch())], rule="atp", steps=1, seed=0)
    model = llama()
    for layer in model.model.layers:  # as Granite: what an MLP adds is scaled before it is added
        layer.register_forward_hook(lambda _module, _inputs, output: output * 0.5)
    with pytest.raises(UserError, match=r"of LlamaModel add is not all .* set inside\.edges=none"):
        find_circuit(Wiring(of_model(model)), [(batch(), batch(seed=1))], rule="atp", steps=1, seed=0)


def test_the_picture_is_xml_with_every_edge_and_names_escaped():
    edges = [("embeddings", "L0.MLP", 0.5), ("L0.MLP", "L1.V1", -0.25), ("L1.H3", "output", 0.1),
             ("L0.MLP", "L10.K0", 0.1), ("L1.H3", "L10.Q0", 0.1), ("L10.H0", "output", 0.1)]  # fmt: skip
    text = as_svg(edges, "<good> & bad", 2)
    tree = etree.fromstring(text.encode())
    assert tree[0].text == "<good> & bad"
    paths = tree.findall("{*}path")
    titles = {path[0].text: path for path in paths}
    assert len(titles) == 6 + 2  # and gray lines from a key and value to its heads
    assert {"L1.KV1 of L1.H3", "L10.KV0 of L10.H0"} <= set(titles)
    strong, against = titles["embeddings -> L0.MLP: +50.0%"], titles["L0.MLP -> L1.V1: -25.0%"]
    assert float(strong.get("stroke-width")) > float(against.get("stroke-width"))
    assert strong.get("stroke") != against.get("stroke")
    heights = {node.text: float(node.get("y")) for node in tree.findall("{*}text")[1:]}
    order = ["embeddings", "L0.MLP", "L1.KV1", "L1.H3", "L10.KV0", "L10.H0", "output"]
    assert sorted(heights, key=heights.get, reverse=True) == order  # from the bottom, by number
    assert etree.fromstring(as_svg([], "none", 1).encode()) is not None
