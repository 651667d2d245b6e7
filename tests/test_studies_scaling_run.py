"""The study as it runs, at sizes that say nothing: units, resuming, given models, the command line."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scaling_cases import WORDS

from rlhf.errors import UserError
from rlhf.models.tiny import tiny_model, tiny_tokenizer, write_tiny_model
from studies.engine.ladder import matrix_weights
from studies.engine.units import read_result, run, with_needs
from studies.scaling import __main__ as command
from studies.scaling import rungs
from studies.scaling.adapters import backbone_of, bare_ids, lead_of
from studies.scaling.data.items import TASKS, Question
from studies.scaling.data.texts import Library
from studies.scaling.distil import distil
from studies.scaling.evaluate import classified, last_words
from studies.scaling.figures import Study
from studies.scaling.plan import ARMS, FULL, QUICK, Given, for_models, units_of
from studies.scaling.units import compute

TINY = replace(
    QUICK,
    sizes=(1,),
    window=128,
    tokens=1_000,
    context_words=12,
    sequences=8,
    sequence_words=16,
    sequences_held_out=3,
    rank=2,
    steps=2,
    responses=4,
    response_tokens=4,
    prompts=4,
    texts=3,
    text_words=16,
    last_words=4,
    items=4,
    judged=3,
    public=3,
)


def units(plan=TINY, given=None):
    return with_needs(units_of(plan, given or Given()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work folder in which everything has been done, and what was said."""
    folder, said = tmp_path_factory.mktemp("work"), []
    run(units(), folder, compute, say=said.append)
    return folder, said


def result_of(unit, folder):
    return read_result(unit, folder)["result"]


# units


def test_every_arm_has_every_task_and_is_another_model(finished):
    folder, lines = finished
    assert len(lines) == 1 + len(units())
    done = Study.read(units(), folder)
    assert done.tasks == ["lm_loss", "last_word", "judged", *TASKS]
    losses = set()
    for arm in ARMS:
        found = done.result("evaluate", done.rungs[0], 0, arm=arm)
        assert [len(found[t][m]) for t, m in (("lm_loss", "nats_per_byte"), ("neqa", "acc"))] == [3, 4]
        losses.add(tuple(found["lm_loss"]["nats_per_byte"]))
    assert len(losses) == len(ARMS)
    assert done.rungs[0].size == 196_608


def test_distillation_starts_at_zero_without_a_context_and_is_bounded(finished):
    (found,) = [result_of(u, finished[0]) for u in units() if u.kind == "distil"]
    assert found["empty_context_kl"] == 0.0
    assert found["bounded"] == 1.0
    assert found["kl_before"]["mean"] > 0
    assert found["context_tokens"] >= 12


def test_two_runs_are_equal_and_a_training_leaves_nothing_but_its_adapter(finished, tmp_path):
    some = [u for u in units() if u.kind != "evaluate" or u.settings["arm"] == "prompted"]
    run(some, tmp_path, compute, say=lambda _: None)
    for unit in some:
        assert result_of(unit, tmp_path) == result_of(unit, finished[0]), unit.name
    assert {p.suffix for p in finished[0].iterdir()} == {".json", ".safetensors"}
    assert len(list(finished[0].glob("ppo-*.safetensors"))) == 2


# rungs


@pytest.mark.parametrize("layers", [1, 2])
def test_a_rung_has_the_weights_of_its_formula(layers):
    model = rungs.make_rung(layers, 300, 64, seed=0)
    assert rungs.matrix_weights(model) == matrix_weights(layers) == 196_608 * layers**3
    again = rungs.make_rung(layers, 300, 64, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_weights_of_a_given_model_are_counted_without_embeddings():
    model = tiny_model(300, width=32, layers=3)
    assert rungs.matrix_weights(model) == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)


def test_every_word_of_the_world_is_one_token():
    tokenizer = rungs.tokenizer_of((), 0, FULL.vocabulary, FULL.window)
    assert len(tokenizer) < FULL.vocabulary  # there was room for every merge
    longer = {w for w in WORDS if len(bare_ids(tokenizer, f" {w}")) > 1}
    assert longer == set()
    ids = tokenizer(" the fox")["input_ids"]
    assert [ids[0]] == lead_of(tokenizer) == [tokenizer.bos_token_id]
    assert tokenizer.decode(ids[1:]) == " the fox"


def test_a_rung_learns_the_text_that_it_reads():
    settings = {"layers": 1, "seed": 0, "text": [], "vocabulary": 700, "window": 64}
    model, tokenizer = rungs.load(settings, None)
    rows = rungs.token_rows(tokenizer, Library((), 0).training(40, 64), 64)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    losses = rungs.language_model(
        model, rows, {"tokens": 64 * 8 * 25, "batch": 8, "seed": 0, "learning_rate": 3e-3}
    )
    assert len(losses) == 25
    assert losses[0] == pytest.approx(math.log(len(tokenizer)), abs=0.3)
    assert losses[-1] < losses[0] - 1.5


# against what is not ours


