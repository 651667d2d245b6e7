"""The reward model as it reads packed rows, as it starts from another, and as others load it."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_recipe
from preference_cases import (
    EOS,
    VOCABULARY,
    asked,
    assert_equal_tensors,
    awake,
    cases,
    encoded,
    gradients,
    ignoring,
    learning,
    plain_scores,
    rows_of_all,
    stored,
    tiny,
    words,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import reward.model.model
from reward.model.batch import encode, pack, rows_of
from reward.model.forward import check_packing, forward_packed, score_examples, scores_of
from reward.model.model import (
    RewardModelConfig,
    TextRewardModel,
    head_of,
    load_classifier,
    load_config,
    new_reward_model,
    save_reward_model,
    start_from,
)
from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base, vocabulary_head
from rlhf.models.masks import right_pad
from rlhf.models.packing import sequence_log_probs
from rlhf.models.tiny import START
from rlhf.runs.artifacts import WEIGHTS, read_json
from rlhf.tokenization.dialogue import load_dialogue

MODEL = "runs/tiny/reward/model"
SHARED = pytest.mark.parametrize("share", [True, False])
MIXED = [*cases(5, 11), *cases(1, 12, responses=(2, 2)), *cases(1, 13, responses=(5, 5))]
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


@pytest.fixture
def model():
    return awake(*tiny())


# --- packed rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "longest"), [(True, 512), (True, 1), (False, 512)])
def test_packed_rows_score_as_the_classifier_does_and_teach_the_same(model, share, longest, monkeypatch):
    monkeypatch.setattr("reward.model.batch._ROW", longest)
    assert any(rows_of(e, share) not in (1, len(e["ranks"])) for e in MIXED) == (longest == 1)
    weights = torch.randn(sum(len(e["ranks"]) for e in MIXED), generator=torch.Generator().manual_seed(0))
    expected = plain_scores(model, MIXED)
    (expected * weights).sum().backward()
    wanted = gradients(model)
    assert set(wanted) == learning(model)
    assert all(bool(gradient.any()) for gradient in wanted.values())

    packed = pack(MIXED, 0, share=share)
    hidden_NTD, scores_R = forward_packed(model, packed)
    assert hidden_NTD.shape == (*packed.ids_NT.shape, 32)
    scores_BK = packed.by_comparison(scores_R)
    assert not scores_BK[~packed.mask_BK].any()
    torch.testing.assert_close(scores_BK[packed.mask_BK], expected, rtol=1e-4, atol=2e-5)
    (scores_BK[packed.mask_BK] * weights).sum().backward()
    assert_equal_tensors(gradients(model), wanted)
    assert len({round(s, 3) for s in expected.tolist()}) > len(expected) // 2


def scalar_log_prob(model, table, example, k):
    """Sum over a response's spoken tokens of the log-softmax over the whole vocabulary, one at a time."""
    row = [*example["prompt"], *example["responses"][k]]
    hidden = model.base_model.model.model(input_ids=torch.tensor([row])).last_hidden_state[0]
    total = torch.zeros(())
    for t in range(example["spoken"][k]):
        place = len(example["prompt"]) + t
        logits = hidden[place - 1] @ table.T
        total = total + logits[row[place]] - logits.exp().sum().log()
    return total


@SHARED
@pytest.mark.parametrize("wanted", ["best", "all"])
def test_log_probs_are_those_of_a_scalar_loop_and_teach_the_same(model, share, wanted):
    recipe, _ = tiny()
    vocabulary = vocabulary_head(recipe, model.base_model.model)
    packed = pack(MIXED, 0, share=share, wanted=wanted)
    sums_R, counts_R = sequence_log_probs(forward_packed(model, packed)[0], packed, vocabulary)
    sums_BK, counts_BK = packed.by_comparison(sums_R), packed.by_comparison(counts_R)
    weights_BK = torch.randn(sums_BK.shape, generator=torch.Generator().manual_seed(1))
    (sums_BK * weights_BK).sum().backward()
    found = gradients(model)

    table = AutoModelForCausalLM.from_pretrained(recipe.model.path).lm_head.weight.detach()
    expected_BK, number_BK = torch.zeros_like(sums_BK), torch.zeros_like(counts_BK)
    loss = torch.zeros(())
    for b, example in enumerate(MIXED):
        for k in range(len(example["ranks"])):
            if wanted == "all" or example["ranks"][k] == min(example["ranks"]):
                value = scalar_log_prob(model, table, example, k)
                loss = loss + weights_BK[b, k] * value
                expected_BK[b, k], number_BK[b, k] = value.detach(), example["spoken"][k]
    loss.backward()
    torch.testing.assert_close(sums_BK.detach(), expected_BK, rtol=1e-4, atol=1e-4)
    assert torch.equal(counts_BK, number_BK)
    expected = gradients(model)
    assert set(expected) == learning(model) - {name for name in learning(model) if "score" in name}
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    found = {n: g for n, g in found.items() if n in expected or g.any()}  # the head says nothing here
    assert_equal_tensors(found, expected, atol=2e-6 * scale)


