"""The reward stage as a whole: what its options change and what not, its figures, members and start."""

import contextlib
import gc
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import stage, tiny_recipe
from peft import PeftModel
from preference_cases import asked, assert_equal_tensors, ignoring, stored
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import reward.training.run
from reward.model.batch import encode, micro_batches
from reward.model.forward import score_examples
from reward.model.model import TextRewardModel, head_of, load_config, new_reward_model
from reward.training import __main__ as train
from reward.training.trainer import PreferenceTrainer, train_preference_model
from rlhf.errors import UserError
from rlhf.models.lora import HEAD
from rlhf.runs import cache
from rlhf.runs.artifacts import WEIGHTS, read_json
from rlhf.tokenization.dialogue import load_dialogue

MODEL = "runs/tiny/reward/model"
ALL = "reward.reference_responses=100000"


def results(folder):
    return read_json(folder / "runs/tiny/reward/manifest.json")["results"]


def pair_accuracy(scores, some):
    """Share of the untied pairs in the right order, by loops; equal scores count half."""
    scores, right, pairs = iter(scores), 0.0, 0
    for c in some:
        mine = [next(scores) for _ in c.responses]
        for i, better in enumerate(mine):
            for j, worse in enumerate(mine):
                if c.ranks[i] < c.ranks[j]:
                    pairs += 1
                    right += 1.0 if better > worse else 0.5 if better == worse else 0.0
    assert pairs > 10
    return right / pairs


@pytest.fixture
def in_road(road, monkeypatch):
    monkeypatch.chdir(road)
    return road


@pytest.fixture(scope="module")
def prepared(road, tmp_path_factory):
    """Makes folders in which everything before the reward stage is done."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(road / "models", folder / "models")
        shutil.copytree(road / "runs/tiny/comparisons", folder / "runs/tiny/comparisons")
        return folder

    return make


@pytest.fixture(scope="module")
def retrained(prepared):
    """Runs the reward stage again on the road's comparisons; returns its folder."""

    def run(*overrides):
        folder = prepared("retrained")
        with contextlib.chdir(folder):
            stage(train.main, "reward.probe=false", ALL, *overrides)
        return folder

    return run


@pytest.fixture(scope="module")
def usual(retrained):
    return retrained()


@pytest.fixture(scope="module")
def separate(retrained):
    return retrained("reward.share_prompts=false")


# --- the finished stage of the road ----------------------------------------------------------------------


def test_training_moved_every_part_of_the_adapter(in_road):
    saved = load_file(in_road / MODEL / WEIGHTS)
    moved = [name for name in saved if "lora_B" in name]
    assert len(moved) == 7 * 2  # modules of a layer, adapted layers
    assert all(bool(saved[name].any()) for name in moved)
    assert saved[f"{HEAD}.weight"].shape == (1, 32)


def test_the_folder_says_what_it_is(in_road):
    card = load_config(in_road / MODEL)
    assert card.base == "models/tiny"
    assert card.contract == load_dialogue(tiny_recipe()).fingerprint()
    assert (card.template, card.max_prompt_tokens, card.max_response_tokens) == ("plain", 96, 8)
    assert (card.objective, card.end_of_context) == ("ranked", None)
    with pytest.raises(UserError, match="make reward"):
        load_config(in_road / "models")
    found = results(in_road)
    assert found["reload_gap"] < 1e-4
    assert (found["gain"], found["offset"]) == (card.gain, card.offset)
    assert (found["prompts_shared"], found["trunk_cached"]) == (True, True)
    for name in ("held_out_accuracy", "train_accuracy", "probe_accuracy"):
        assert 0 <= found[name]["mean"] <= 1


def test_the_reported_accuracy_is_that_of_the_saved_scores(in_road):
    held_out = stored("held_out")
    scores = TextRewardModel(in_road / MODEL).score(*asked(held_out)).tolist()
    assert results(in_road)["held_out_accuracy"]["mean"] == pytest.approx(pair_accuracy(scores, held_out))


# --- how long responses are ------------------------------------------------------------------------------


def test_responses_are_read_up_to_a_length_of_the_stage_s_own(retrained, usual, capsys):
    long = retrained("reward.max_response_tokens=9")
    assert "warning" not in capsys.readouterr().out
    assert load_config(long / MODEL).max_response_tokens == 9
    assert load_config(long / MODEL).contract == load_config(usual / MODEL).contract


