"""The reward model as others load it, as it is trained, and what it is held against."""

import json
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import stage, tiny_recipe
from safetensors.torch import load_file
from torch import nn

import reward.fit
from reward import train
from reward.batches import collate, encode
from reward.model import TextRewardModel, head_of, new_reward_model, read_card, scores_of
from reward.probe import fit_probe
from reward.trainer import RankedRewardTrainer
from rlhf.artifacts import read_json
from rlhf.backbone import HEAD, WEIGHTS, Backbone
from rlhf.base import load_base
from rlhf.comparisons import Counts
from rlhf.dialogue import load_dialogue
from rlhf.errors import UserError
from rlhf.sequences import right_pad
from rlhf.sources.native import read_native

MODEL = "runs/tiny/reward/model"
FRESH = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

rows = json.loads(sys.stdin.read())
base = AutoModelForSequenceClassification.from_pretrained("models/tiny", num_labels=1)
model = PeftModel.from_pretrained(base, "runs/tiny/reward/model").eval()
width = max(map(len, rows))
ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
with torch.no_grad():
    batch = model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    single = [model(input_ids=torch.tensor([row])).logits[0, 0].item() for row in rows]
print(json.dumps([batch, single]))
"""


def contract():
    recipe = tiny_recipe()
    return recipe, load_dialogue(recipe)


def comparisons(part="train"):
    return read_native(f"runs/tiny/comparisons/{part}.jsonl", "stop", Counts())


@pytest.fixture
def in_road(road, monkeypatch):
    monkeypatch.chdir(road)
    return road


def test_a_fresh_process_without_this_project_gets_the_same_scores(in_road):
    recipe, dialogue = contract()
    some = comparisons()[:5]
    prompts = [c.prompt for c in some for _ in c.responses]
    responses = [r for c in some for r in c.responses]
    rows = [row for e in encode(some, dialogue) for row in e["responses"]]
    assert len({len(row) for row in rows}) > 1
    done = subprocess.run(
        [sys.executable, "-c", FRESH], input=json.dumps(rows), capture_output=True, text=True, check=True
    )
    batch, single = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(batch, single, rtol=0, atol=1e-4)

    folder = in_road / MODEL
    offset = read_card(folder).offset
    ours = TextRewardModel(folder).score(prompts, responses)
    torch.testing.assert_close(ours, batch + offset, rtol=0, atol=1e-4)
    assert float(ours.std()) > 0.1

    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["reward"], heads=["reward"])
    backbone.load_adapter("reward", folder)
    backbone.set_offset("reward", offset)
    with torch.no_grad():
        shared = backbone("reward", *right_pad(rows, dialogue.pad_id))
    torch.testing.assert_close(shared, batch + offset, rtol=0, atol=1e-4)


def test_training_moved_every_part_of_the_adapter(in_road):
    saved = load_file(in_road / MODEL / WEIGHTS)
    moved = [name for name in saved if "lora_B" in name]
    assert len(moved) == 7 * 2  # modules of a layer, adapted layers
    assert all(bool(saved[name].any()) for name in moved)
    assert saved[f"{HEAD}.weight"].shape == (1, 32)


def test_the_folder_says_what_it_is(in_road):
    _, dialogue = contract()
    card = read_card(in_road / MODEL)
    assert card.base == "models/tiny"
    assert card.contract == dialogue.fingerprint()
    assert (card.template, card.max_prompt_tokens, card.max_response_tokens) == ("plain", 96, 8)
    with pytest.raises(UserError, match="make reward"):
        read_card(in_road / "models")
    results = read_json(in_road / "runs/tiny/reward/manifest.json")["results"]
    assert results["reload_gap"] < 1e-4
    assert (results["gain"], results["offset"]) == (card.gain, card.offset)
    for name in ("held_out_accuracy", "train_accuracy", "probe_accuracy"):
        assert 0 <= results[name]["mean"] <= 1


def test_the_reported_accuracy_is_that_of_the_saved_scores(in_road):
    results = read_json(in_road / "runs/tiny/reward/manifest.json")["results"]
    model, right, pairs = TextRewardModel(in_road / MODEL), 0.0, 0
    for c in comparisons("held_out"):
        scores = model.score([c.prompt] * len(c.responses), c.responses).tolist()
        for i, mine in enumerate(scores):
            for j, other in enumerate(scores):
                if c.ranks[i] < c.ranks[j]:
                    pairs += 1
                    right += 1.0 if mine > other else 0.5 if mine == other else 0.0
    assert pairs > 10
    assert results["held_out_accuracy"]["mean"] == pytest.approx(right / pairs)


@pytest.fixture
def retrained(road, tmp_path, monkeypatch):
    """Runs the reward stage again on the road's comparisons; returns where its model is."""

    def run(name, *overrides):
        folder = tmp_path / name
        shutil.copytree(road / "models", folder / "models")
        shutil.copytree(road / "runs/tiny/comparisons", folder / "runs/tiny/comparisons")
        monkeypatch.chdir(folder)
        stage(train.main, "reward.probe=false", *overrides)
        return folder / MODEL

    return run


