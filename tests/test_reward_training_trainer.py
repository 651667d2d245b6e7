"""One optimizer step in parts, what the options of a training change, and what is logged of it."""

import functools
import itertools
import json

import pytest
import torch
from datasets import Dataset
from preference_cases import (
    assert_equal_tensors,
    awake,
    cases,
    encoded,
    gradients,
    learning,
    plain_scores,
    scratch,
    taught,
    tiny,
)
from torch import nn
from transformers import AutoModelForCausalLM

from reward.model.batch import micro_batches, rows_of, width
from reward.model.model import new_reward_model
from reward.model.trunk_cache import build_trunk
from reward.training.trainer import PreferenceTrainer, learning_rate, training_arguments
from rlhf.models.base import vocabulary_head

MIXED = [
    *cases(6, 31, responses=(2, 3), prompt=(1, 8), said=(0, 6)),
    *cases(1, 32, responses=(5, 5), prompt=(50, 50), first=6),
]
BUDGETS = (1, 70, 10**6)  # tokens: less than any comparison, than the longest, everything in one micro-batch


def trainer_of(folder, model, *overrides, share=True, trunk=None):
    """A trainer that has not begun."""
    recipe, dialogue = tiny(*overrides)
    section = recipe.reward
    language = section.lm_coef or section.objective == "imitation"
    return PreferenceTrainer(
        section=section,
        stage="reward",
        folder=folder,
        pad_id=dialogue.pad_id,
        share=share,
        trunk=trunk,
        vocabulary=vocabulary_head(recipe, model.base_model.model) if language else None,
        model=model,
        args=training_arguments(recipe, section, folder, rate=1e-3, seed=0),
        train_dataset=Dataset.from_list(MIXED),
        processing_class=dialogue.tokenizer,
    )


def plain_parts(model, examples):
    """(ranked loss, language loss, right pairs, pairs) by loops over single rows; losses are means."""
    scores, at, right, pairs = plain_scores(model, examples), 0, 0, 0
    head = AutoModelForCausalLM.from_pretrained(f"{scratch().name}/tiny").lm_head.requires_grad_(False)
    ranked, language = [], []
    for example in examples:
        mine, ranks = scores[at : at + len(example["ranks"])], example["ranks"]
        at += len(ranks)
        leads = [
            mine[i] - mine[j] for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]
        ]
        ranked.append(-nn.functional.logsigmoid(torch.stack(leads)).mean())
        right, pairs = right + sum(lead.item() > 0 for lead in leads), pairs + len(leads)
        best = []
        for k, response in enumerate(example["responses"]):
            if ranks[k] == min(ranks):
                ids = torch.tensor([[*example["prompt"], *response]])
                hidden = model.base_model.model.model(input_ids=ids).last_hidden_state[0]
                begin, said = len(example["prompt"]), example["spoken"][k]
                logits = head(hidden[begin - 1 : begin - 1 + said])
                best.append(nn.functional.cross_entropy(logits, ids[0, begin : begin + said]))
        language.append(torch.stack(best).mean())
    return torch.stack(ranked).mean(), torch.stack(language).mean(), right, pairs


@functools.cache
def expected_of(lm_coef):
    """Loss and gradients of one step over everything, without the trainer."""
    model = awake(*tiny())
    ranked, language, _, _ = plain_parts(model, MIXED)
    loss = ranked + lm_coef * language
    loss.backward()
    return float(loss.detach()), gradients(model)


# --- one step in parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lm_coef", [0.0, 0.7])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_any_budget_gives_the_gradient_of_one_batch(share, cached, lm_coef, tmp_path):
    loss, wanted = expected_of(lm_coef)
    model = awake(recipe := tiny()[0], tiny()[1])
    trunk = build_trunk(recipe, recipe.reward, model, MIXED, 0, share=share) if cached else None
    for budget in BUDGETS:
        options = (f"reward.tokens_per_micro_batch={budget}", f"reward.lm_coef={lm_coef}")
        trainer = trainer_of(tmp_path, model, *options, share=share, trunk=trunk)
        total = trainer.training_step(model, {"examples": MIXED})
        assert float(total) == pytest.approx(loss, rel=1e-4)
        found = gradients(model)
        assert set(found) == learning(model)
        assert_equal_tensors(found, wanted)
    parts = [len(micro_batches(MIXED, budget, share=share)) for budget in BUDGETS]
    assert parts[0] == 7 > parts[1] > parts[2] == 1
    assert width(MIXED[-1], share) * rows_of(MIXED[-1], share) > BUDGETS[1]