def test_reading_less_than_ppo_samples_is_told(retrained, capsys):
    short = retrained("reward.max_response_tokens=3")
    said = capsys.readouterr().out
    assert "warning: reward.max_response_tokens=3 is less than the 8 tokens that PPO samples" in said
    assert load_config(short / MODEL).max_response_tokens == 3


# --- how the work is done changes nothing ----------------------------------------------------------------


def assert_same_model(folder, other):
    tensors, wanted = load_file(folder / MODEL / WEIGHTS), load_file(other / MODEL / WEIGHTS)
    assert_equal_tensors(tensors, wanted, atol=1e-5)
    mine, expected = results(folder), results(other)
    for name in ("held_out_accuracy", "train_accuracy"):  # of 30 pairs; a near tie may turn over
        assert mine[name]["mean"] == pytest.approx(expected[name]["mean"], abs=1 / 30)
    with contextlib.chdir(folder):
        some = stored("held_out")
        scores = [TextRewardModel(f / MODEL).score(*asked(some)) for f in (folder, other)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-4)
    assert float(scores[0].std()) > 0.1


def test_prompts_on_their_own_rows_give_the_same_model(usual, separate):
    assert_same_model(separate, usual)
    assert (results(usual)["prompts_shared"], results(separate)["prompts_shared"]) == (True, False)


@pytest.mark.parametrize("option", ["reward.trunk_gigabytes=0", "reward.tokens_per_micro_batch=60"])
def test_memory_does_not_change_the_model(option, retrained, usual, monkeypatch):
    parts = []
    monkeypatch.setattr(
        "reward.training.trainer.micro_batches",
        lambda *a, **o: parts.append(len(found := micro_batches(*a, **o))) or found,
    )
    folder = retrained(option)
    assert_same_model(folder, usual)
    assert results(folder)["trunk_cached"] == (option != "reward.trunk_gigabytes=0")
    assert (min(parts) > 2) == ("tokens" in option)


def test_an_architecture_that_cannot_pack_falls_back_with_a_warning(retrained, separate, monkeypatch, capsys):
    ignoring(monkeypatch)
    folder = retrained()
    assert "warning: packed rows give other outputs with this architecture" in capsys.readouterr().out
    monkeypatch.undo()
    assert_same_model(folder, separate)
    assert results(folder)["prompts_shared"] is False


# --- the scores ------------------------------------------------------------------------------------------


def test_scores_have_mean_0_and_variance_1_and_the_gain_changes_no_comparison(retrained, usual, monkeypatch):
    monkeypatch.chdir(usual)
    some = asked(stored())
    scores = TextRewardModel(usual / MODEL).score(*some)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.var(correction=0)) == pytest.approx(1, abs=1e-3)

    monkeypatch.setattr(reward.training.run, "normalization", lambda _: (1.0, 0.0))
    raw = TextRewardModel(retrained() / MODEL).score(*some)
    card = load_config(usual / MODEL)
    assert card.gain > 0
    assert abs(card.gain - 1) > 0.05
    torch.testing.assert_close(scores, card.gain * raw + card.offset, rtol=0, atol=1e-4)
    assert float(scores[raw.argsort()].diff().min()) > -1e-5  # equal scores may change places by rounding


def test_the_reference_responses_are_a_sample_that_goes_on_from_the_kept_trunk(retrained, monkeypatch):
    monkeypatch.setattr(reward.training.run, "score_examples", seen := Mock(wraps=score_examples))
    assert results(retrained("reward.reference_responses=3"))["reference_responses"] == 3
    (_, examples, _), options = seen.call_args_list[0]
    assert (sum(len(e["spoken"]) for e in examples), options["trunk"] is None) == (3, False)


def test_a_training_that_made_all_scores_equal_is_an_error_with_a_remedy(retrained, monkeypatch):
    monkeypatch.setattr(
        reward.training.run, "train_preference_model", lambda *args, **_: args[3]
    )  # the fresh model is enough
    monkeypatch.setattr(reward.training.run, "score_examples", lambda *_, **__: (torch.zeros(9),))
    with pytest.raises(UserError, match=r"lower reward\.learning_rate"):
        retrained()


