"""The linear probe on frozen features, which a reward model is held against."""

import random
from types import SimpleNamespace

import pytest
import torch
from families import write_family
from preference_cases import EOS, awake, cases, rows_of_all, tiny
from torch import nn

from reward.model.batch import layout
from reward.model.model import new_reward_model
from reward.model.trunk_cache import build_trunk
from reward.training.features import POOLINGS, Features, features, spread_layers
from reward.training.probe import _fit, cross_validated, fit_pairs, fit_probe, folds_of, pairs_of
from rlhf.recipe.schema import Lora, Model

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


def labeled(number, seed, rank):
    rng = random.Random(seed)
    examples = []
    for _ in range(number):
        rows = [[rng.randrange(2, 30) for _ in range(rng.randint(1, 4))] + [EOS] for _ in range(3)]
        examples.append(
            {
                "prompt": [],
                "responses": rows,
                "spoken": [1] * len(rows),
                "ranks": rank(rows, rng),
                "index": len(examples),
            }
        )
    return examples


def by_feature(rows, rng):
    """The better response is the one further along one direction of the features."""
    table = Bag().table.detach()
    scores = [-float(table[row].sum(0)[3]) for row in rows]
    return [sorted(scores).index(s) for s in scores]


def by_chance(rows, rng):
    return rng.sample(range(3), 3)


def test_the_probe_finds_a_label_that_is_in_the_features_and_none_that_is_not():
    found = fit_probe(Bag(), labeled(120, 1, by_feature), labeled(60, 2, by_feature), 0).accuracy
    assert found["mean"] > 0.9
    assert found["ci95"][0] <= found["mean"] <= found["ci95"][1]
    chance = fit_probe(Bag(), labeled(200, 3, by_chance), labeled(200, 4, by_chance), 0).accuracy
    assert chance["ci95"][0] < 0.5 < chance["ci95"][1]
    assert abs(chance["mean"] - 0.5) < 0.1


@pytest.mark.parametrize("share", [True, False])
def test_the_features_are_the_states_at_the_closing_tokens_in_order(share):
    model = awake(*tiny())
    found = features(model, MIXED[::-1], 0, share=share)
    with torch.no_grad():
        expected = [
            model.base_model.model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            for row in rows_of_all(MIXED[::-1])
        ]
    torch.testing.assert_close(found.last_RD, torch.stack(expected), rtol=1e-4, atol=1e-4)


# --- layers and poolings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gpt2", "opt_350m", "falcon", "granite", "gemma3_vision"]
)
@pytest.mark.parametrize("share", [True, False])
def test_a_layer_is_read_as_a_model_of_so_many_layers_reads_it(name, share, tmp_path):
    write_family(name, tmp_path)
    recipe = SimpleNamespace(model=Model(path=str(tmp_path)), lora=Lora(rank=2), seed=0)
    dialogue = SimpleNamespace(pad_id=0)
    some = MIXED[::-1][:3]
    found = features(new_reward_model(recipe, dialogue), some, 0, [1, 2, 3], share=share)
    assert found.layers == [1, 2, 3]
    rows = [(len(e["prompt"]), [*e["prompt"], *response]) for e in some for response in e["responses"]]
    for index, layers in enumerate(found.layers):
        decoder = new_reward_model(recipe, dialogue, layers=layers).base_model.model.get_decoder()
        for place, (said, row) in enumerate(rows):
            with torch.no_grad():
                states = decoder(input_ids=torch.tensor([row])).last_hidden_state[0]
            for pooling, right in enumerate((states[-1], states[said:].mean(0))):
                mine = found.pooled_LPRD[index, pooling, place].float()
                torch.testing.assert_close(mine, right, rtol=3e-3, atol=3e-3)


def test_what_lies_above_the_trunk_is_read_from_it():
    recipe, dialogue = tiny("lora.layers=top_2")
    model = new_reward_model(recipe, dialogue)
    trunk = build_trunk(recipe, recipe.reward, model, MIXED, 0, share=True)
    for found, right in zip(
        features(model, MIXED, 0, [2, 3], share=True, trunk=trunk),
        features(model, MIXED, 0, [2, 3]),
        strict=True,
    ):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(right), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("k", [2, 5])
def test_the_closed_gradient_finds_what_the_loss_itself_does(k):
    examples = cases(30, 3, responses=(k, k))
    x = torch.randn(sum(len(e["responses"]) for e in examples), 7, generator=torch.Generator().manual_seed(0))
    pairs, chosen = pairs_of(examples), examples[::2]
    half = torch.tensor([float(owner % 2 == 0) for owner in pairs.owner_P])
    columns = torch.stack([pairs.weight_P, pairs.weight_P, pairs.weight_P * half], dim=1)
    found = fit_pairs(x, pairs, columns, torch.tensor([1.0, 0.01, 0.1]))
    places = torch.cat([torch.arange(k) + k * n for n in range(0, 30, 2)])
    for mine, right in zip(
        found,
        (
            _fit(x, layout(examples), 1.0),
            _fit(x, layout(examples), 0.01),
            _fit(x[places], layout(chosen), 0.1),
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=4e-3)


def test_a_group_is_in_one_fold_and_a_prompt_where_there_is_none():
    examples = [{"prompt": [n % 13], "group": f"g{n % 7}" if n < 40 else None} for n in range(80)]
    fold_B = folds_of(examples)
    for key in (lambda e: e["group"], lambda e: e["group"] is None and e["prompt"][0]):
        for value in {key(e) for e in examples} - {None, False}:
            assert len({int(f) for f, e in zip(fold_B, examples, strict=True) if key(e) == value}) == 1
    sizes = torch.bincount(fold_B)
    assert len(sizes) == 5
    assert int(sizes.max() - sizes.min()) < 10
    assert int(folds_of(examples[:3]).max()) == 2
    assert sorted(folds_of([examples[0]] * 4).tolist()) == [0, 1, 2, 3]  # one group: by comparison
    assert folds_of(examples[:1]).tolist() == [0]


def test_cross_validation_finds_the_layer_and_the_pooling_that_hold_the_label_and_no_other():
    examples = [{**e, "prompt": [n]} for n, e in enumerate(labeled(90, 1, by_chance))]
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, sum(len(e["responses"]) for e in examples), 60, generator=generator)
    ranks = torch.tensor([rank for e in examples for rank in e["ranks"]])
    states[1, 1, :, 4] -= 2.0 * ranks
    table = cross_validated(Features(states[2, 0], [4, 8, 12], states.half()), examples)
    assert [(row["layer"], row["pooling"]) for row in table] == [(n, p) for n in (4, 8, 12) for p in POOLINGS]
    best = max(table, key=lambda row: row["accuracy"])
    assert (best["layer"], best["pooling"]) == (8, "mean over the response")
    assert best["accuracy"] > 0.9
    assert all(row["accuracy"] < 0.62 for row in table if row is not best)  # judged on what it has not seen


def test_the_layers_are_spread_and_as_many_as_there_is_room_for():
    found = spread_layers(1, 30, 1000, 576)
    assert (found[0], found[-1], len(found)) == (1, 30, 10)
    assert spread_layers(23, 30, 1000, 576) == list(range(23, 31))
    assert spread_layers(1, 32, 100_000, 4096) == [32]
    assert spread_layers(3, 3, 10, 8) == [3]