def test_parts_without_weight_change_neither_gradients_nor_figures(tmp_path, monkeypatch):
    """What a process does while another one has more micro-batches."""
    model = awake(*tiny())
    found = []
    for more in (0, 3):
        monkeypatch.setattr(
            "rlhf.training.hf_trainer.all_max", lambda number, device, more=more: number + more
        )
        trainer = trainer_of(tmp_path, model, "reward.tokens_per_micro_batch=70", "reward.lm_coef=0.5")
        ended = []
        monkeypatch.setattr(
            "rlhf.training.hf_trainer.backward_part",
            lambda accelerator, loss, *, last, ended=ended: (loss.backward(), ended.append(last)),
        )
        total = trainer.training_step(model, {"examples": MIXED})
        found.append((float(total), dict(trainer._seen), gradients(model)))
        assert ended == [False] * (len(ended) - 1) + [True]
        assert len(ended) == len(micro_batches(MIXED, 70, share=True)) + more
    assert found[1][:2] == found[0][:2]
    assert_equal_tensors(found[1][2], found[0][2], atol=1e-7)


def test_each_prompt_is_forwarded_once_a_step(tmp_path):
    model = awake(*tiny())
    forwarded = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: forwarded.append(int((kwargs["input_ids"] > 0).sum())),
        with_kwargs=True,
    )
    trainer_of(tmp_path, model, "reward.tokens_per_micro_batch=70").training_step(model, {"examples": MIXED})
    assert sum(forwarded) == sum(len(e["prompt"]) + sum(map(len, e["responses"])) for e in MIXED)
    assert len(forwarded) == len(micro_batches(MIXED, 70, share=True))


def test_the_loss_of_an_imitation_is_the_plain_cross_entropy_of_the_best(tmp_path):
    model = awake(*tiny())
    loss = plain_parts(model, MIXED)[1]
    loss.backward()
    wanted = gradients(model)
    trainer = trainer_of(tmp_path, model, "reward.objective=imitation", "reward.tokens_per_micro_batch=70")
    assert float(trainer.training_step(model, {"examples": MIXED})) == pytest.approx(
        float(loss.detach()), rel=1e-5
    )
    found = {n: g for n, g in gradients(model).items() if n in wanted or g.any()}
    assert_equal_tensors(found, wanted)


# --- what is logged --------------------------------------------------------------------------------------


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_log_holds_the_figures_of_loops_over_single_rows(tmp_path):
    rows = encoded(9)
    with torch.no_grad():
        ranked, language, right, pairs = plain_parts(new_reward_model(*tiny()).eval(), rows)
    options = ("reward.lm_coef=0.5", "reward.tokens_per_micro_batch=60", "reward.warmup_ratio=0")
    taught(tmp_path, rows, "reward.batch_size=9", *options)
    (line,) = log_of(tmp_path)
    grad_norm = line.pop("reward/grad_norm")
    assert line == {
        "step": 1,
        "reward/loss": pytest.approx(float(ranked + 0.5 * language), rel=1e-4),
        "reward/preference": pytest.approx(float(ranked), rel=1e-4),
        "reward/language": pytest.approx(float(language), rel=1e-4),
        "reward/pair_accuracy": pytest.approx(right / pairs),
        "reward/learning_rate": 1e-3,
    }
    assert grad_norm > 0


def test_the_last_batch_of_an_epoch_may_be_smaller_and_each_comparison_counts_once_in_each(
    tmp_path, monkeypatch
):
    seen = []
    step = PreferenceTrainer.training_step

    def watched(self, model, inputs, *rest, **more):
        seen.append([example["index"] for example in inputs["examples"]])
        return step(self, model, inputs, *rest, **more)

    monkeypatch.setattr(PreferenceTrainer, "training_step", watched)
    taught(tmp_path, encoded(7), "reward.batch_size=3", "reward.epochs=2")
    assert [len(batch) for batch in seen] == [3, 3, 1] * 2
    epochs = [[index for batch in seen[at : at + 3] for index in batch] for at in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]


def test_the_trainings_of_an_ensemble_share_one_log_and_differ_in_their_seed(tmp_path):
    rows = encoded(8)
    taught(tmp_path, rows, "reward.batch_size=4", "reward.members=2", member=0, members=2)
    first = log_of(tmp_path)
    assert [line["step"] for line in first] == [1, 2]
    start = new_reward_model(*tiny())
    taught(tmp_path, rows, "reward.batch_size=4", "reward.members=2", member=1, members=2, model=start)
    both = log_of(tmp_path)
    assert both[:2] == first
    assert [line["step"] for line in both] == [1, 2, 3, 4]
    assert both[2]["reward/loss"] != first[0]["reward/loss"]  # the same start, and another order
    taught(tmp_path / "alone", rows, "reward.batch_size=4")
    assert log_of(tmp_path / "alone") == first  # the first member is the model that would have been alone


