"""Direct preference optimization: the pairs, the loss by hand, what is learned, what stays, going on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, stage, tiny_recipe
from ranks import finish
from test_deepspeed import alone_in, assert_close, copy_of

from policy.dpo import __main__ as dpo
from policy.dpo.data import encode, ordered_pairs
from policy.dpo.forward import Reading, distinct, micro_batches, reading
from policy.dpo.run import fit, judged, margins
from policy.dpo.trainer import DpoTrainer, new_trainer
from policy.evaluate import __main__ as evaluate
from rlhf.collect import __main__ as collect
from rlhf.data.comparisons import Comparison, Counts, Message, drawn, write_native
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.models import prepare
from rlhf.models.backbone import REFERENCE
from rlhf.runs.folder import StageFolder
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.hf_trainer import ADAPTER, adapted_base

FAST = (
    f"data.comparisons={ROOT}/recipes/tiny/comparisons.jsonl",
    "dpo.learning_rate=5e-3",
    "dpo.batch_size=8",
    "dpo.beta=0.5",
    "dpo.checkpoint_every=1",
)
BETA = 0.5


def asked(text, responses, ranks):
    return Comparison((Message("user", text),), tuple(responses), tuple(ranks), "made")


RANKED = [
    asked("one ", ["ab", "c d", "e"], [0, 1, 1]),
    asked("and two ", ["longer one", "no", "xy", "z"], [2, 0, 1, 0]),
    asked("3 ", ["yes", "nay"], [1, 0]),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with the tiny model and the comparisons that the stage reads."""
    folder = tmp_path_factory.mktemp("dpo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for main in (prepare.main, collect.main):
            stage(main, *FAST)
    return folder


@pytest.fixture
def inside_lab(lab, monkeypatch):
    monkeypatch.chdir(lab)
    return lab


def awake(recipe, seed=0):
    """A backbone whose adapter says something: in a fresh one B is 0."""
    backbone = adapted_base(recipe, "dpo")
    stir(backbone, seed)
    return backbone


@torch.no_grad()
def stir(backbone, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.parameters_of(ADAPTER).items():
        if "lora_B" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def log_prob(backbone, role, prompt, response):
    """Log-probability of one response by one plain pass of one row."""
    if role == REFERENCE:
        with backbone.model.disable_adapter():
            logits = backbone.base(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    else:
        logits = backbone.model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    logp = logits.float().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(logp[t, token] for t, token in zip(places, response, strict=True))


# --- pairs -----------------------------------------------------------------------------------------------


def test_every_pair_of_unequal_rank_or_the_best_against_the_others():
    ranked = asked("", "abcd", [2, 0, 1, 0])
    assert set(ordered_pairs(ranked, "all")) == {(1, 0), (3, 0), (1, 2), (3, 2), (2, 0)}
    assert set(ordered_pairs(ranked, "best")) == {(1, 0), (3, 0), (1, 2), (3, 2)}
    assert list(ordered_pairs(asked("", "ab", [1, 1]), "all")) == []


def test_a_response_closes_where_it_ended_and_equal_rows_are_left_out(inside_lab):
    dialogue = load_dialogue(tiny_recipe())
    rows, same = encode([asked("hm ", ["short", "too long to fit, really"], [0, 1])], dialogue, "all")
    assert (len(rows), same) == (1, 0)
    assert rows[0]["prompt_ids"] == dialogue.encode_prompt((Message("user", "hm "),))
    assert rows[0]["chosen_ids"] == [*dialogue.encode_response("short"), dialogue.end_id]
    assert rows[0]["rejected_ids"] == dialogue.encode_response("too long to fit, really")
    equal = asked("hm ", ["too long to fit, really", "too long to fit, or so"], [0, 1])
    assert encode([equal], dialogue, "all") == ([], 1)


@pytest.mark.parametrize(
    ("share", "cost"), [(True, lambda r: sum(map(len, r))), (False, lambda r: 2 * max(map(len, r)))]
)
def test_batches_hold_every_pair_once_and_no_more_tokens_than_asked_for(inside_lab, share, cost):
    rows = [*map(reading, encode(RANKED, load_dialogue(tiny_recipe()), "all")[0])]
    parts = micro_batches(rows, 120, share=share)
    assert sorted(index for part in parts for index in part) == list(range(len(rows)))
    assert len(parts) > 1
    copies = 1 if share else 2
    for part in parts:
        widest = max(cost(rows[i].responses) + copies * len(rows[i].prompt) for i in part)
        assert len(part) == 1 or len(part) * widest <= 120


def test_a_response_that_many_pairs_hold_is_read_once():
    pair = lambda p, c, r: {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r}  # noqa: E731
    pairs = [
        pair([1], [5, 6], [7]),
        pair([2], [5, 6], [8]),
        pair([1], [7], [9] * 600),
        pair([1], [3], [5, 6]),
    ]
    readings, places = distinct(pairs)
    assert readings == [
        Reading([1], [[7], [3], [5, 6]]),
        Reading([1], [[9] * 600]),  # no longer row than needed
        Reading([2], [[8], [5, 6]]),
    ]
    flat = [(one.prompt, response) for one in readings for response in one.responses]
    for side, name in enumerate(("chosen_ids", "rejected_ids")):
        assert [flat[i] for i in places[side]] == [(p["prompt_ids"], p[name]) for p in pairs]


# --- the loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [60, 4000])
def test_loss_and_gradient_are_those_of_equation_7(inside_lab, tmp_path, tokens):
    recipe = tiny_recipe(*FAST, f"dpo.tokens_per_micro_batch={tokens}")
    dialogue, backbone = load_dialogue(recipe), adapted_base(recipe, "dpo")
    rows, _ = encode(RANKED, dialogue, "all")
    trainer = new_trainer(recipe, recipe.dpo, dialogue, backbone, rows, folder=tmp_path)
    reference = trainer.log_probs(rows)
    trainer.refer_to(*reference)
    stir(backbone, 1)
    expected = 0
    for row, *ref in zip(rows, *reference, strict=True):
        by_hand = [
            log_prob(backbone, REFERENCE, row["prompt_ids"], row[k]) for k in ("chosen_ids", "rejected_ids")
        ]
        assert ref == pytest.approx([float(x) for x in by_hand], abs=1e-3)
        said = [
            log_prob(backbone, ADAPTER, row["prompt_ids"], row[k]) for k in ("chosen_ids", "rejected_ids")
        ]
        margin = BETA * ((said[0] - by_hand[0]) - (said[1] - by_hand[1]))
        expected = expected - torch.nn.functional.logsigmoid(margin) / len(rows)
    parameters = backbone.parameters_of(ADAPTER)
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    loss = trainer.training_step(trainer.model, {"examples": list(trainer.train_dataset)})
    assert float(loss) == pytest.approx(expected.item(), abs=1e-4)
    assert float(loss) != pytest.approx(math.log(2), abs=0.01)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("dpo.trunk_gigabytes=0", "dpo.loss_type=ipo"),
        ("lora.layers=all", "dpo.share_prompts=false", "dpo.loss_type=robust", "dpo.label_smoothing=0.2"),
    ],
)
def test_loss_gradient_and_reference_are_those_of_trl_on_whole_sequences(inside_lab, tmp_path, options):
    recipe = tiny_recipe(*FAST, "dpo.tokens_per_micro_batch=100", *options)
    dialogue, backbone = load_dialogue(recipe), adapted_base(recipe, "dpo")
    rows, _ = encode(RANKED, dialogue, "all")
    trainer = new_trainer(recipe, recipe.dpo, dialogue, backbone, rows, folder=tmp_path)
    assert (trainer._forward.trunk is not None) == (not options)
    trainer.refer_to(*trainer.log_probs(rows))
    plain = trainer._collate(rows)
    theirs = trainer.compute_ref_log_probs(trainer.model, plain)
    for mine, expected in zip(("ref_chosen_logps", "ref_rejected_logps"), theirs, strict=True):
        torch.testing.assert_close(torch.tensor(trainer.train_dataset[mine]), expected, atol=1e-4, rtol=1e-5)
        plain[mine] = expected
    stir(backbone, 2)
    trainer.model.train()
    expected = trainer._compute_loss(trainer.model, plain, False)
    parameters = [p for p in backbone.parameters_of(ADAPTER).values() if p.requires_grad]
    gradients = torch.autograd.grad(expected, parameters)
    loss = trainer.training_step(trainer.model, {"examples": list(trainer.train_dataset)})
    assert float(loss) == pytest.approx(expected.item(), abs=1e-4)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-3)