@SHARED
@pytest.mark.parametrize("tokens", [1, 60, 4096])
def test_scores_keep_their_order_whatever_the_batches(model, share, tokens):
    vocabulary = vocabulary_head(tiny()[0], model.base_model.model)
    backwards = sorted(MIXED, key=lambda e: -len(rows_of_all([e])[0]))
    scores, sums, counts = score_examples(
        model, backwards, 0, share=share, tokens=tokens, vocabulary=vocabulary
    )
    with torch.no_grad():
        expected = plain_scores(model, backwards)
        logps = [
            float(scalar_log_prob(model, vocabulary.weight, e, k))
            for e in backwards
            for k in range(len(e["ranks"]))
        ]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(sums, torch.tensor(logps), rtol=1e-4, atol=1e-4)
    assert counts.tolist() == [said for e in backwards for said in e["spoken"]]
    rows = rows_of_all(backwards)
    torch.testing.assert_close(
        scores_of(model, [([], row) for row in rows], 0), expected, rtol=1e-4, atol=2e-5
    )


def test_packing_is_accepted_where_it_changes_nothing(model):
    assert check_packing(model, MIXED, 0) is None


def test_an_architecture_that_ignores_the_block_mask_is_noticed(model, monkeypatch):
    ignoring(monkeypatch)
    assert "packed rows give other outputs with this architecture (by " in check_packing(model, MIXED, 0)
    with torch.no_grad():  # rows of their own are right as ever
        expected = plain_scores(model, MIXED)
    torch.testing.assert_close(
        score_examples(model, MIXED, 0, share=False)[0], expected, rtol=1e-4, atol=2e-5
    )


def test_a_vocabulary_tied_to_the_embeddings_is_not_copied_and_another_is_the_bases_own(tmp_path):
    recipe, dialogue = tiny()
    model = awake(recipe, dialogue)
    tied = vocabulary_head(recipe, model.base_model.model)
    embedding = model.base_model.model.model.embed_tokens.weight
    assert tied.weight is embedding
    assert not embedding.requires_grad
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=False)
    causal = LlamaForCausalLM(config)
    causal.save_pretrained(tmp_path)
    dialogue.tokenizer.save_pretrained(str(tmp_path))
    recipe = tiny_recipe(f"model.path={tmp_path}")
    own = vocabulary_head(recipe, awake(recipe, dialogue).base_model.model)
    torch.testing.assert_close(own.weight, causal.lm_head.weight, rtol=0, atol=0)
    assert not own.weight.requires_grad
    assert not torch.equal(own.weight, causal.model.embed_tokens.weight)


def test_a_fresh_head_has_the_spread_of_the_papers():
    weights = []
    for seed in range(12):
        model = new_reward_model(*tiny(f"seed={seed}"))
        assert head_of(model).bias is None
        assert head_of(model).weight.requires_grad
        weights.append(head_of(model).weight.detach().flatten())
    drawn = torch.cat(weights)
    expected = (32 + 1) ** -0.5
    assert float(drawn.std()) == pytest.approx(expected, abs=4 * expected / (2 * len(drawn)) ** 0.5)
    assert len({tuple(w.tolist()) for w in weights}) == 12
    again = new_reward_model(*tiny(), 7)  # a seed of its own, as of a member
    assert torch.equal(head_of(again).weight.flatten(), weights[7])


# --- start from a trained one ----------------------------------------------------------------------------


def saved(folder, model, dialogue, recipe, **card):
    said = RewardModelConfig(recipe.model.path, 0.0, 1.0, dialogue.fingerprint(), "plain", 96, 8, **card)
    save_reward_model(model, folder, said, dialogue)
    return folder


def test_a_start_is_the_trained_model_to_the_bit(tmp_path):
    recipe, dialogue = tiny()
    trained = awake(recipe, dialogue)
    folder = saved(tmp_path / "model", trained, dialogue, recipe)
    fresh = new_reward_model(recipe, dialogue, 1).eval()
    examples = encoded(4)
    expected = score_examples(trained, examples, 0)[0]
    assert not torch.equal(score_examples(fresh, examples, 0)[0], expected)
    learns = learning(fresh)
    assert start_from(fresh, folder) == len(load_file(folder / WEIGHTS)) == len(learns)
    assert torch.equal(score_examples(fresh, examples, 0)[0], expected)
    assert learning(fresh) == learns


