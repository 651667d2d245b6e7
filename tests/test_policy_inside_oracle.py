"""Estimates and exact patching against TransformerLens, where it is installed: `pip install .[oracle]`."""

import copy

import pytest
import torch
from tiny_inside import batch, llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from policy.inside.attribution import attribute
from policy.inside.patching import patched, record
from policy.inside.subject import Site, of_model

bridges = pytest.importorskip("transformer_lens.model_bridge", reason="needs the extra `oracle`")
attribution = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")

START = 4  # first column of the responses of `batch`


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A random Llama of three layers as our subject, and a bridge over its copy."""
    model, folder = llama(num_hidden_layers=3, attn_implementation="eager"), tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    words = models.WordLevel({f"w{n}": n for n in range(12)}, unk_token="w0")
    names = {"pad_token": "w0", "eos_token": "w1", "unk_token": "w0"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **names)
    options = {"hf_model": copy.deepcopy(model), "tokenizer": tokenizer, "device": "cpu"}
    return of_model(model), bridges.TransformerBridge.boot_transformers(str(folder), **options).eval()


def log_prob(logits_BTV):
    """Of the response that all rows of `batch` have, summed over the rows."""
    own_BR1 = batch().ids_BT[: len(logits_BTV), START:-1, None]
    return logits_BTV[:, START - 1 : -2].log_softmax(-1).gather(-1, own_BR1).sum()


def one_row():
    """A row and another with a different prompt, since their metric reads the response of the first row."""
    return batch(rows=1), batch(rows=1, seed=1)


def test_node_attribution_is_that_of_transformerlens(both):
    subject, bridge = both
    rows, others = one_row()
    theirs = attribution.attribution_patch(bridge, others.ids_BT, rows.ids_BT, log_prob).node_scores
    ours = attribute(subject, rows, record(subject, others), record(subject, rows), rule="atp")
    summed = {}
    for node, score in theirs.items():
        key = (node.kind, node.layer, node.head)
        summed[key] = summed.get(key, 0) + float(score)
    assert len(summed) == 1 + 3 * (4 + 1)
    for (kind, layer, head), score in summed.items():
        site = Site(-1 if layer is None else layer, "heads" if kind == "attn_head_out" else "neurons")
        found = ours[site if kind != "embed" else Site(-1, "embeddings")][0]
        assert float(found.sum() if head is None else found[head]) == pytest.approx(score, abs=2e-5)
    assert max(map(abs, summed.values())) > 0.1


@torch.no_grad()
def test_exact_patching_is_that_of_transformerlens(both):
    subject, bridge = both
    rows, others = one_row()
    source, cache = record(subject, others), bridge.run_with_cache(others.ids_BT)[1]
    found = []
    for layer in range(3):
        for unit in (0, 1, 2, 3, None):
            name = f"blocks.{layer}.attn.hook_z" if unit is not None else f"blocks.{layer}.hook_mlp_out"

            def put(value, hook=None, *, name=name, unit=unit):
                if unit is None:
                    return cache[name]
                value = value.clone()
                value[:, :, unit] = cache[name][:, :, unit]
                return value

            theirs = log_prob(bridge.run_with_hooks(rows.ids_BT, fwd_hooks=[(name, put)]))
            site = Site(layer, "neurons" if unit is None else "heads")
            chosen = {site: None if unit is None else torch.tensor([unit])}
            found.append((float(patched(subject, rows, source, chosen)[0]), float(theirs)))
    ours, theirs = zip(*found, strict=True)
    assert ours == pytest.approx(theirs, abs=2e-5)
    assert max(ours) - min(ours) > 0.1
