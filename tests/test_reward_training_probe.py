"""The linear probe on frozen features, which a reward model is held against."""

import random
from types import SimpleNamespace

import pytest
import torch
from preference_cases import EOS, awake, cases, rows_of_all, tiny
from torch import nn

from reward.training.probe import features, fit_probe

MIXED = cases(6, 41)


class Bag(nn.Module):
    """A reward model whose last hidden state is the sum of random vectors, one a token."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(40, 12, generator=generator))
        config = SimpleNamespace(get_text_config=lambda: None)
        self.base_model = SimpleNamespace(model=SimpleNamespace(dtype=torch.float32, config=config))

    def forward(self, input_ids, attention_mask, rows_B, columns_B, **_):
        hidden = (self.table[input_ids] * attention_mask[..., None]).cumsum(dim=1)
        return hidden, hidden[rows_B, columns_B, 0]


def labelled(number, seed, rank):
    rng = random.Random(seed)
    examples = []
    for _ in range(number):
        rows = [[rng.randrange(2, 30) for _ in range(rng.randint(1, 4))] + [EOS] for _ in range(3)]
        examples.append({"prompt": [], "responses": rows, "ranks": rank(rows, rng), "index": len(examples)})
    return examples


def by_feature(rows, rng):
    """The better response is the one further along one direction of the features."""
    table = Bag().table.detach()
    scores = [-float(table[row].sum(0)[3]) for row in rows]
    return [sorted(scores).index(s) for s in scores]


def by_chance(rows, rng):
    return rng.sample(range(3), 3)


def test_the_probe_finds_a_label_that_is_in_the_features_and_none_that_is_not():
    found = fit_probe(Bag(), labelled(120, 1, by_feature), labelled(60, 2, by_feature), 0).accuracy
    assert found.mean > 0.9
    assert found.low <= found.mean <= found.high
    chance = fit_probe(Bag(), labelled(200, 3, by_chance), labelled(200, 4, by_chance), 0).accuracy
    assert chance.low < 0.5 < chance.high
    assert abs(chance.mean - 0.5) < 0.1


@pytest.mark.parametrize("share", [True, False])
def test_the_features_are_the_states_at_the_closing_tokens_in_order(share):
    model = awake(*tiny())
    found = features(model, MIXED[::-1], 0, share=share)
    with torch.no_grad():
        expected = [
            model.base_model.model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            for row in rows_of_all(MIXED[::-1])
        ]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
