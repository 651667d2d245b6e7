"""Fine-tuning: one optimizer step in parts, packing, what is logged, and what the options change."""

import json
import math

import pytest
import torch
from sft_cases import awake, batch_of, cases, plain_nll, taught, tiny, trainer_of, weights
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from policy.sft.loss import check_packing, losses
from policy.sft.run import judged, new_backbone
from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base, vocabulary_head
from rlhf.models.packing import micro_batches
from rlhf.training.hf_trainer import ADAPTER

MIXED = [*cases(6, 1), *cases(1, 2, prompt=(60, 60)), *cases(2, 3, said=(20, 25))]
TOKENS = sum(sum(row.counts[1:]) for row in MIXED)
BUDGETS = (1, 120, 10**6)


def gradients(backbone):
    """Gradients of everything that learns, which then is without one."""
    found = {n: p.grad.clone() for n, p in backbone.parameters_of(ADAPTER).items() if p.grad is not None}
    backbone.zero_grad(set_to_none=True)
    return found


def assert_equal(mine, expected, atol=2e-6):
    assert set(mine) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            mine[name], tensor, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def plain():
    """Loss and gradients by loops over single rows, with neither trainer nor packing."""
    backbone = awake()
    loss = torch.stack([plain_nll(backbone, row) for row in MIXED]).sum() / TOKENS
    loss.backward()
    return float(loss.detach()), gradients(backbone)


# --- one step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_any_budget_and_any_packing_give_the_gradient_of_single_rows(packing, plain, tmp_path):
    backbone = awake()
    parts = []
    for budget in BUDGETS:
        trainer = trainer_of(
            tmp_path, backbone, MIXED, f"sft.tokens_per_micro_batch={budget}", packing=packing
        )
        total = trainer.training_step(backbone.model, batch_of(MIXED))
        assert float(total) == pytest.approx(plain[0], rel=1e-5)
        found = gradients(backbone)
        assert set(found) == set(backbone.parameters_of(ADAPTER))
        assert_equal(found, plain[1])
        parts.append(len(micro_batches([len(row.ids) for row in MIXED], budget, packing=packing)))
    assert parts[0] > parts[1] > parts[2] == 1
    assert (parts[0] < len(MIXED)) == packing  # short ones do share a row


def test_the_loss_is_that_of_trls_own_trainer(tmp_path):
    backbone = awake()
    trainer = trainer_of(tmp_path, backbone, MIXED)
    rows = [
        {"input_ids": r.ids, "labels": [i if c else -100 for i, c in zip(r.ids, r.counts, strict=True)]}
        for r in MIXED
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    theirs = SFTTrainer.compute_loss(trainer, backbone.model, batch)
    theirs.backward()
    expected = gradients(backbone)
    mine = trainer.training_step(backbone.model, batch_of(MIXED))
    assert float(mine) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert_equal(gradients(backbone), expected)


def test_parts_without_weight_change_neither_gradients_nor_figures(tmp_path, monkeypatch):
    """What a process does while another one has more micro-batches."""
    backbone = awake()
    found = []
    for more in (0, 3):
        monkeypatch.setattr(
            "rlhf.training.hf_trainer.all_max", lambda number, device, more=more: number + more
        )
        trainer = trainer_of(tmp_path, backbone, MIXED, "sft.tokens_per_micro_batch=120")
        total = trainer.training_step(backbone.model, batch_of(MIXED))
        found.append((float(total), dict(trainer._seen), gradients(backbone)))
    assert found[0][:2] == found[1][:2]
    assert_equal(found[1][2], found[0][2], atol=1e-8)


def test_nothing_is_dropped_out(tmp_path):
    backbone = awake()
    backbone.base.model.layers[2].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    trainer = trainer_of(tmp_path, backbone, MIXED)
    first, second = (float(trainer.training_step(backbone.model, batch_of(MIXED))) for _ in range(2))
    assert first == second


# --- packing ---------------------------------------------------------------------------------------------


def test_packed_rows_say_what_single_rows_say(tmp_path):
    backbone = awake()
    head = vocabulary_head(tiny()[0], backbone.base)
    expected = torch.stack([plain_nll(backbone, row) for row in MIXED]).detach()
    for packing in (True, False):
        for tokens in (1, 100, 4096):
            nll, counts = losses(backbone.model, head, MIXED, 0, packing=packing, tokens=tokens)
            torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)
            assert counts.tolist() == [sum(row.counts[1:]) for row in MIXED]
    assert check_packing(backbone.model, MIXED, 0) is None