def test_the_figures_of_the_held_out_pairs_by_hand():
    before, after = ([-3.0, -4.0], [-2.0, -5.0]), ([-2.0, -6.0], [-4.0, -5.0])
    assert margins(after, before, 0.5).tolist() == [0.5 * (1 + 2), 0.5 * (-2 - 0)]
    found = judged(before, after, [0, 1], 0.5)
    assert found["held_out_accuracy"]["mean"] == 0.5
    assert found["held_out_margin"]["mean"] == pytest.approx(0.25)
    losses = [math.log1p(math.exp(-m)) for m in (1.5, -1.0)]
    assert found["held_out_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    with pytest.raises(UserError, match=r"lower dpo\.learning_rate"):
        judged(before, ([math.nan, 0.0], [0.0, 0.0]), [0, 1], 0.5)


# --- the stage -------------------------------------------------------------------------------------------


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_recipe_without_the_section_has_no_such_stage(inside_lab, capsys):
    stage(dpo.main, FAST[0])
    assert "dpo: not in this recipe" in capsys.readouterr().out


def test_loss_falls_margin_rises_and_a_stage_that_was_stopped_ends_bit_for_bit_alike(inside_lab, capsys):
    options = [*FAST, "dpo.epochs=3"]
    stage(dpo.main, *options)
    folder = inside_lab / "runs/tiny/dpo"
    rows = log_of(folder)
    assert rows[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-4)  # the policy is its reference
    assert rows[0]["dpo/margin"] == pytest.approx(0, abs=1e-4)
    third = len(rows) // 3
    mean = lambda name, part: sum(row[f"dpo/{name}"] for row in part) / len(part)  # noqa: E731
    assert mean("loss", rows[-third:]) < mean("loss", rows[:third]) - 0.05
    assert mean("margin", rows[-third:]) > mean("margin", rows[:third]) + 0.1
    results = json.loads((folder / "manifest.json").read_text())["results"]
    assert results["pairs"] >= results["comparisons"] > 0
    assert 0 <= results["held_out_accuracy"]["mean"] <= 1
    assert "held-out pairs in the right order" in capsys.readouterr().out
    whole = (folder / "policy/adapter_model.safetensors").read_bytes()
    folder.rename(inside_lab / "whole")

    class Killed(Exception):
        pass

    steps = iter(range(4))
    own = DpoTrainer.training_step

    def dies(self, *args, **kwargs):
        if next(steps, None) is None:
            raise Killed
        return own(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DpoTrainer, "training_step", dies)
        with pytest.raises(Killed):
            stage(dpo.main, *options)
    stage(dpo.main, *options)
    assert "going on after step 4" in capsys.readouterr().out
    assert (folder / "policy/adapter_model.safetensors").read_bytes() == whole
    assert [r["dpo/loss"] for r in log_of(folder)] == [r["dpo/loss"] for r in rows]


def test_the_base_and_the_reference_do_not_change(inside_lab, tmp_path):
    recipe = tiny_recipe(*FAST, "dpo.epochs=4")
    dialogue, backbone = load_dialogue(recipe), awake(recipe)
    rows, _ = encode(RANKED, dialogue, "all")
    trainer = new_trainer(recipe, recipe.dpo, dialogue, backbone, rows, folder=tmp_path)
    before, frozen = trainer.log_probs(rows), backbone.reference_hash()
    trainer.refer_to(*before)
    trainer.fit()
    assert backbone.reference_hash() == frozen
    assert trainer.log_probs(rows) != before  # a start that is no fresh adapter is its own reference
    assert log_of(tmp_path)[0]["dpo/margin"] == pytest.approx(0, abs=1e-4)
    assert not [n for n, _ in backbone.named_parameters() if ".ref." in n]


def test_nothing_to_learn_is_told_in_one_line(inside_lab):
    recipe = tiny_recipe(*FAST)
    place = Path("runs/none/comparisons")
    place.mkdir(parents=True)
    for part in ("train", "held_out"):
        write_native(place / f"{part}.jsonl", [asked("a ", ["same start 1", "same start 2"], [0, 1])])
    run = StageFolder("dpo", place.with_name("dpo"))
    with pytest.raises(UserError, match="has no pair of different responses"):
        fit(recipe, recipe.dpo, run)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="robust and label_smoothing belong together"):
        tiny_recipe("dpo.loss_type=robust")
    with pytest.raises(UserError, match=r"dpo.start=sft: this recipe has no sft section"):
        tiny_recipe("dpo.start=sft")
    assert tiny_recipe("dpo.loss_type=robust", "dpo.label_smoothing=0.1").dpo.label_smoothing == 0.1


