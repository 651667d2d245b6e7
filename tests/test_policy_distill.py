"""The distill stage, whole: what it lowers, where it is exact, what it refuses, what each option changes.

A new field of the section fails here until it has a line in the table of options.
"""

import contextlib
import gc
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_of, stage, tiny_recipe
from tiny_distill import PROMPT, overrides, results, run, steps, write_lab, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import policy.distillation.run
from policy.distillation import __main__ as distill
from policy.distillation.data import Frame, questions, texts
from policy.distillation.loss import distill_kl
from policy.distillation.student import Student, collate, trunk_of
from policy.distillation.teacher import PromptedModel
from policy.distillation.teacher_cache import TeacherCache, shard_records
from policy.distillation.trainer import DistillTrainer
from rlhf.data.comparisons import Counts
from rlhf.data.readers import stream_comparisons
from rlhf.errors import UserError
from rlhf.models.base import load_base
from rlhf.models.log_probs import chunk_of
from rlhf.models.tiny import write_tiny_model
from rlhf.models.token_batches import token_batches
from rlhf.recipe.schema import Distill
from rlhf.runs.artifacts import sha256_of
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.tokenization.prompt_prefix import Context

# ---- what it is for


@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-2), ("full", 3e-3)])
def test_distillation_brings_the_model_near_to_itself_under_the_prompt(method, rate, distill_lab, capsys):
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