def model_and_tokenizer():
    tokenizer = tiny_tokenizer()
    return tiny_model(len(tokenizer)), tokenizer


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_the_share_of_the_kl_is_that_of_whole_distributions_computed_by_hand(tmp_path):
    model, tokenizer = model_and_tokenizer()
    settings = {"seed": 0, "rank": 4, "alpha": 8, "sequences": 16, "test": 3, "words": 6, "top_k": 1000}
    settings |= {"batch": 8, "epochs": 4, "learning_rate": 1e-2}
    backbone = backbone_of(model, settings)
    library = Library((), 0)
    context = " the quiet fox sees"
    found = distil(backbone, tokenizer, context, library, settings, tmp_path / "scratch", continued=False)
    lead, c = lead_of(tokenizer), bare_ids(tokenizer, context)
    kl = {"reference": 0.0, "policy": 0.0}
    places = 0
    for text in library.stories("distil test", 3, 6):
        ids = bare_ids(tokenizer, text)
        places += len(ids)
        for role in kl:
            backbone.activate("reference")
            teacher = logits_of(backbone.base, [*lead, *c, *ids])[len(lead) + len(c) - 1 : -1]
            backbone.activate(role)
            student = logits_of(backbone.base, [*lead, *ids])[len(lead) - 1 : -1]
            kl[role] += float((teacher.exp() * (teacher - student)).sum())
    assert found["kl_before"]["mean"] == pytest.approx(kl["reference"] / places, rel=1e-3)
    assert found["kl_after"]["mean"] == pytest.approx(kl["policy"] / places, rel=1e-3)
    assert found["kl_recovered"]["mean"] == pytest.approx(1 - kl["policy"] / kl["reference"], rel=1e-3)
    assert found["kl_recovered"]["mean"] > 0.1


def test_items_and_last_words_are_scored_as_plain_passes_say():
    from rlhf.evals.model import LanguageModel

    model, tokenizer = model_and_tokenizer()
    lm = LanguageModel(model, tokenizer)
    items = [Question(" which", (" a", " bb"), 0), Question(" so it is", (" no", " yes"), 1)]
    found = classified(lm, items)
    for n, item in enumerate(items):
        before = bare_ids(tokenizer, item.prompt)
        sums = []
        for choice in item.classes:
            own = bare_ids(tokenizer, choice)
            table = logits_of(model, [*before, *own])
            sums.append(sum(float(table[len(before) - 1 + i, t]) for i, t in enumerate(own)))
        assert found["acc"][n] == float(np.argmax(sums) == item.answer_index)
        assert found["total_logprob"][n] == pytest.approx(np.logaddexp(*sums), abs=1e-4)
    best = tokenizer.decode([int(logits_of(model, bare_ids(tokenizer, " so it"))[-1].argmax())])
    if len(bare_ids(tokenizer, best)) == 1:
        assert last_words(lm, [(" so it", best)])["acc"] == [1.0]


# models that are given

PROB = "inverse_scaling/sequence_prob"


def test_models_that_are_given_are_a_ladder_too(tmp_path):
    write_tiny_model(tmp_path / "a")
    (tmp_path / "b").mkdir()
    tiny_model(len(tiny_tokenizer()), width=64).save_pretrained(str(tmp_path / "b"))
    tiny_tokenizer().save_pretrained(str(tmp_path / "b"))
    text = tmp_path / "text.txt"
    text.write_text("plain words and more of them\n" * 400, encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "some", "completion": " text"}\n' * 2, encoding="utf-8")
    places = tuple(str(tmp_path / name) for name in "ab")
    given = Given(models=places, text=(str(text),), tasks={PROB: (str(rows),)})
    plan = replace(for_models(TINY), sequences=8, responses=4)
    some = [u for u in units(plan, given) if u.settings.get("arm") in (None, "base", "prompted")]
    folder = tmp_path / "work"
    run(some, folder, compute, say=lambda _: None)
    done = Study.read(some, folder)
    assert [rung.label for rung in done.rungs] == [*places]
    found = done.result("evaluate", done.rungs[0], 0, arm="base")
    assert len(found["neqa"]["acc"]) == 4
    assert len(found[PROB]["loss"]) == 2
    assert not list(folder.glob("rung-*.safetensors"))


# the command line


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["studies.scaling", *map(str, arguments)])
    command.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "x", "x"], "a model stands twice"),
        (["--tasks", "lambada=x.jsonl"], "name others with --models"),
        (["--models", "x", "--tasks", "lambada"], "write NAME=FILE"),
        (["--models", "x", "--tasks", "lambda=x.jsonl"], "did you mean lambada"),
        (["--models", "x", "--tasks", "toxicity=x.jsonl"], "writes text"),
        (["--models", "x", "--context", "nothing.txt"], "nothing.txt"),
        (["--models", "x", "--tasks", "lm_loss=x.jsonl"], "name its files with --text"),
        (["--text", "nothing.txt"], "nothing.txt"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        call(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)


def test_the_command_writes_a_report(monkeypatch, tmp_path, finished):
    """All units are done, so the processes have nothing to do."""
    folder, _ = finished
    monkeypatch.setattr(command, "QUICK", TINY)
    out = tmp_path / "out"
    call(monkeypatch, "--quick", "--output", out, "--work", folder, "--jobs", 1)
    content = json.loads((out / "study.json").read_text(encoding="utf-8"))
    assert content["command"].startswith("python -m studies.scaling --quick")
    assert content["seeds"] == [0]
    assert [c["number"] for c in content["claims"]][-3:] == [5, 6, 19]
    page = (out / "study.md").read_text(encoding="utf-8")
    assert "**With one seed, only the items are behind an interval.**" in page
    assert {p.name for p in out.iterdir()} >= {"tax.png", "inverse.png", "distillation.png"}