def test_the_evaluation_takes_it_beside_ppo_and_takes_a_folder(road, tmp_path, monkeypatch):
    """The policy of DPO against the same reference; an adapter that PPO has saved, by its folder."""
    shutil.copytree(road, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    few = ("dpo.limit=16", "dpo.learning_rate=1e-2", "dpo.batch_size=8", "evaluate.prompts=8")
    stage(dpo.main, *few)
    stage(evaluate.main, *few, "evaluate.policy=dpo")
    summary = json.loads(Path("runs/tiny/evaluate_dpo/summary.json").read_text())
    old = json.loads(Path("runs/tiny/evaluate/summary.json").read_text())
    assert summary["policy"] == "dpo"
    assert summary["kl_k3"]["mean"] > 0
    assert summary["samples"][0]["before"] == old["samples"][0]["before"]
    assert "dpo" in summary["stages"]
    assert ", policy dpo" in Path("runs/tiny/evaluate_dpo/summary.md").read_text()
    shutil.rmtree("runs/tiny/evaluate")
    stage(evaluate.main, "evaluate.policy=runs/tiny/ppo/policy")
    again = json.loads(Path("runs/tiny/evaluate/summary.json").read_text())
    assert again["reward"] == old["reward"]
    with pytest.raises(UserError, match=r"evaluate\.policy: runs/gone"):
        stage(evaluate.main, "evaluate.policy=runs/gone", "name=tiny")
    with pytest.raises(UserError, match="this recipe has no dpo section"):
        tiny_recipe("evaluate.policy=dpo")


@pytest.fixture(scope="module")
def together(road, tmp_path_factory):
    """Settings in which all pairs are one batch, of an even number, so that none is padded; one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(road)
        recipe = tiny_recipe()
        dialogue = load_dialogue(recipe)
        train = read_native("runs/tiny/comparisons/train.jsonl", "stop", Counts())
    pairs = {n: len(encode(drawn(train, n, recipe.seed), dialogue, "all")[0]) for n in range(8, 14)}
    limit = next(n for n, number in pairs.items() if number % 2 == 0)
    sizes = (f"dpo.limit={limit}", f"dpo.batch_size={pairs[limit]}", "dpo.tokens_per_micro_batch=300")
    options = (*sizes, "dpo.learning_rate=1e-2", "dpo.warmup_ratio=0", "dpo.epochs=3")
    folder = copy_of(road, tmp_path_factory.mktemp("alone") / "run", "comparisons")
    return alone_in(folder, dpo.main, *options), options


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_learn_what_one_process_learns(zero, together, road, tmp_path):
    alone, options = together
    here = copy_of(road, tmp_path / "here", "comparisons")
    finish(here, "dpo", *options, f"distributed.zero_stage={zero}")
    assert_close(here, alone, "dpo", "policy")