# --- the options -----------------------------------------------------------------------------------------

OF_THE_LOSS = [
    "reward.objective=binary",
    "reward.objective=imitation",
    "reward.likelihood=plackett_luce",
    "reward.margin=0.5",
    "reward.label_smoothing=0.2",
    "reward.label_noise=0.2",
    "reward.center_rewards_coef=0.5",
    "reward.lm_coef=0.5",
]
BASE = ("reward.batch_size=4", "reward.warmup_ratio=0.25", "reward.epochs=2")
OF_THE_TRAINING = [
    "reward.learning_rate=2e-3",
    "reward.schedule=linear",
    "reward.warmup_ratio=0.5",
    "reward.weight_decay=0.5",
    "reward.max_grad_norm=0.1",
    "reward.epochs=1",
    "reward.batch_size=8",
    "lora.alpha=4",
    "seed=3",
]


def test_an_option_of_the_loss_changes_the_gradient_and_no_two_alike(tmp_path):
    found = {"none": expected_of(0.0)[1]}
    for option in OF_THE_LOSS:
        model = awake(*tiny())
        trainer_of(tmp_path, model, option).training_step(model, {"examples": MIXED})
        found[option] = gradients(model)
    flat = {option: torch.cat([g.flatten() for n, g in sorted(f.items()) if "score" not in n])
            for option, f in found.items()}  # fmt: skip
    for one, other in itertools.combinations(flat, 2):
        assert float((flat[one] - flat[other]).abs().max()) > 1e-3, (one, other)


def weights_of(folder, *overrides, rows=None, **options):
    model = taught(folder, rows or encoded(8), *BASE, *overrides, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return weights_of(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("option", OF_THE_TRAINING)
def test_an_option_of_the_training_changes_what_is_learned(option, base, tmp_path):
    gap = (weights_of(tmp_path, option) - base).abs().max()
    assert float(gap) > 1e-5


@pytest.mark.parametrize(
    "option", ["reward.tokens_per_micro_batch=30", "reward.checkpoint_every=1", "share", "trunk", "again"]
)
def test_an_option_of_the_work_does_not_change_what_is_learned(option, base, tmp_path):
    recipe, dialogue = tiny()
    options = {"share": option != "share"}
    if option == "trunk":
        fresh = new_reward_model(recipe, dialogue).eval()
        options["trunk"] = build_trunk(recipe, recipe.reward, fresh, encoded(8), 0, share=True)
    overrides = [option] if "=" in option else []
    found = weights_of(tmp_path, *overrides, **options)
    torch.testing.assert_close(
        found, base, rtol=0, atol=0 if option in ("again", "reward.checkpoint_every=1") else 1e-5
    )


def test_without_a_rate_of_its_own_a_stage_takes_its_share_of_the_pre_training_rate(tmp_path):
    recipe, _ = tiny("reward.learning_rate=null", "model.pretraining_learning_rate=0.3")
    assert learning_rate(recipe, recipe.reward, "reward") == pytest.approx(0.003)
    assert learning_rate(recipe, recipe.reward, "pmp") == pytest.approx(0.03)
    assert learning_rate(*(r := tiny("reward.learning_rate=0.7")[0], r.reward), "pmp") == 0.7
    rate = ("reward.learning_rate=null", "model.pretraining_learning_rate=0.3", "reward.warmup_ratio=0")
    taught(tmp_path, encoded(4), *rate)
    assert log_of(tmp_path)[0]["reward/learning_rate"] == pytest.approx(0.003)


def test_the_rate_rises_falls_and_is_logged(tmp_path):
    rates = {}
    for schedule in ("linear", "cosine", "constant"):
        options = (
            "reward.batch_size=1",
            "reward.warmup_ratio=0.25",
            "reward.learning_rate=1",
            "reward.max_grad_norm=1e-6",
        )
        taught(tmp_path / schedule, encoded(8), *options, f"reward.schedule={schedule}")
        rates[schedule] = [line["reward/learning_rate"] for line in log_of(tmp_path / schedule)]
    assert rates["linear"] == pytest.approx([0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates["cosine"][:3] == rates["linear"][:3]
    expected = [(1 + torch.cos(torch.tensor(torch.pi * i / 6))) / 2 for i in range(6)]
    assert rates["cosine"][2:] == pytest.approx([float(x) for x in expected], abs=1e-6)
    assert min(rates["constant"][2:]) == rates["constant"][0] == 1  # what Hugging Face calls constant
