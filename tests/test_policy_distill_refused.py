"""What context distillation cannot do is refused in one line, before anything is computed."""

import gc
from pathlib import Path

import pytest
from conftest import stage
from tiny_distill import PROMPT, run, write_lab, write_rows
from transformers import AutoTokenizer

from policy.distillation import __main__ as distill
from rlhf.errors import UserError
from rlhf.models.tiny import write_tiny_model


@pytest.fixture
def lab(inside):
    """A folder with all that the stage reads."""
    write_lab(inside)
    return inside


def test_a_recipe_without_the_section_has_no_such_stage(lab, capsys):
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
def test_what_cannot_work_is_refused_in_one_line(changes, message, lab):
    with pytest.raises(UserError, match=message) as caught:
        run(**changes)
    gc.collect()
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_the_window_is_refused(lab):
    Path("prompt.txt").write_text(PROMPT + "\nHuman: more?\n\nAssistant: " + "long " * 120 + "\n")
    with pytest.raises(UserError, match=r"hhh_prompt: the prompt 'prompt' has \d{3} tokens.* reads 512"):
        run()


def test_a_prompt_that_leaves_no_room_for_the_texts_is_refused(lab):
    write_rows(lab / "long.jsonl", [{"text": f"{n} {'long ' * 100}"} for n in range(8)])
    with pytest.raises(
        UserError, match=r"the prompt 'prompt' has \d+ tokens, \d+ with the .* the model reads 512"
    ):
        run(texts="long.jsonl", max_tokens=500)


def test_a_malformed_prompt_is_named_with_its_line(lab):
    Path("prompt.txt").write_text("Be kind.\n-----\nHuman: a\n\nHuman: b\n")
    with pytest.raises(UserError, match=r"prompt\.txt:5: `Assistant: ` is expected"):
        run()
    assert not Path("runs").exists()


def test_a_teacher_with_another_tokenizer_is_refused(lab):
    other = lab / "models" / "other"
    write_tiny_model(other)
    tokenizer = AutoTokenizer.from_pretrained(str(other))
    tokenizer.add_tokens(["house"])
    tokenizer.save_pretrained(str(other))
    with pytest.raises(
        UserError, match=r"distill\.teacher: models/other has another tokenizer than models/tiny"
    ):
        run(teacher="models/other")


def test_all_weights_and_zero_3_are_refused(lab, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"distill\.method: full does not go with ZeRO-3.*zero_stage=2"):
        run(method="full", distributed__zero_stage=3)


def test_a_changed_prompt_is_another_run(lab):
    run()
    Path("prompt.txt").write_text(PROMPT.replace("kind", "brief"))
    with pytest.raises(UserError, match=r"data file prompt\.txt"):
        run()
