"""The distill stage, whole: what it lowers, that it is exact where it must be; the teacher speaks once."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file
from tiny_distill import overrides, results, run, steps, write_lab
from transformers import AutoModelForCausalLM

from policy.distillation import teacher
from policy.distillation.data import Frame, passages
from policy.distillation.loss import distil_kl
from policy.distillation.prompted_model import PromptedModel, shard_records
from policy.distillation.student import Student, collate, width
from policy.distillation.teacher_cache import TeacherCache
from rlhf.errors import UserError
from rlhf.models.base import load_base
from rlhf.models.log_probs import chunk_of
from rlhf.models.tiny import write_tiny_model
from rlhf.models.token_batches import token_batches
from rlhf.runs.artifacts import WEIGHTS, sha256_of
from rlhf.runs.stage import StageRun
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.tokenization.prompt_prefix import Context


@pytest.fixture
def lab(inside):
    """A folder with all that the stage reads."""
    write_lab(inside)
    return inside


# ---- what it is for


@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-2), ("full", 3e-3)])
def test_distillation_brings_the_model_near_to_itself_under_the_prompt(method, rate, lab, capsys):
    layers = {} if method == "full" else {"lora__layers": "all"}
    folder = run(method=method, learning_rate=rate, sequences=40, epochs=12, checkpoint_every=100, **layers)
    found = results(folder)["held_out"]
    for part in (found, found["texts"], found["questions"]):
        assert part["kl_after"]["mean"] < 0.7 * part["kl_before"]["mean"]
        assert part["kl_recovered"]["mean"] == pytest.approx(
            1 - part["kl_after"]["mean"] / part["kl_before"]["mean"], abs=1e-6
        )
    assert found["full_kl_after"]["mean"] < found["full_kl_before"]["mean"]
    assert found["full_coarse_kl_before"]["mean"] <= found["full_kl_before"]["mean"]
    said = capsys.readouterr().out
    assert "distill: held out: KL(teacher || student)" in said
    assert "of the prompt's effect recovered" in said
    kl = [row["distill/kl"] for row in steps(folder)]
    assert kl[-1] < kl[0]


def test_the_result_is_read_by_everybody(lab):
    folder = run()
    recipe = tiny_recipe(*overrides())
    student = Student(recipe, recipe.distill, folder / "policy")
    assert "tensors of" in student.origin
    assert any(bool(p.any()) for n, p in student.parameters().items() if "lora_B" in n)
    assert (folder / "policy" / "tokenizer.json").is_file()
    whole = run(name="whole", method="full")
    model = AutoModelForCausalLM.from_pretrained(str(whole / "model"))
    before = load_base(recipe.model).state_dict()
    assert any(not torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(("method", "layers"), [("lora", "top_2"), ("full", "all")])
def test_a_second_round_tells_its_share_of_the_whole_prompt(method, layers, lab, capsys):
    first = results(run(epochs=8, lora__layers=layers))["held_out"]
    again = {"start": "runs/tiny/distill/policy", "learning_rate": 1e-3, "lora__layers": layers}
    second = results(run(name="second", method=method, **again))["held_out"]
    assert "kl_start" not in first
    for one, two in ((first, second), (first["texts"], second["texts"])):
        for mine, theirs in (("kl_before", "kl_before"), ("kl_start", "kl_after")):
            assert two[mine]["mean"] == pytest.approx(one[theirs]["mean"], rel=1e-4)
        assert two["recovered_at_start"]["mean"] == pytest.approx(one["kl_recovered"]["mean"], abs=1e-4)
        whole = 1 - two["kl_after"]["mean"] / one["kl_before"]["mean"]
        assert two["kl_recovered"]["mean"] == pytest.approx(whole, abs=1e-4)
        assert two["prompt_gain"]["mean"] == pytest.approx(one["prompt_gain"]["mean"], abs=1e-4)
    assert second["full_kl_before"]["mean"] == pytest.approx(first["full_kl_before"]["mean"], rel=1e-4)
    assert " at the start (" in capsys.readouterr().out


# ---- exactly nothing to learn


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize(("method", "layers"), [("lora", "all"), ("lora", "top_2"), ("full", "all")])
def test_with_an_empty_prompt_the_loss_is_exactly_0(method, layers, prompted, lab):
    recipe = tiny_recipe(*overrides(method=method, lora__layers=layers))
    dialogue = load_dialogue(recipe)
    bare = Context.none(dialogue)
    context = Context.read("prompt.txt", dialogue) if prompted else bare
    run_ = StageRun("distill", lab / "run", recipe, {}, {}, True, None)
    train, held, _ = passages(recipe, recipe.distill, run_, Frame(context, bare, dialogue, 40))
    some = [*train, *held]
    assert {p.half for p in some} == {"texts", "questions"}
    student = Student(recipe, recipe.distill, None)
    teacher = PromptedModel(
        student.base if student.backbone else load_base(recipe.model),
        context.prefix_ids,
        student.as_teacher if student.backbone else lambda: None,
    )
    file = TeacherCache(
        lab / "words", {}, [len(p.ids) for p in some], k=20, vocabulary=student.vocabulary, shard=99
    )
    file.write(0, shard_records(teacher, some, file, 10**6, student.vocabulary))
    (rows,) = token_batches([width(p) for p in some], 10**6)
    batch = collate(rows, some, file, torch.device("cpu"))
    losses = []
    for folded in (False, True):
        if folded:
            with student.folded():
                hidden = student.states(batch)
        else:
            hidden = student.states(batch)
        losses.append(distil_kl(hidden, student.head, batch.teacher, chunk=chunk_of(student.vocabulary)))
    for kl in losses:
        assert len(kl) == sum(len(p.ids) - p.first for p in some)
        if prompted:
            assert float(kl.mean()) > 0.01
        else:
            assert kl.tolist() == [0.0] * len(kl)


# ---- the teacher speaks once


def test_the_words_are_used_again_and_never_computed_twice(lab, monkeypatch, capsys):
    folder = run(teacher_cache="words")
    assert not (folder / "teacher").exists()
    capsys.readouterr()

    def silent(*_, **__):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(teacher, "shard_records", silent)
    other = run(name="other", teacher_cache="words", learning_rate=5e-3)
    assert "(3 of 3 were there)" in capsys.readouterr().out
    assert results(other)["teacher"] == results(folder)["teacher"]
    run(teacher_cache="words")
    assert "distill: done already" in capsys.readouterr().out


def test_a_shared_folder_with_other_words_is_refused_before_anything_is_lost(lab):
    run(teacher_cache="words")
    before = {p: sha256_of(p) for p in Path("words").iterdir()}
    with pytest.raises(UserError, match=r"words holds .*top_k: 20 -> 10.*distill\.teacher_cache"):
        run(name="other", teacher_cache="words", top_k=10)
    assert {p: sha256_of(p) for p in Path("words").iterdir()} == before


def test_a_damaged_shard_is_named_and_said_again(lab, capsys):
    run(teacher_cache="words")
    shard = Path("words", "shard-00001.npy")
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    run(name="other", teacher_cache="words")
    said = capsys.readouterr().out
    assert "shard-00001.npy is damaged" in said
    assert "(2 of 3 were there)" in said
    assert shard.read_bytes() == before


def test_another_model_of_the_same_tokenizer_can_teach(lab):
    write_tiny_model(lab / "models" / "wise", seed=7)
    own, other = run(), run(name="other", teacher="models/wise")
    words = [results(folder)["teacher"] for folder in (own, other)]
    assert words[0]["identity"] != words[1]["identity"]
    kl = [results(folder)["held_out"]["kl_before"]["mean"] for folder in (own, other)]
    assert kl[1] > kl[0]  # it is another model, and not only under a prompt
    (lab / "models" / "wise").rename(lab / "models" / "moved")  # the same weights elsewhere are the same
    moved = run(name="moved", teacher="models/moved")
    assert results(moved)["teacher"]["identity"] == words[1]["identity"]


def test_the_adapter_is_of_the_recipes_shape(lab):
    saved = load_file(run() / "policy" / WEIGHTS)
    assert {t.shape[0] for n, t in saved.items() if "lora_A" in n} == {4}