def test_a_model_that_was_not_saved_as_it_is_is_noticed(usual, tmp_path, monkeypatch):
    monkeypatch.chdir(usual)
    recipe = tiny_recipe()
    dialogue = load_dialogue(recipe)
    some = stored("held_out")[:1]
    rows = [(e["prompt"], r) for e in encode(some, dialogue) for r in e["responses"]]
    scores = TextRewardModel(usual / MODEL).score(*asked(some))
    assert reward.training.run._check_reload(recipe, usual / MODEL, rows, scores, dialogue) < 1e-4
    lost = shutil.copytree(usual / MODEL, tmp_path / "lost")
    save_file(load_file(lost / WEIGHTS) | {f"{HEAD}.weight": torch.zeros(1, 32)}, lost / WEIGHTS)
    with pytest.raises(RuntimeError, match="scores differently when loaded again"):
        reward.training.run._check_reload(recipe, lost, rows, scores, dialogue)


# --- imitation -------------------------------------------------------------------------------------------


def candidate_log_probs(folder, some):
    """(sum, mean) of each response's log-probability, by the classes that others would use."""
    recipe = tiny_recipe()
    tokenizer = load_dialogue(recipe).tokenizer
    head = AutoModelForCausalLM.from_pretrained("models/tiny").lm_head
    base = AutoModelForSequenceClassification.from_pretrained("models/tiny", num_labels=1)
    decoder = PeftModel.from_pretrained(base, str(folder / MODEL)).base_model.model.model.eval()
    sums, means = [], []
    for prompt, response in zip(*asked(some), strict=True):
        before = tokenizer(prompt[-1].content)["input_ids"]
        said = tokenizer(response)["input_ids"][: recipe.dialogue.max_response_tokens]
        if len(said) < recipe.dialogue.max_response_tokens:
            said = [*said, tokenizer.eos_token_id]
        with torch.no_grad():
            hidden = decoder(input_ids=torch.tensor([before + said])).last_hidden_state[0]
            logps = torch.log_softmax(head(hidden), -1)
        total = sum(float(logps[len(before) + t - 1, token]) for t, token in enumerate(said))
        sums.append(total)
        means.append(total / len(said))
    return sums, means


def test_an_imitation_ranks_candidates_by_their_log_probability(retrained, monkeypatch):
    folder = retrained("reward.objective=imitation")
    monkeypatch.chdir(folder)
    found, card = results(folder), load_config(folder / MODEL)
    assert (card.objective, card.gain, card.offset) == ("imitation", 1.0, 0.0)
    for part, some in (("held_out", stored("held_out")), ("train", stored()[:10])):
        sums, means = candidate_log_probs(folder, some)
        assert found[f"{part}_accuracy"]["mean"] == pytest.approx(pair_accuracy(means, some))
        assert found[f"{part}_accuracy_sum"]["mean"] == pytest.approx(pair_accuracy(sums, some))
    saved = load_file(folder / MODEL / WEIGHTS)
    assert all(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)


# --- where it starts -------------------------------------------------------------------------------------


@pytest.fixture
def beginnings(monkeypatch):
    """The held-out scores of every model before it learns, as the stage goes on."""
    noted = []

    def watched(recipe, section, dialogue, model, rows, plan, **options):
        held_out = encode(stored("held_out"), dialogue)
        noted.append(SimpleNamespace(
            scores=score_examples(model.eval(), held_out, dialogue.pad_id, share=False)[0],
            head=head_of(model).weight.detach().clone(), rows=len(rows),
        ))  # fmt: skip
        return train_preference_model(recipe, section, dialogue, model, rows, plan, **options)

    monkeypatch.setattr(reward.training.run, "train_preference_model", watched)
    return noted


def test_a_start_is_the_other_model_and_goes_on_from_there(retrained, usual, beginnings, monkeypatch, capsys):
    folder = retrained(f"reward.start={usual / MODEL}", "reward.limit=16")
    assert f"reward: starts from {usual / MODEL} (29 tensors)" in capsys.readouterr().out
    monkeypatch.chdir(usual)
    model = TextRewardModel(usual / MODEL)
    expected = model.score(*asked(stored("held_out"))) - model.config.offset
    torch.testing.assert_close(beginnings[0].scores, expected, rtol=0, atol=1e-4)
    assert beginnings[0].rows == 16
    old, new = load_file(usual / MODEL / WEIGHTS), load_file(folder / MODEL / WEIGHTS)
    assert all(not torch.equal(old[name], new[name]) for name in old if "lora_B" in name)
    assert (
        "adapter_model.safetensors"
        in read_json(folder / "runs/tiny/reward/manifest.json")["fingerprint"]["inputs"]
    )


