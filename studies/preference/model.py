"""The models of the ladder: decoder-only transformers of L layers and width 128 L, with a scalar head beside.

GPT-2's block has exactly the 12 d^2 weights of :mod:`studies.engine.ladder` (4 d^2 attention, 8 d^2 MLP of
width 4 d), and 13 d biases and layer-norm parameters.

Suffixes: ``_B`` sentence, ``_T`` token, ``_D`` hidden unit. Masks: True = a real token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from reward.loss import head_init_std
from rlhf.models.log_probs import token_log_probs
from rlhf.models.masks import last_true_index
from studies.engine.ladder import HEAD_WIDTH, WIDTH_PER_LAYER
from studies.preference.data import END, PAD, VOCABULARY, WIDTH


class Rung(nn.Module):
    """One model of the ladder: a language model with tied embeddings, and a score read at END."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        width = WIDTH_PER_LAYER * layers
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=WIDTH,
            n_embd=width,
            n_layer=layers,
            n_head=width // HEAD_WIDTH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        self.body = GPT2Model(config)
        self.body.set_attn_implementation("eager")  # as fast as any at this length, and the plainest
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=head_init_std(width))
        nn.init.zeros_(self.head.bias)

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Last hidden states [B, T, D]. The rows are padded on the right."""
        return self.body(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).last_hidden_state

    def score(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Score of every sentence [B], higher is better: the scalar head on the last real token, END."""
        hidden_BTD = self.hidden(ids_BT, mask_BT)
        last_B = last_true_index(mask_BT)
        return self.head(hidden_BTD[torch.arange(len(last_B)), last_B]).squeeze(-1)

    def log_probs(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of every token after START and the topic: (logp, mask), both [B, T - 2]."""
        hidden_BTD = self.hidden(ids_BT, mask_BT)[:, 1:-1]
        mask = mask_BT[:, 2:]
        logp, _ = token_log_probs(
            hidden_BTD, self._vocabulary, ids_BT[:, 2:], mask, temperature=1.0, chunk=mask.numel()
        )
        return logp, mask

    def _vocabulary(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND @ self.body.wte.weight.T


def make_rung(layers: int, seed: int) -> Rung:
    """A fresh model whose initial weights depend on (layers, seed) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Rung(layers)


def count(model: Rung) -> dict[str, int]:
    """Parameters: in the matrices of the layers, in the layers with biases and norms, in total."""
    blocks = list(model.body.h.parameters())
    return {
        "matrix_weights": sum(p.numel() for p in blocks if p.dim() == 2),
        "non_embedding_parameters": sum(p.numel() for p in [*blocks, *model.body.ln_f.parameters()]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