def test_an_architecture_that_does_not_know_block_masks_is_found_out(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    backbone = awake()
    forward = LlamaModel.forward

    def ignores(self, *args, attention_mask=None, position_ids=None, **options):
        return forward(self, *args, **options)  # without both, or transformers would tell sequences apart

    def refuses(self, *args, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError("only two dimensions")
        return forward(self, *args, attention_mask=attention_mask, **options)

    monkeypatch.setattr(LlamaModel, "forward", ignores)
    warning = check_packing(backbone.model, MIXED, 0)
    assert warning.startswith("packed rows give other outputs with this architecture (by ")
    monkeypatch.setattr(LlamaModel, "forward", refuses)
    warning = check_packing(backbone.model, MIXED, 0)
    assert warning.startswith("this architecture does not take packed rows (only two dimensions)")


# --- a training ------------------------------------------------------------------------------------------

SHORT = ("sft.batch_size=9", "sft.warmup_ratio=0", "sft.learning_rate=1e-3")


def test_only_the_adapter_learns_and_all_of_it(tmp_path):
    backbone = new_backbone(tiny()[0])
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    taught(tmp_path, MIXED, *SHORT, "sft.batch_size=5", backbone=backbone)  # two steps: at the first B is 0
    changed = {n for n, p in backbone.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}


def test_the_log_holds_the_figures_of_loops_over_single_rows(tmp_path):
    backbone = new_backbone(tiny()[0])
    with torch.no_grad():
        nll = float(torch.stack([plain_nll(backbone, row) for row in MIXED]).sum())
        logits = [backbone.model(input_ids=torch.tensor([row.ids])).logits[0, :-1] for row in MIXED]
    entropies = [torch.distributions.Categorical(logits=each).entropy() for each in logits]
    entropy = sum(
        float((e * torch.tensor(row.counts[1:])).sum()) for e, row in zip(entropies, MIXED, strict=True)
    )
    taught(tmp_path, MIXED, *SHORT, packing=False)
    (line,) = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line.pop("sft/grad_norm") > 0
    longest, number = max(len(row.ids) for row in MIXED), len(MIXED)
    assert line == {
        "step": 1,
        "sft/loss": pytest.approx(nll / TOKENS, rel=1e-5),
        "sft/entropy": pytest.approx(entropy / TOKENS, rel=1e-4),
        "sft/learned_tokens": TOKENS,
        "sft/filled": pytest.approx(sum(len(row.ids) for row in MIXED) / (longest * number)),
        "sft/learning_rate": 1e-3,
    }


# --- the options -----------------------------------------------------------------------------------------

SOME = [*cases(6, 1), *cases(2, 3, said=(20, 25))]
OPTIONS = ("sft.batch_size=4", "sft.warmup_ratio=0.25", "sft.epochs=2", "sft.learning_rate=1e-3")
OF_THE_TRAINING = [
    "sft.learning_rate=2e-3",
    "sft.schedule=linear",
    "sft.warmup_ratio=0.5",
    "sft.weight_decay=0.5",
    "sft.max_grad_norm=0.01",
    "sft.epochs=1",
    "sft.batch_size=2",
    "lora.alpha=4",
    "seed=3",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return weights(taught(tmp_path_factory.mktemp("base"), SOME, *OPTIONS))


@pytest.mark.parametrize("option", OF_THE_TRAINING)
def test_an_option_of_the_training_changes_what_is_learned(option, base, tmp_path):
    found = weights(taught(tmp_path, SOME, *OPTIONS, option))
    assert float((found - base).abs().max()) > 1e-5


@pytest.mark.parametrize(
    "option", ["sft.tokens_per_micro_batch=60", "sft.checkpoint_every=1", "packing", "again"]
)
def test_an_option_of_the_work_does_not_change_what_is_learned(option, base, tmp_path):
    overrides = [option] if "=" in option else []
    found = weights(taught(tmp_path, SOME, *OPTIONS, *overrides, packing=option != "packing"))
    atol = 0 if option in ("again", "sft.checkpoint_every=1") else 1e-5
    torch.testing.assert_close(found, base, rtol=0, atol=atol)


# --- the start and the end -------------------------------------------------------------------------------


def test_a_start_is_the_other_adapter_to_the_bit(tmp_path, capsys):
    trained = awake()
    trained.save_adapter(ADAPTER, tmp_path / "mine")
    backbone = new_backbone(tiny()[0], tmp_path / "mine")
    assert torch.equal(weights(backbone), weights(trained))
    assert f"sft: starts from {tmp_path}/mine (28 tensors)" in capsys.readouterr().out


def test_the_saved_adapter_is_read_by_every_other_stage(tmp_path):
    recipe, _ = tiny()
    backbone = taught(tmp_path, MIXED, *SHORT)
    backbone.save_adapter(ADAPTER, tmp_path / "policy")
    other = Backbone(load_base(recipe.model), recipe.lora, adapters=["value", "policy"], heads=["value"])
    assert other.load_adapter("policy", tmp_path / "policy") == 28
    other.activate("policy")
    ids = torch.tensor([MIXED[0].ids])
    assert torch.equal(other.model(input_ids=ids).logits, backbone.model(input_ids=ids).logits)


def test_the_held_out_loss_is_a_mean_over_tokens_with_the_demonstration_as_unit():
    before, after, tokens = (torch.tensor(x) for x in ([4.0, 9.0, 2.0], [2.0, 6.0, 2.0], [2.0, 3.0, 1.0]))
    found = judged(before, after, tokens)
    assert found["held_out_loss_before"]["mean"] == pytest.approx(15 / 6)
    assert found["held_out_loss"]["mean"] == pytest.approx(10 / 6)
    assert found["held_out_change"]["mean"] == pytest.approx(-5 / 6)
    assert found["perplexity"]["mean"] == pytest.approx(math.exp(10 / 6))
    assert found["perplexity_before"]["ci95"] == pytest.approx(
        [math.exp(x) for x in found["held_out_loss_before"]["ci95"]]
    )
    # sum (d - R t)^2 with d = -2, -3, 0 and R = -5/6, times G / (G - 1), over the tokens
    squares = sum((d + 5 / 6 * t) ** 2 for d, t in ((-2, 2), (-3, 3), (0, 1)))
    half = 4.302652729749464 * math.sqrt(1.5 * squares) / 6
    assert found["held_out_change"]["ci95"] == pytest.approx([-5 / 6 - half, -5 / 6 + half])
    assert (found["held_out_loss"]["n"], found["held_out_tokens"]) == (3, 6)


def test_a_training_that_failed_is_told():
    with pytest.raises(UserError, match=r"not finite: the training failed; lower sft\.learning_rate"):
        judged(torch.ones(2), torch.tensor([1.0, float("nan")]), torch.ones(2))