def test_the_result_is_read_by_everybody(distill_lab):
    folder = run()
    recipe = tiny_recipe(*overrides())
    student = Student(recipe, recipe.distill, folder / "policy")
    assert "tensors of" in student.origin
    learned = student.parameters()
    assert any(bool(p.any()) for n, p in learned.items() if "lora_B" in n)
    assert {len(p) for n, p in learned.items() if "lora_A" in n} == {recipe.lora.rank}
    assert (folder / "policy" / "tokenizer.json").is_file()
    assert not (folder / "checkpoints").exists()
    whole = run(name="whole", method="full")
    model = AutoModelForCausalLM.from_pretrained(str(whole / "model"))
    before = load_base(recipe.model).state_dict()
    assert any(not torch.equal(before[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize(("method", "layers"), [("lora", "top_2"), ("full", "all")])
def test_a_second_round_tells_its_share_of_the_whole_prompt(method, layers, distill_lab, capsys):
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


@pytest.mark.parametrize(("method", "why"), [("full", "distill.method is full"), ("lora", "ZeRO 3 gathers")])
def test_a_limit_of_the_trunk_without_effect_is_told(method, why, distill_lab, capsys):
    recipe = tiny_recipe(*overrides(method=method, trunk_gigabytes=3, lora__layers="top_2"))
    student = Student(recipe, recipe.distill, None)
    if method == "lora":
        student.before_sharding()
    assert trunk_of(student, [], recipe.distill) is None
    assert f"distill.trunk_gigabytes has no effect: {why}" in capsys.readouterr().out


# ---- exactly nothing to learn


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize(("method", "layers"), [("lora", "all"), ("lora", "top_2"), ("full", "all")])
def test_with_an_empty_prompt_the_loss_is_exactly_0(method, layers, prompted, distill_lab):
    recipe = tiny_recipe(*overrides(method=method, lora__layers=layers))
    section, dialogue = recipe.distill, load_dialogue(recipe)
    bare = Context.none(dialogue)
    context = Context.read("prompt.txt", dialogue) if prompted else bare
    frame = Frame(context, bare, dialogue, 40)
    asked = stream_comparisons(section.questions, on_bad_rows="stop", counts=Counts(), key="x")
    some = [
        *itertools.islice(texts(section.texts, frame), 12),
        *itertools.islice(questions(asked, frame, Counts()), 12),
    ]
    student = Student(recipe, section, None)
    teacher = PromptedModel(student.backbone or load_base(recipe.model), context.prefix_ids)
    cache = TeacherCache(
        distill_lab / "cache", {}, [len(p.ids) for p in some], k=20, vocabulary=student.vocabulary, shard=99
    )
    cache.write(0, shard_records(teacher, some, cache, 10**6))
    (rows,) = token_batches([len(p.student_ids) for p in some], 10**6)
    batch = collate(rows, some, cache, torch.device("cpu"))
    for inside in (contextlib.nullcontext(), student.folded()):
        with inside:
            hidden = student.states(batch)
        kl = distill_kl(hidden, student.head, batch.teacher, chunk=chunk_of(student.vocabulary))
        assert len(kl) == sum(p.places for p in some)
        if prompted:
            assert float(kl.detach().mean()) > 0.01
        else:
            assert kl.tolist() == [0.0] * len(kl)


# ---- the teacher speaks once


def test_the_words_are_used_again_and_never_computed_twice(distill_lab, monkeypatch, capsys):
    folder = run(teacher_cache="words")
    assert not (folder / "teacher").exists()
    capsys.readouterr()

    def silent(*_, **__):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(policy.distillation.run, "shard_records", silent)
    other = run(name="other", teacher_cache="words", learning_rate=5e-3)
    assert "(3 of 3 were there)" in capsys.readouterr().out
    assert results(other)["teacher"] == results(folder)["teacher"]
    run(teacher_cache="words")
    assert "distill: done already" in capsys.readouterr().out


def test_a_shared_folder_with_other_words_is_refused_before_anything_is_lost(distill_lab):
    run(teacher_cache="words")
    before = {p: sha256_of(p) for p in Path("words").iterdir()}
    with pytest.raises(UserError, match=r"words holds .*top_k: 20 -> 10.*distill\.teacher_cache"):
        run(name="other", teacher_cache="words", top_k=10)
    assert {p: sha256_of(p) for p in Path("words").iterdir()} == before


def test_another_model_of_the_same_tokenizer_can_teach(distill_lab):
    write_tiny_model(distill_lab / "models" / "wise", seed=7)
    own, other = run(), run(name="other", teacher="models/wise")
    words = [results(folder)["teacher"] for folder in (own, other)]
    assert words[0]["identity"] != words[1]["identity"]
    kl = [results(folder)["held_out"]["kl_before"]["mean"] for folder in (own, other)]
    assert kl[1] > kl[0]  # it is another model, and not only under a prompt
    (distill_lab / "models" / "wise").rename(
        distill_lab / "models" / "moved"
    )  # the same weights elsewhere are the same
    moved = run(name="moved", teacher="models/moved")
    assert results(moved)["teacher"]["identity"] == words[1]["identity"]


# ---- what it refuses


def test_a_recipe_without_the_section_has_no_such_stage(distill_lab, capsys):
    stage(distill.main)
    assert "distill: not in this recipe" in capsys.readouterr().out
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hhh_prompt": "gone.txt"}, r"hhh_prompt: no file matches gone\.txt"),
        ({"texts": "gone.txt"}, r"distill\.texts: no file matches gone\.txt"),
        ({"questions": "gone.jsonl"}, r"distill\.questions: no file matches gone\.jsonl"),
        ({"teacher": "./gone"}, r"distill\.teacher: \./gone is not a folder"),
        ({"texts": ...}, "texts is empty: name files with generic texts, or set text_share=0"),
        ({"text_share": 0.0}, "texts are not used with text_share=0"),
        ({"text_share": 1.0}, "questions are not used with text_share=1"),
        ({"top_k": 400}, r"distill\.top_k: 400 of a vocabulary of 259 leave no rest; use 258 or fewer"),
        ({"warmup_steps": 6}, r"distill\.warmup_steps: 6 leaves nothing of 6 steps, with 16 sequences"),
        ({"start": "models"}, r"distill\.start: models/adapter_model\.safetensors is not there"),
        ({"method": "full", "model__dtype": "bfloat16"}, r"distill\.method: full needs float32"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes, message, distill_lab):
    with pytest.raises(UserError, match=message) as caught:
        run(**changes)
    gc.collect()
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_the_window_is_refused(distill_lab):
    Path("prompt.txt").write_text(PROMPT + "\nHuman: more?\n\nAssistant: " + "long " * 120 + "\n")
    with pytest.raises(UserError, match=r"hhh_prompt: the prompt 'prompt' has \d{3} tokens.* reads 512"):
        run()


def test_a_prompt_that_leaves_no_room_for_the_texts_is_refused(distill_lab):
    write_rows(distill_lab / "long.jsonl", [{"text": f"{n} {'long ' * 100}"} for n in range(8)])
    with pytest.raises(
        UserError, match=r"the prompt 'prompt' has \d+ tokens, \d+ with the .* the model reads 512"
    ):
        run(texts="long.jsonl", max_tokens=500)


def test_a_malformed_prompt_is_named_with_its_line(distill_lab):
    Path("prompt.txt").write_text("Be kind.\n-----\nHuman: a\n\nHuman: b\n")
    with pytest.raises(UserError, match=r"prompt\.txt:5: `Assistant: ` is expected"):
        run()
    assert not Path("runs").exists()


def test_a_teacher_with_another_tokenizer_is_refused(distill_lab):
    other = distill_lab / "models" / "other"
    write_tiny_model(other)
    tokenizer = AutoTokenizer.from_pretrained(str(other))
    tokenizer.add_tokens(["house"])
    tokenizer.save_pretrained(str(other))
    with pytest.raises(
        UserError, match=r"distill\.teacher: models/other has another tokenizer than models/tiny"
    ):
        run(teacher="models/other")


def test_all_weights_and_zero_3_are_refused(distill_lab, monkeypatch):
    for name, value in one_of(2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"distill\.method: full does not go with ZeRO-3.*zero_stage=2"):
        run(method="full", distributed__zero_stage=3)


def test_a_changed_prompt_is_another_run(distill_lab):
    run()
    Path("prompt.txt").write_text(PROMPT.replace("kind", "brief"))
    with pytest.raises(UserError, match=r"data file prompt\.txt"):
        run()


# ---- the options

LEARNED = {"first", "weights"}
SAID = {"words"} | LEARNED
CHOSEN = {"rows"} | SAID
LENGTH = {"rates", "saves"}  # of the training
TABLE = {  # field: (its other value, what it changes)
    "texts": ("others.jsonl", CHOSEN),
    "questions": ("more.jsonl", CHOSEN),
    "text_share": (0.75, CHOSEN | LENGTH),
    "sequences": (14, CHOSEN | {"shards"} | LENGTH),
    "max_tokens": (36, CHOSEN),
    "held_out": (0.7, {"rows"} | LEARNED | LENGTH),
    "teacher": ("models/wise", SAID),
    "teacher_cache": ("words", {"files"}),
    "top_k": (5, SAID),
    "shard_sequences": (12, {"shards"}),
    "method": ("full", {"weights", "files", "trunk"}),
    "start": ("runs/first/distill/policy", LEARNED | {"figures"}),
    "epochs": (3, LENGTH),
    "batch_size": (16, LEARNED | LENGTH),
    "learning_rate": (2e-2, {"rates", "weights"}),
    "warmup_steps": (2, {"rates", "weights"}),
    "max_grad_norm": (1e-7, {"weights"}),
    "tokens_per_micro_batch": (100, set()),
    "trunk_gigabytes": (0.0, {"trunk"}),
    "full_kl_sequences": (0, {"figures"}),
    "checkpoint_every": (1, {"saves"}),
}


def observe(name, monkeypatch, **changes):
    """Run the stage and look at all that an option can change."""
    seen = {"saves": 0}
    with monkeypatch.context() as patch:
        save, step = DistillTrainer._checkpoint, DistillTrainer._step

        def saving(self):
            seen["saves"] += 1
            seen["trunk"] = self.trunk is not None
            save(self)

        def stepping(self, number):
            figures = step(self, number)
            seen.setdefault("first", figures["distill/kl"])
            seen.setdefault("weights", {n: p.detach().clone() for n, p in self.student.parameters().items()})
            return figures

        patch.setattr(DistillTrainer, "_checkpoint", saving)
        patch.setattr(DistillTrainer, "_step", stepping)
        folder = run(name=name, **changes)
    words = Path(changes.get("teacher_cache", folder / "teacher"))
    index = json.loads((words / "index.json").read_text())
    records = np.concatenate([np.load(words / shard) for shard in sorted(index["shards"])])
    return seen | {
        "rows": index["key"]["sequences"],
        "words": [float(records[field].astype(float).sum()) for field in ("log_prob", "log_rest")],
        "shards": len(index["shards"]),
        "rates": [row["distill/learning_rate"] for row in steps(folder)],
        "figures": sorted(results(folder)["held_out"]),
        "files": sorted(
            {str(p.relative_to(folder).parts[0]) for p in folder.rglob("*.*") if "tensorboard" not in p.parts}
        ),
    }


def alike(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    if isinstance(one, float) or (isinstance(one, list) and one and isinstance(one[0], float)):
        return one == pytest.approx(other, rel=1e-4)
    return one == other


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a plain run, and what was seen of it."""
    folder = tmp_path_factory.mktemp("plain")
    write_lab(folder)
    write_tiny_model(folder / "models" / "wise", seed=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seen = observe("first", patch)
    return folder, seen


@pytest.mark.parametrize("field", TABLE)
def test_an_option_changes_what_it_should_and_nothing_else(field, plain, monkeypatch):
    value, changes = TABLE[field]
    folder, before = plain
    monkeypatch.chdir(folder)
    after = observe(field, monkeypatch, **{field: value})
    assert {name for name in before if not alike(before[name], after[name])} == changes


def test_every_option_has_its_line():
    assert set(TABLE) == set(Distill.model_fields)


def test_the_default_rate_is_a_share_of_that_of_pre_training(distill_lab):
    folder = run(learning_rate=..., model__pretraining_learning_rate=0.02)
    assert results(folder)["learning_rate"] == pytest.approx(0.05 * 0.02)
    rates = [row["distill/learning_rate"] for row in steps(folder)]
    expected = [1e-3 * (1 - n / len(rates)) for n in range(len(rates))]
    assert rates == pytest.approx(expected)