def test_micro_batches_do_not_change_the_weights(retrained):
    whole, parts = (
        load_file(retrained(name, f"reward.micro_batch_size={name}") / WEIGHTS) for name in ("8", "2")
    )
    assert set(whole) == set(parts)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_scores_have_mean_0_and_variance_1_and_the_gain_changes_no_comparison(retrained, monkeypatch):
    folder = retrained("normal", "reward.reference_responses=100000")
    some = comparisons()
    prompts = [c.prompt for c in some for _ in c.responses]
    responses = [r for c in some for r in c.responses]
    scores = TextRewardModel(folder).score(prompts, responses)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.var(correction=0)) == pytest.approx(1, abs=1e-3)

    monkeypatch.setattr(reward.fit, "normalisation", lambda _: (1.0, 0.0))
    raw = TextRewardModel(retrained("raw", "reward.reference_responses=100000")).score(prompts, responses)
    card = read_card(folder)
    assert card.gain > 0
    assert abs(card.gain - 1) > 0.05
    torch.testing.assert_close(scores, card.gain * raw + card.offset, rtol=0, atol=1e-4)
    assert scores.argsort(stable=True).tolist() == raw.argsort(stable=True).tolist()


def test_a_training_that_made_all_scores_equal_is_an_error_with_a_remedy(retrained, monkeypatch):
    monkeypatch.setattr(reward.fit, "scores_of", lambda model, rows, pad_id: torch.zeros(len(rows)))
    with pytest.raises(UserError, match=r"lower reward\.learning_rate"):
        retrained("flat")


def test_the_loss_is_that_of_a_double_loop_and_each_response_is_forwarded_once(in_road):
    recipe, dialogue = contract()
    model = new_reward_model(recipe, dialogue).eval()
    examples = [
        {"responses": [[5, 6, 1], [7, 8, 9, 1]], "ranks": [1, 0]},
        {"responses": [[5, 1], [6, 7, 1], [8, 1], [9, 9, 9, 1]], "ranks": [0, 2, 1, 1]},
        {"responses": [[10, 11, 1], [12, 1], [13, 14, 1]], "ranks": [2, 0, 1]},
    ]
    expected, right, pairs = 0.0, 0, 0
    for example in examples:
        with torch.no_grad():
            scores = [float(model(input_ids=torch.tensor([row])).logits) for row in example["responses"]]
        terms = []
        for i, mine in enumerate(scores):
            for j, other in enumerate(scores):
                if example["ranks"][i] < example["ranks"][j]:
                    terms.append(-float(nn.functional.logsigmoid(torch.tensor(mine - other))))
                    right += mine > other
        expected += sum(terms) / len(terms) / len(examples)
        pairs += len(terms)

    forwarded = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: forwarded.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    seen = {"loss": 0.0, "correct": 0.0, "pairs": 0.0, "comparisons": 0.0}
    batch = collate(examples, dialogue.pad_id)._asdict()
    loss = RankedRewardTrainer.compute_loss(SimpleNamespace(_seen=seen), model, batch)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert forwarded == [9]
    assert seen == {
        "loss": pytest.approx(3 * expected, abs=1e-4),
        "correct": right,
        "pairs": pairs,
        "comparisons": 3,
    }
    assert pairs == 1 + 5 + 3
    loss.backward()
    assert bool(head_of(model).weight.grad.any())


def test_scores_keep_their_order_whatever_the_batches(in_road, monkeypatch):
    recipe, dialogue = contract()
    model = new_reward_model(recipe, dialogue).eval()
    rows = [[5, 6, 1], [7, 1], [8, 9, 10, 11, 1], [12, 13, 1]]
    together = scores_of(model, rows, dialogue.pad_id)
    monkeypatch.setattr("reward.model.TOKENS_AT_ONCE", 1)
    torch.testing.assert_close(scores_of(model, rows, dialogue.pad_id), together, rtol=0, atol=1e-5)
    assert len(set(together.tolist())) == 4


def test_a_fresh_head_has_the_spread_of_the_papers(in_road):
    weights = []
    for seed in range(12):
        recipe = tiny_recipe(f"seed={seed}")
        model = new_reward_model(recipe, load_dialogue(recipe))
        assert head_of(model).bias is None
        assert head_of(model).weight.requires_grad
        weights.append(head_of(model).weight.detach().flatten())
    drawn = torch.cat(weights)
    expected = (32 + 1) ** -0.5
    assert float(drawn.std()) == pytest.approx(expected, abs=4 * expected / (2 * len(drawn)) ** 0.5)
    assert len({tuple(w.tolist()) for w in weights}) == 12


class Bag(nn.Module):
    """A decoder whose last hidden state is the sum of random vectors, one a token."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(40, 12, generator=generator))

    def forward(self, input_ids, attention_mask, **_):
        hidden = (self.table[input_ids] * attention_mask[..., None]).cumsum(dim=1)
        return SimpleNamespace(last_hidden_state=hidden)


def labelled(number, seed, rank):
    rng = random.Random(seed)
    examples = []
    for _ in range(number):
        rows = [[rng.randrange(2, 30) for _ in range(rng.randint(1, 4))] + [1] for _ in range(3)]
        examples.append({"responses": rows, "ranks": rank(rows, rng)})
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
