"""Small models for looking inside: random ones, one wired by hand, one that is linear in its parts."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from policy.inside.patching import patched, record
from policy.inside.subject import Batch

HEAD, NEURON = 2, 5  # what the wired model computes with: a head of layer 1 and a neuron of layer 0


def llama(kind=LlamaForCausalLM, *, seed=0, scale=0.3, **changes):
    """A random Llama of two layers with grouped-query attention."""
    shape = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None}
    config = LlamaConfig(
        **{**shape, "eos_token_id": 1, "num_labels": 1, "initializer_range": scale, **changes}
    )
    torch.manual_seed(seed)
    return kind(config).eval()


def batch(rows=3, length=7, seed=0):
    """Random rows without padding; the response begins at column 4 and is the same for every seed."""
    ids = torch.randint(2, 12, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :4] = torch.randint(2, 12, (rows, 4), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), 4)


def effect(subject, rows, source, chosen):
    """The share of the whole change that a patch makes, over all rows."""
    own = record(subject, rows).measured_B.sum()
    return float((patched(subject, rows, source, chosen).sum() - own) / (source.measured_B.sum() - own))


@torch.no_grad()
def wired():
    """A reward model in which one head copies token 3 to the end and one neuron says whether the last token
    is 4; everything else is a hundredth of that."""
    model = llama(LlamaForSequenceClassification, scale=0.01)
    decoder = model.model
    embeddings = decoder.embed_tokens.weight
    embeddings[:] = 0
    embeddings[:, 0] = 1  # of length 1 whatever the token, so that norms change little
    embeddings[3, 1] = embeddings[4, 2] = 1
    mlp, attention = decoder.layers[0].mlp, decoder.layers[1].self_attn
    mlp.gate_proj.weight[NEURON, 2] = mlp.up_proj.weight[NEURON, 2] = mlp.down_proj.weight[3, NEURON] = 1
    attention.v_proj.weight[4, 1] = 4  # first unit of kv group 1, which heads 2 and 3 read
    attention.o_proj.weight[4, 4 * HEAD] = 4
    model.score.weight[:] = 0
    model.score.weight[0, 3] = model.score.weight[0, 4] = 1
    return model


@torch.no_grad()
def linear_model(gate=1.2):
    """A reward model that is linear in what heads and neurons add: no norms, even attention, constant gates;
    without gates there are heads alone."""
    model = llama(LlamaForSequenceClassification, mlp_bias=True)
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        layer.self_attn.q_proj.weight.zero_()
        layer.mlp.gate_proj.weight.zero_()
        layer.mlp.gate_proj.bias.fill_(gate)
    model.model.norm = nn.Identity()
    return model