def test_the_start_is_the_recipes_or_that_of_its_pre_training(inside):
    Path("a/b").mkdir(parents=True)
    sources = "pmp.sources=[{files: hub:x}]"
    assert reward.training.run.start_folder(tiny_recipe()) is None
    assert reward.training.run.start_folder(tiny_recipe(sources)) == Path("runs/tiny/pmp/model")
    assert reward.training.run.start_folder(tiny_recipe(sources, "reward.start=a/b")) == Path("a/b")


def test_the_head_starts_as_the_probe(retrained, beginnings, monkeypatch):
    folder = retrained("reward.probe=true", "reward.head_init=probe")
    monkeypatch.chdir(folder)
    reported = results(folder)["probe_accuracy"]["mean"]
    assert pair_accuracy(beginnings[0].scores.tolist(), stored("held_out")) == pytest.approx(reported)
    recipe = tiny_recipe()
    random = head_of(new_reward_model(recipe, load_dialogue(recipe))).weight
    assert not torch.allclose(beginnings[0].head, random)


def test_fewer_comparisons_are_a_beginning_of_more(in_road):
    some = stored()
    assert reward.training.run.drawn(some, None, 0) == some
    assert reward.training.run.drawn(some, 20, 0)[:7] == reward.training.run.drawn(some, 7, 0)
    assert reward.training.run.drawn(some, 7, 0) != reward.training.run.drawn(some, 7, 1)
    assert len({id(c) for c in reward.training.run.drawn(some, 38, 0)}) == 38 == len(some)


# --- several members -------------------------------------------------------------------------------------


def test_a_killed_ensemble_goes_on_with_the_member_that_is_missing(prepared, retrained, usual, monkeypatch):
    folder = prepared("ensemble")
    monkeypatch.chdir(folder)
    began, probed = [], []

    def watched(*args, member, **options):
        began.append(member)
        if began == [0, 1]:
            raise KeyboardInterrupt
        return train_preference_model(*args, member=member, **options)

    probe = reward.training.run.fit_probe
    monkeypatch.setattr(reward.training.run, "train_preference_model", watched)
    monkeypatch.setattr(reward.training.run, "fit_probe", lambda *a, **o: probed.append(1) or probe(*a, **o))
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            stage(train.main, "reward.members=2", ALL)
        gc.collect()  # a process that ends gives its lock back
        earlier = {"weights": [], "layers": None, "accuracy": {}, "best": None}  # as it was without scores
        (parts := folder / "runs/tiny/reward/parts").joinpath("probes.json").unlink(missing_ok=True)
        cache.remember(parts, "probes", None, lambda e=earlier: e)
    assert (began, probed) == ([0, 1, 1], [1])

    other = folder / f"{MODEL}-1"
    alone, first, second = (load_file(f / WEIGHTS) for f in (usual / MODEL, folder / MODEL, other))
    assert all(torch.equal(first[name], tensor) for name, tensor in alone.items())
    assert all(not torch.equal(second[name], tensor) for name, tensor in alone.items())

    held_out = stored("held_out")
    scores = [TextRewardModel(f).score(*asked(held_out)) for f in (folder / MODEL, other)]
    found = results(folder)
    for member, mine in enumerate(scores):
        assert found["members"][member]["mean"] == pytest.approx(pair_accuracy(mine.tolist(), held_out))
    mean = (scores[0] + scores[1]) / 2
    assert found["ensemble_accuracy"]["mean"] == pytest.approx(pair_accuracy(mean.tolist(), held_out))
    assert found["held_out_accuracy"] == found["members"][0]
    assert "scores" not in found
    for model in (folder / MODEL, other):  # each normalized by itself
        scores = TextRewardModel(model).score(*asked(stored()))
        assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
        assert float(scores.var(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_member_is_what_its_own_seed_makes(prepared, monkeypatch):
    """Start and order of the second member are those of seed 1, on the comparisons of seed 0."""
    folder = prepared("member")
    monkeypatch.chdir(folder)
    heads, seeds = [], []
    init = PreferenceTrainer.__init__

    def noted(self, **options):
        heads.append(head_of(options["model"]).weight.detach().clone())
        seeds.append((options["args"].seed, options["args"].data_seed))
        init(self, **options)

    monkeypatch.setattr(PreferenceTrainer, "__init__", noted)
    stage(train.main, "reward.members=2", "reward.probe=false", "reward.limit=8")
    recipe = tiny_recipe()
    dialogue = load_dialogue(recipe)
    for seed, head in enumerate(heads):
        assert torch.equal(head, head_of(new_reward_model(recipe, dialogue, seed)).weight)
    assert seeds == [(0, 0), (1, 1)]