@pytest.mark.parametrize(
    "other",
    ["lora.rank=2", "lora.layers=all", "lora.layers=top_1", "lora.targets=[q_proj,v_proj]", "lora.alpha=16"],
)
def test_a_start_of_other_lora_settings_is_refused(tmp_path, other):
    recipe, dialogue = tiny(other)
    folder = saved(tmp_path / "model", new_reward_model(recipe, dialogue), dialogue, recipe)
    fresh = new_reward_model(*tiny())
    before = {name: parameter.clone() for name, parameter in fresh.named_parameters()}
    with pytest.raises(UserError, match=r"reward\.start: .* other lora settings or another base"):
        start_from(fresh, folder)
    assert all(torch.equal(before[name], parameter) for name, parameter in fresh.named_parameters())


def test_a_start_that_lacks_its_head_or_has_something_else_is_refused(tmp_path):
    recipe, dialogue = tiny()
    folder = saved(tmp_path / "model", awake(recipe, dialogue), dialogue, recipe)
    whole = load_file(folder / WEIGHTS)
    head = next(name for name in whole if "score" in name)
    without = {name: tensor for name, tensor in whole.items() if name != head}
    wider = whole | {head: torch.zeros(1, 33)}
    for tensors in (without, whole | {"base_model.model.extra": torch.zeros(1)}, wider):
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(UserError, match="does not fit this recipe"):
            start_from(new_reward_model(recipe, dialogue), folder)
    with pytest.raises(UserError, match=r"reward\.start: .*adapter_model\.safetensors is not there"):
        start_from(new_reward_model(recipe, dialogue), tmp_path / "nothing")


# --- as others load it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fresh_process_without_this_project_gets_the_same_scores(road, monkeypatch):
    monkeypatch.chdir(road)
    recipe = tiny_recipe()
    dialogue = load_dialogue(recipe)
    some = stored()[:5]
    rows = rows_of_all(encode(some, dialogue))
    assert len({len(row) for row in rows}) > 1
    done = subprocess.run(
        [sys.executable, "-c", FRESH], input=json.dumps(rows), capture_output=True, text=True, check=True
    )
    batch, single = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(batch, single, rtol=0, atol=1e-4)

    folder = road / MODEL
    offset = load_config(folder).offset
    ours = TextRewardModel(folder).score(*asked(some))
    torch.testing.assert_close(ours, batch + offset, rtol=0, atol=1e-4)
    assert float(ours.std()) > 0.1

    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["reward"], heads=["reward"])
    backbone.load_adapter("reward", folder)
    backbone.set_offset("reward", offset)
    with torch.no_grad():
        shared = backbone("reward", *right_pad(rows, dialogue.pad_id))
    torch.testing.assert_close(shared, batch + offset, rtol=0, atol=1e-4)


def test_a_model_that_reads_a_token_behind_eos_reads_it_wherever_it_is_loaded(tmp_path):
    recipe, dialogue = tiny(f"dialogue.end_of_context={START}")
    model, some = awake(recipe, dialogue), words(3)
    folder = saved(tmp_path / "model", model, dialogue, recipe, end_of_context=START)
    rows = rows_of_all(encode(some, dialogue))
    assert {tuple(row[-2:]) for row in rows} == {(EOS, dialogue.end_of_context_id)}
    with torch.no_grad():
        expected = torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
        on_eos = torch.stack([model(input_ids=torch.tensor([row[:-1]])).logits[0, 0] for row in rows])
    assert float((expected - on_eos).abs().min()) > 1e-3
    torch.testing.assert_close(scores_of(model, [([], row) for row in rows], 0), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(TextRewardModel(folder).score(*asked(some)), expected, rtol=0, atol=1e-4)


def test_a_model_of_an_earlier_version_is_read_by_the_former_name_of_its_configuration(tmp_path):
    recipe, dialogue = tiny()
    folder = saved(tmp_path / "model", awake(recipe, dialogue), dialogue, recipe)
    config = load_config(folder)
    (folder / "reward_model.json").rename(folder / "reward.json")
    assert load_config(folder) == config


def test_the_base_is_loaded_as_in_training(tmp_path, monkeypatch):
    """The file says so only where that is not the default, so files of earlier versions mean the same."""
    recipe, dialogue = tiny()
    folder = saved(tmp_path / "plain", awake(recipe, dialogue), dialogue, recipe)
    assert not {"dtype", "quantization", "revision"} & set(read_json(folder / "reward_model.json"))
    loading = {"dtype": "bfloat16", "quantization": "nf4", "revision": "v2"}
    folder = saved(tmp_path / "other", awake(recipe, dialogue), dialogue, recipe, **loading)
    assert load_config(folder).loading() == loading
    asked_for = []

    def load(model, dialogue, *shape):
        asked_for.append(model)
        return load_classifier(recipe.model, dialogue)

    monkeypatch.setattr(reward.model.model, "load_classifier", load)
    TextRewardModel(folder, trust_remote_code=True)
    assert asked_for == [
        recipe.model.model_copy(update={**loading, "trust_remote_code": True, "source": "hub"})
    ]


def test_a_folder_without_a_configuration_is_no_reward_model(tmp_path):
    with pytest.raises(UserError, match="make reward"):
        load_config(tmp_path)
